"""What a push would do to one repository, found out without uploading: `publish --dry-run`, and the push itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hubforge.errors import PublishError
from hubforge.events import Report, Warned, silent
from hubforge.op import FileDigest
from hubforge.publish._card import added_card, card_of, merge_upload, text_of
from hubforge.publish._earlier import CARD, NEVER_DELETED, EarlierReleases, find_target, release_path
from hubforge.publish._journal import Journal
from hubforge.publish._links import LinkPlan, plan_links
from hubforge.publish._merge import Conflict
from hubforge.publish._paths import path_fault
from hubforge.publish._preupload import ask_before
from hubforge.publish._remote import Head, Remote, RemoteFile, Snapshot
from hubforge.publish._sending import check_files, git_oid
from hubforge.publisher import Hub, Upload, UploadFile


@dataclass(frozen=True)
class PushPlan:
    """One repository as it is, and what a push would change. Sizes in bytes.

    deleted: what an earlier release put there, this one no longer has, and nobody touched since; and what was asked to
    be pruned. kept: what an earlier release put there and somebody changed since. foreign: files that hubforge did not
    put there, where this release may write. others: how many files belong to other folders. The last three are left
    alone.
    """

    upload: Upload  # what is pushed: the card with what people wrote on the one that is there
    exists: bool
    private: bool
    parent: str | None  # the commit it was planned against; None: nothing was ever committed
    added: tuple[FileDigest, ...] = ()
    replaced: tuple[FileDigest, ...] = ()
    deleted: tuple[FileDigest, ...] = ()
    unchanged: tuple[FileDigest, ...] = ()
    kept: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    others: int = 0
    tag_change: Literal["create", "keep"] | None = None
    card_diff: str = ""  # of the card as it is there to the one that would be
    conflicts: tuple[Conflict, ...] = ()
    ignored: tuple[str, ...] = ()  # what a .gitignore there would keep out; found by `plan_push` alone
    links: LinkPlan = field(default_factory=LinkPlan)  # found by `plan_push` alone
    unknown: tuple[str, ...] = ()  # steps that are not made yet: what they give, and the card, cannot be known

    @property
    def target(self) -> str:
        return self.upload.target

    @property
    def repo(self) -> str:
        return self.upload.repo

    @property
    def folder(self) -> str | None:
        return self.upload.folder

    @property
    def tag(self) -> str | None:
        return self.upload.tag

    @property
    def changes_files(self) -> bool:
        return bool(self.added or self.replaced or self.deleted)

    @property
    def changes(self) -> bool:
        """Whether a push would change anything at all, or whether that cannot be known yet."""
        joins = self.tag_change == "create" or self.links.changes
        return self.changes_files or not self.exists or joins or bool(self.unknown)

    @property
    def pruned(self) -> tuple[str, ...]:
        """Those of `deleted` that no release of hubforge speaks of, or that somebody changed since."""
        return tuple(file.path for file in self.deleted if file.path in self.upload.prune)

    @property
    def prunable(self) -> tuple[str, ...]:
        """What `--prune` would delete besides."""
        return tuple(sorted((*self.foreign, *self.kept)))

    @property
    def upload_bytes(self) -> int:
        """At most so many bytes are sent; what the Hub already stores under another name is not sent again."""
        return sum(file.size for file in (*self.added, *self.replaced))

    @property
    def refusal(self) -> PublishError | None:
        """The error that stops the push where the card is in conflict and nobody said which side to take."""
        if not self.conflicts or self.upload.take is not None:
            return None
        what = "; ".join(f"{one.what} {one.how}" for one in self.conflicts)
        diffs = "\n".join(one.diff for one in self.conflicts if one.diff)
        return PublishError(
            f"README.md has edits that this release would undo: {what}\n{diffs}",
            where=self.repo,
            mend="Move them out of the marked section, or into `card:` of the recipe; or --take ours writes what the"
            " release has, --take theirs keeps what is there.",
        )

    def as_json(self) -> dict[str, Any]:
        """For `--json`: what would change by path, and counts and bytes."""

        def rows(files: tuple[FileDigest, ...]) -> list[dict[str, Any]]:
            return [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in files]

        return {
            "target": self.target,
            "repo": self.repo,
            "folder": self.folder,
            "exists": self.exists,
            "private": self.private,
            "visibility_change": None if self.exists else f"create {'private' if self.private else 'public'}",
            "parent": self.parent,
            "changes": self.changes,
            "upload_bytes": self.upload_bytes,
            "added": rows(self.added),
            "replaced": rows(self.replaced),
            "deleted": rows(self.deleted),
            "pruned": list(self.pruned),
            "kept": list(self.kept),
            "unchanged": len(self.unchanged),
            "unchanged_bytes": sum(file.size for file in self.unchanged),
            "foreign": list(self.foreign),
            "others": self.others,
            "ignored": list(self.ignored),
            "tag": self.tag,
            "tag_change": self.tag_change,
            "collection": self.upload.collection,
            "collection_change": self.links.collection,
            "supersedes": list(self.upload.supersedes),
            "superseded": list(self.links.superseded),
            "card_diff": self.card_diff,
            "conflicts": [{"what": one.what, "how": one.how, "diff": one.diff} for one in self.conflicts],
            "unknown": list(self.unknown),
        }


def plan_push(
    upload: Upload,
    hub: Hub,
    report: Report = silent,
    *,
    unknown: Sequence[str] = (),
    journal: Journal | None = None,
    coming: Collection[str] = (),
) -> PushPlan:
    """What `push` would do with that upload now, and then the links. Sends no file; reads the tree, and the card and
    the earlier release where they differ; and the collection and the pages that the upload names.

    unknown: steps that are not made yet; what the upload lacks for that is then no reason to delete anything.
    journal: what earlier publishes did, which is only read. coming: see `plan_links`.
    PublishError for what would stop the push: a tag that marks another commit, a public repository that the recipe
    calls private, a local file that is not what was made, front matter that the Hub refuses, a collection or a page
    that is not there. A card in conflict is told by `refusal`.
    """
    check_files(upload)
    with Remote(hub, upload.repo, report=report, step=f"publish.{upload.target}") as remote:
        found = plan(upload, remote, stop_at_conflicts=False, partial=bool(unknown))
        found = preview(replace(found, unknown=tuple(unknown)), remote)
        links = plan_links(upload, remote, journal or Journal(None, hub), exists=found.exists, coming=coming)
        return replace(found, links=links)


def preview(found: PushPlan, remote: Remote) -> PushPlan:
    """The plan with what the Hub says of its files beforehand: that it has them already, or would leave them out."""
    by_path = {file.path: file for file in found.upload.files}
    changing = [by_path[file.path] for file in (*found.added, *found.replaced)]
    card = next((file for file in changing if file.path == CARD), None)
    if card is not None:
        remote.check_card(text_of(card))
    answers = ask_before(changing, remote) if changing and found.exists else {}
    there = {path for path, answer in answers.items() if answer.holds(by_path[path])}
    return replace(
        found,
        added=tuple(file for file in found.added if file.path not in there),
        replaced=tuple(file for file in found.replaced if file.path not in there),
        unchanged=(*found.unchanged, *(file for file in (*found.added, *found.replaced) if file.path in there)),
        ignored=tuple(path for path, answer in answers.items() if answer.ignored),
    )


def plan(
    upload: Upload,
    remote: Remote,
    known: dict[str, str] | None = None,
    seen: Snapshot | None = None,
    *,
    stop_at_conflicts: bool = True,
    partial: bool = False,
) -> PushPlan:
    """`plan_push` over an open repository; `known` keeps the git oids that were computed, by sha256.

    The card is merged with the one that is there, so push `PushPlan.upload` and not what was given. PublishError for a
    card in conflict, unless stop_at_conflicts=False. seen: what main holds, when that was looked at just now. partial:
    the upload is not all of the release.
    """
    known = {} if known is None else known
    seen = seen or remote.look()
    head, tree = seen.head, seen.tree
    if head is None:
        return PushPlan(
            upload,
            exists=False,
            private=upload.private,
            parent=None,
            added=_digests(upload.files),
            tag_change="create" if upload.tag else None,
            card_diff=added_card(upload),
        )
    check_visibility(upload, head, remote)
    earlier = EarlierReleases(
        remote, head.commit or "", tree, upload, lambda file: is_same(file, tree[file.path], known)
    )
    ours = card_of(upload)
    same_card = ours is not None and CARD in tree and is_same(ours, tree[CARD], known)
    card = merge_upload(upload, earlier, same=same_card)
    upload = card.upload
    added = [file for file in upload.files if file.path not in tree]
    present = [file for file in upload.files if file.path in tree]
    unchanged = [file for file in present if is_same(file, tree[file.path], known)]
    same = {file.path for file in unchanged}
    changed = [file for file in present if file.path not in same]
    deleted, kept = ((), ()) if partial else _leftovers(upload, earlier, same)
    gone = {file.path for file in deleted}
    ours_or_gone = {file.path for file in upload.files} | gone
    rest = [path for path in sorted(tree) if path not in ours_or_gone and path.rpartition("/")[2] not in NEVER_DELETED]
    strays = [path for path in rest if path not in kept and earlier.is_stray(path)]
    pruned = [tree[path] for path in (*strays, *kept) if path in upload.prune]
    deleted += tuple(FileDigest(file.path, file.size, file.sha256 or "") for file in pruned)
    found = PushPlan(
        upload,
        exists=True,
        private=head.private,
        parent=head.commit,
        added=_digests(added),
        replaced=_digests(changed),
        deleted=deleted,
        unchanged=_digests(unchanged),
        kept=tuple(path for path in kept if path not in upload.prune),
        foreign=() if partial else tuple(path for path in strays if path not in upload.prune),
        others=len(rest) - len(strays) - len(kept),
        tag_change=_tag_change(upload, remote, head, bool(added or changed or deleted), known, partial=partial),
        card_diff=card.diff,
        conflicts=card.conflicts,
    )
    if stop_at_conflicts and (refusal := found.refusal):
        raise refusal
    return found


def is_same(file: UploadFile, there: RemoteFile, known: dict[str, str]) -> bool:
    """Whether that remote file has the bytes of this local one. Large files are not read: their sha256 is known."""
    if there.size != file.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == file.sha256
    if file.sha256 not in known:
        known[file.sha256] = git_oid(file)
    return there.oid == known[file.sha256]


def check_visibility(upload: Upload, head: Head, remote: Remote) -> None:
    """PublishError when everybody could read what the recipe calls private."""
    if upload.private and not head.private:
        raise PublishError(
            "the recipe says `private: true`, but the repository is public",
            where=f"{upload.repo} on {remote.hub.endpoint}",
            mend=f"Make it private at {remote.endpoint}/{upload.repo}/settings, or take `private` out of the recipe.",
        )


def _leftovers(
    upload: Upload, earlier: EarlierReleases, same: set[str]
) -> tuple[tuple[FileDigest, ...], tuple[str, ...]]:
    """What an earlier release of hubforge put there and this upload has not: untouched since, and touched since."""
    path, tree, remote = release_path(upload.folder), earlier.tree, earlier.remote
    if path not in tree or path in same:
        return (), ()
    release = earlier.read(path)
    if release is None:
        text = f"{path} of {upload.repo} is not a release file that can be read, so nothing is deleted there"
        remote.report(Warned(remote.step, text))
        return (), ()
    target = find_target(release, upload.repo, upload.folder)
    ours = {file.path for file in upload.files}
    prefix = f"{upload.folder}/" if upload.folder else ""
    deleted: list[FileDigest] = []
    kept: list[str] = []
    for file in target.files if target else ():
        there = tree.get(file.path)
        if there is None or file.path in ours or not file.path.startswith(prefix) or path_fault(file.path):
            continue
        if file.path.rpartition("/")[2] in NEVER_DELETED:
            continue
        sha256 = there.sha256
        if sha256 is None and there.size == file.size:
            _, sha256 = remote.digest(file.path, earlier.commit, file.size)
        if there.size == file.size and sha256 == file.sha256:
            deleted.append(FileDigest(file.path, there.size, file.sha256))
        else:
            kept.append(file.path)
    return tuple(deleted), tuple(kept)


def _tag_change(
    upload: Upload, remote: Remote, head: Head, changes: bool, known: dict[str, str], *, partial: bool
) -> Literal["create", "keep"] | None:
    """What must be done about the tag; PublishError when it marks a commit that is not this release."""
    if upload.tag is None:
        return None
    if head.commit is None:
        return "create"
    marked = remote.tags().get(upload.tag)
    if marked is None:
        return "create"
    if partial:
        return None  # whether it marks this release cannot be known before all of it is made
    if not changes and (marked == head.commit or _holds(upload, remote.tree(marked), known)):
        return "keep"
    raise tag_taken(upload, remote.hub, marked, head.commit)


def _holds(upload: Upload, tree: Mapping[str, RemoteFile], known: dict[str, str]) -> bool:
    """Whether that tree has the upload's files; people may have written on the card since."""
    return all(
        file.path in tree and (file.path == CARD or is_same(file, tree[file.path], known)) for file in upload.files
    )


def tag_taken(upload: Upload, hub: Hub, marked: str, head: str) -> PublishError:
    """The error for a tag that marks another release."""
    return PublishError(
        f"the tag {upload.tag} already marks commit {marked}, which is not this release (main is at {head})",
        where=f"{upload.repo} on {hub.endpoint}",
        mend="A published tag is not moved. Give the release another one with `tag:`, or delete the tag on the Hub.",
    )


def _digests(files: tuple[UploadFile, ...] | list[UploadFile]) -> tuple[FileDigest, ...]:
    return tuple(FileDigest(file.path, file.size, file.sha256) for file in files)
