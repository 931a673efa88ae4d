"""What leads readers to a release once it is public: its collection, and the page of the model that it supersedes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hubforge.errors import PublishError
from hubforge.events import Note
from hubforge.front_matter import read_front_matter
from hubforge.publish._explain import HubError
from hubforge.publish._journal import Journal
from hubforge.publish._remote import Remote
from hubforge.publisher import Hub, Upload

_CARD_LIMIT = 4 << 20  # bytes
_SLUG = re.compile(r"[^/\s]+/[^/\s]+-[0-9a-f]{24}")
_FRONT = re.compile(r"\A(---[ \t]*\r?\n)(.*?)(^---[ \t]*\r?$)", re.DOTALL | re.MULTILINE)
_LINE = re.compile(r"^new_version[ \t]*:.*$", re.MULTILINE)
_ATTEMPTS = 5


def is_slug(collection: str) -> bool:
    """Whether that names a collection of its own, and not a title."""
    return _SLUG.fullmatch(collection) is not None


@dataclass(frozen=True)
class LinkPlan:
    """What the links of one upload would change; see `plan_links`."""

    collection: Literal["create", "join", "keep"] | None = None  # create: the collection too; None: it names none
    superseded: tuple[str, ...] = ()  # repositories whose card would be given `new_version`

    @property
    def changes(self) -> bool:
        return self.collection in ("create", "join") or bool(self.superseded)


def plan_links(
    upload: Upload, remote: Remote, journal: Journal, *, exists: bool, coming: Collection[str] = ()
) -> LinkPlan:
    """What `join_collection` and `supersede` would do for that upload, found out without writing anything.

    At most two requests for the collection (more only where its owner has several pages of them) and one for each page
    that is superseded; none for what the journal says was done. exists: whether the repository of the upload does.
    coming: repositories of the same release, which are there by then. PublishError for what would stop the push.
    """
    found: Literal["create", "join", "keep"] | None = None
    if upload.collection is not None:
        done = journal.did("collect", upload.repo, collection=upload.collection)
        found = "keep" if done else _joining(remote, upload.collection, exists)
    pages = [old for old in upload.supersedes if not journal.did("supersede", old, new=upload.repo)]
    return LinkPlan(found, tuple(old for old in pages if _is_to_be_told(old, upload.repo, remote, coming)))


def _joining(remote: Remote, collection: str, exists: bool) -> Literal["create", "join", "keep"]:
    doing = f"look at the collection {collection!r}"
    if is_slug(collection):
        items = remote.call(doing, lambda: remote.api.get_collection(collection).items)
        inside = any(item.item_type == "model" and item.item_id == remote.repo for item in items)
        return "keep" if inside else "join"
    owner = remote.repo.partition("/")[0]

    def is_listed(item: str | None = None) -> bool:
        listed = remote.call(doing, lambda: list(remote.api.list_collections(owner=owner, item=item)))
        # The owner is compared too: a filter that a Hub does not know is one that it ignores.
        return any(one.title == collection and one.slug.partition("/")[0] == owner for one in listed)

    if exists and is_listed(f"models/{remote.repo}"):
        return "keep"
    return "join" if is_listed() else "create"


def _is_to_be_told(old: str, new: str, like: Remote, coming: Collection[str]) -> bool:
    """Whether the card of `old` does not say yet that `new` is its new version."""
    from huggingface_hub.errors import EntryNotFoundError

    with Remote(like.hub, old, report=like.report, step=like.step, retry=like.retry) as remote:
        try:
            card = _read_card(remote, "main")
        except HubError as error:
            if error.status != 404:
                raise
            if not isinstance(error.__cause__, EntryNotFoundError) and old not in coming:
                raise _not_there(remote, "Mend the name, or take it out of the recipe.") from error
            card = ""
    return with_new_version(card, new) != card


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
                mend = "Everything else is published. Mend the name, or take it out of the recipe; then run again."
                raise _not_there(remote, mend)
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


def _not_there(remote: Remote, mend: str) -> PublishError:
    return PublishError(
        f"`supersedes` names {remote.repo}, which the Hub does not have, or the token may not see",
        where=f"{remote.repo} on {remote.hub.endpoint}",
        mend=mend,
    )


def _card(remote: Remote, commit: str) -> str:
    return _read_card(remote, commit) if "README.md" in remote.tree(commit) else ""


def _read_card(remote: Remote, revision: str) -> str:
    try:
        return remote.read("README.md", revision, _CARD_LIMIT).decode("utf-8")
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
