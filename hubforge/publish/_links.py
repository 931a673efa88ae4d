"""What leads readers to a release once it is public: its collection, and the page of the model that it supersedes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hubforge.errors import PublishError
from hubforge.events import Note
from hubforge.op import Hub
from hubforge.publish._explain import HubError
from hubforge.publish._front_matter import read_front_matter
from hubforge.publish._journal import Journal
from hubforge.publish._remote import Remote

_CARD_LIMIT = 4 << 20  # bytes
_SLUG = re.compile(r"[^/\s]+/[^/\s]+-[0-9a-f]{24}")
_FRONT = re.compile(r"\A(---[ \t]*\r?\n)(.*?)(^---[ \t]*\r?$)", re.DOTALL | re.MULTILINE)
_LINE = re.compile(r"^new_version[ \t]*:.*$", re.MULTILINE)
_ATTEMPTS = 5


def is_slug(collection: str) -> bool:
    """Whether that names a collection of its own, and not a title."""
    return _SLUG.fullmatch(collection) is not None


def join_collection(remote: Remote, collection: str, *, private: bool, journal: Journal) -> None:
    """Put the repository into that collection: a slug, or the title of one in its namespace, made when it is missing.

    Does nothing where the journal says that it was done.
    """
    if journal.did("collect", remote.repo, collection=collection):
        return
    with journal.doing("collect", remote.repo, collection=collection):
        slug = collection
        if not is_slug(collection):
            slug = remote.call(
                f"find or make the collection {collection!r}",
                lambda: (
                    remote.api.create_collection(
                        collection, namespace=remote.repo.partition("/")[0], private=private, exists_ok=True
                    ).slug
                ),
            )
        remote.call(
            f"add it to the collection {slug}",
            lambda: remote.api.add_collection_item(slug, item_id=remote.repo, item_type="model", exists_ok=True),
        )
    remote.report(Note(remote.step, f"in the collection {slug}"))


def supersede(hub: Hub, old: str, new: str, journal: Journal, like: Remote) -> None:
    """Have the card of `old` say that `new` is its new version: the Hub then shows a banner on its page.

    One commit that changes one line of its front matter, on top of the head that was read. A card without front matter
    gets one. Does nothing where the journal says that it was done.
    """
    if journal.did("supersede", old, new=new):
        return
    with Remote(hub, old, report=like.report, step=like.step, retry=like.retry) as remote:
        for attempt in range(1, _ATTEMPTS + 1):
            head = remote.head()
            if head is None or head.commit is None:
                raise PublishError(
                    f"`supersedes` names {old}, which the Hub does not have, or the token may not see",
                    where=f"{old} on {hub.endpoint}",
                    mend="Everything else is published. Mend the name, or take it out of the recipe; then run again.",
                )
            before = _card(remote, head.commit)
            after = with_new_version(before, new)
            if after == before:
                journal.record("supersede", old, "done", new=new)
                return
            try:
                with journal.doing("supersede", old, new=new, parent=head.commit):
                    _commit_card(remote, after, f"Superseded by {new}", head.commit)
                remote.report(Note(remote.step, f"{old} now points here"))
                return
            except HubError as error:
                if not (error.status == 412 or error.in_doubt) or attempt == _ATTEMPTS:
                    raise
                if error.in_doubt:
                    remote.retry.pause(error, attempt - 1)


def _card(remote: Remote, commit: str) -> str:
    if "README.md" not in remote.tree(commit):
        return ""
    try:
        return remote.read("README.md", commit, _CARD_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PublishError(
            f"README.md is not UTF-8: {error}", where=f"{remote.repo} on {remote.hub.endpoint}"
        ) from error


def _commit_card(remote: Remote, text: str, message: str, parent: str) -> None:
    from huggingface_hub import CommitOperationAdd

    remote.check_card(text)
    addition = CommitOperationAdd("README.md", text.encode())
    remote.commit([addition], message, parent)


def with_new_version(card: str, new: str) -> str:
    """That card with `new_version: new` in its front matter, and nothing else changed, comments and order included."""
    match = _FRONT.match(card)
    if match is None:
        return f"---\nnew_version: {new}\n---\n{card}"
    if _says(card) == new:
        return card
    head, front, end = match.groups()
    line = f"new_version: {new}"
    front = _LINE.sub(line, front, count=1) if _LINE.search(front) else f"{front}{line}\n"
    changed = f"{head}{front}{end}{card[match.end() :]}"
    if _says(changed) != new:
        raise PublishError(
            "the front matter of the card that is superseded cannot be changed line by line",
            mend=f"Add `new_version: {new}` to it by hand.",
        )
    return changed


def _says(card: str) -> object:
    try:
        return read_front_matter(card).get("new_version")
    except ValueError:
        return None


def check_collections(me: Mapping[str, Any], collections: Mapping[str, str], endpoint: str) -> None:
    """PublishError when a fine-grained token surely may not change a collection. collections: by repository."""
    auth = me.get("auth")
    token = auth.get("accessToken") if isinstance(auth, Mapping) else None
    if not isinstance(token, Mapping) or token.get("role") != "fineGrained":
        return
    details = token.get("fineGrained")
    scopes = details.get("scoped") if isinstance(details, Mapping) else None
    if not isinstance(scopes, list):
        return
    for repo, collection in collections.items():
        owner = (collection if is_slug(collection) else repo).partition("/")[0]
        if not any(_grants(scope, owner) for scope in scopes):
            raise PublishError(
                f"no scope of the token grants collection.write for {owner}, and {repo} is to join a collection",
                where=endpoint,
                mend=f"Add the scope at {endpoint}/settings/tokens, or take `collection` out of the recipe.",
            )


def _grants(scope: object, owner: str) -> bool:
    entity = scope.get("entity") if isinstance(scope, Mapping) else None
    permissions = scope.get("permissions") if isinstance(scope, Mapping) else None
    return (
        isinstance(entity, Mapping)
        and entity.get("name") == owner
        and isinstance(permissions, list)
        and "collection.write" in permissions
    )
