"""Whether a token may publish to some repositories, as far as the Hub tells before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hubforge.errors import PublishError, shown
from hubforge.publish._explain import HubError
from hubforge.publish._links import check_collections
from hubforge.publish._remote import Remote
from hubforge.publisher import Hub

_WRITES = "repo.write"  # the scope that lets a fine-grained token commit, and create below a namespace
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Access:
    """One repository: is it there, who may see it, and may this token write to it (None: the Hub does not tell)."""

    repo: str
    exists: bool
    private: bool | None
    may_write: bool | None
    reason: str  # why that is known, or what is missing


def check_access(hub: Hub, repos: Iterable[str], collections: Mapping[str, str] | None = None) -> tuple[Access, ...]:
    """For each repository, whether the token may publish there; PublishError names all of those that it may not.

    Asks who the token belongs to once, and each repository once. Write access follows from the token's role and
    scopes and the account's organizations; where the answer does not settle it, `may_write` is None and only the push
    will tell. A CI job without a token asks for one for each repository, which settles it.
    collections: by repository, the one that it joins.
    """
    wanted = list(dict.fromkeys(repos))
    if not wanted:
        return ()
    if hub.credentials is not None:
        return _check_job(hub, wanted, collections or {})
    if hub.token is None:
        raise PublishError(
            "there is no token to publish with",
            where=hub.endpoint,
            mend=hub.sign_in(),
        )
    with Remote(hub, "") as remote:
        me = remote.whoami()
    check_collections(me, collections or {}, hub.endpoint)
    found = [_look(hub, repo, me) for repo in wanted]
    refused = [access for access in found if access.may_write is False]
    if refused:
        raise PublishError(
            "the token may not publish to " + "; nor to ".join(f"{access.repo}: {access.reason}" for access in refused),
            where=hub.endpoint,
            mend=f"Take a token with the role 'write', or add the scope, at {hub.endpoint}/settings/tokens.",
        )
    return tuple(found)


def _check_job(hub: Hub, repos: Iterable[str], collections: Mapping[str, str]) -> tuple[Access, ...]:
    """The same for a CI job that has no token: all repositories that it is not trusted with, at once."""
    if collections:
        raise PublishError(
            f"the recipe puts {', '.join(collections)} into a collection, and a CI job's token is for one repository",
            where=hub.endpoint,
            mend="Take `collection` out of the recipe and add it by hand, once; or publish with a token in HF_TOKEN.",
        )
    found, refused = [], []
    for repo in repos:
        try:
            with Remote(hub, repo) as remote:
                head = remote.head()
        except HubError:
            raise
        except PublishError as error:
            refused.append(error)
            continue
        private = head.private if head else None
        found.append(Access(repo, head is not None, private, True, "this job is one of its trusted publishers"))
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise PublishError(
            "; ".join(error.what for error in refused), where=hub.endpoint, mend=refused[0].mend
        ) from refused[0]
    return tuple(found)


def is_local(hub: Hub) -> bool:
    """Whether that Hub runs on this machine."""
    return (urlsplit(hub.endpoint).hostname or "") in _LOOPBACK


def sends_token_in_clear(hub: Hub) -> bool:
    """Whether the token would cross a network unencrypted."""
    return hub.token is not None and urlsplit(hub.endpoint).scheme != "https" and not is_local(hub)


def _look(hub: Hub, repo: str, me: Mapping[str, Any]) -> Access:
    with Remote(hub, repo) as remote:
        try:
            head = remote.head()
        except HubError as error:
            if error.status not in (401, 403):
                raise
            return Access(repo, True, None, False, "the Hub refuses to show it to this token")
    may_write, reason = may_publish(me, repo, exists=head is not None)
    return Access(repo, head is not None, head.private if head else None, may_write, reason)


def may_publish(me: Mapping[str, Any], repo: str, *, exists: bool) -> tuple[bool | None, str]:
    """Whether that `whoami` answer lets the token write to a repository (or create it), and why.

    None where the answer does not have the shape known here: an unknown kind of token is not called useless.
    """
    namespace = repo.partition("/")[0]
    organizations = {
        str(one.get("name")): one.get("roleInOrg") for one in me.get("orgs") or () if isinstance(one, Mapping)
    }
    auth = me.get("auth")
    token = auth.get("accessToken") if isinstance(auth, Mapping) else None
    role = token.get("role") if isinstance(token, Mapping) else None
    if role == "read":
        return False, "the token's role is 'read'"
    if role == "fineGrained":
        return _scoped(token if isinstance(token, Mapping) else {}, repo, exists)
    if role != "write":
        return None, "the Hub does not tell what the token may do"
    owner = shown(str(me.get("name") or ""))
    if me.get("anyNamespace") is True:
        return True, "that Hub has no tokens: whoever reaches it may write"
    if namespace == me.get("name"):
        return True, "the token's role is 'write', and the namespace is its owner's"
    if namespace not in organizations:
        return False, f"{namespace} is neither {owner} nor one of its organizations"
    if organizations[namespace] == "read":
        return False, f"{owner} may only read in the organization {namespace}"
    return True, f"the token's role is 'write', and {owner} belongs to {namespace}"


def _scoped(token: Mapping[str, Any], repo: str, exists: bool) -> tuple[bool | None, str]:
    """The same for a fine-grained token, whose scopes name a user, an organization or single repositories."""
    namespace = repo.partition("/")[0]
    details = token.get("fineGrained")
    scopes = details.get("scoped") if isinstance(details, Mapping) else None
    if not isinstance(scopes, list):
        return None, "the Hub does not tell the scopes of this fine-grained token"
    for scope in scopes:
        entity = scope.get("entity") if isinstance(scope, Mapping) else None
        permissions = scope.get("permissions") if isinstance(scope, Mapping) else None
        if not isinstance(entity, Mapping) or not isinstance(permissions, list) or _WRITES not in permissions:
            continue
        if entity.get("type") in ("user", "org") and entity.get("name") == namespace:
            return True, f"a scope of the token grants {_WRITES} for {namespace}"
        if entity.get("name") == repo:
            if exists:
                return True, f"a scope of the token grants {_WRITES} for this repository"
            return False, f"it does not exist yet, and the token has no scope to create it below {namespace}"
    return False, f"no scope of the token grants {_WRITES} for {repo} or {namespace}"
