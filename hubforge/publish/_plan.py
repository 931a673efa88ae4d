"""What a push would do to one repository, found out without uploading: `publish --dry-run`, and the push itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from hubforge.errors import PublishError
from hubforge.events import Report, Warned, silent
from hubforge.op import FileDigest, Hub, Upload, UploadFile
from hubforge.publish._explain import HubError
from hubforge.publish._paths import path_fault, shown
from hubforge.publish._remote import Head, Remote, RemoteFile, Snapshot
from hubforge.publish._sending import check_files, git_oid
from hubforge.release import FILE_NAME, Release, TargetRecord

RELEASE_LIMIT = 32 << 20  # bytes; a release file holds the recipe, the lock and one line per file
_NEVER_DELETED = frozenset({".gitattributes"})


@dataclass(frozen=True)
class PushPlan:
    """One repository as it is, and what a push would change. Sizes in bytes.

    deleted: what an earlier release put there, this one no longer has, and nobody touched since. kept: the same, but
    changed by somebody since, and therefore left alone. foreign: how many other files there are; all left alone.
    """

    target: str
    repo: str
    folder: str | None
    exists: bool
    private: bool
    parent: str | None  # the commit it was planned against; None: nothing was ever committed
    added: tuple[FileDigest, ...] = ()
    replaced: tuple[FileDigest, ...] = ()
    deleted: tuple[FileDigest, ...] = ()
    unchanged: tuple[FileDigest, ...] = ()
    kept: tuple[str, ...] = ()
    foreign: int = 0
    tag: str | None = None
    tag_change: Literal["create", "keep"] | None = None

    @property
    def changes_files(self) -> bool:
        return bool(self.added or self.replaced or self.deleted)

    @property
    def changes(self) -> bool:
        """Whether a push would change anything at all."""
        return self.changes_files or not self.exists or self.tag_change == "create"

    @property
    def upload_bytes(self) -> int:
        """At most so many bytes are sent; what the Hub already stores under another name is not sent again."""
        return sum(file.size for file in (*self.added, *self.replaced))

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
            "parent": self.parent,
            "changes": self.changes,
            "upload_bytes": self.upload_bytes,
            "added": rows(self.added),
            "replaced": rows(self.replaced),
            "deleted": rows(self.deleted),
            "kept": list(self.kept),
            "unchanged": len(self.unchanged),
            "unchanged_bytes": sum(file.size for file in self.unchanged),
            "foreign": self.foreign,
            "tag": self.tag,
            "tag_change": self.tag_change,
        }


def plan_push(upload: Upload, hub: Hub, report: Report = silent) -> PushPlan:
    """What `push` would do with that upload now. Sends nothing; reads the tree, and the earlier release if it differs.

    PublishError for what would stop the push: a tag that marks another commit, a public repository that the recipe
    calls private, a local file that is not what was made.
    """
    check_files(upload)
    with Remote(hub, upload.repo, report=report, step=f"publish.{upload.target}") as remote:
        return plan(upload, remote)


def plan(upload: Upload, remote: Remote, known: dict[str, str] | None = None, seen: Snapshot | None = None) -> PushPlan:
    """`plan_push` over an open repository; `known` keeps the git oids that were computed, by path.

    seen: what main holds, when that was looked at just now.
    """
    known = {} if known is None else known
    seen = seen or remote.look()
    head, tree = seen.head, seen.tree
    if head is None:
        return PushPlan(
            upload.target,
            upload.repo,
            upload.folder,
            exists=False,
            private=upload.private,
            parent=None,
            added=_digests(upload.files),
            tag=upload.tag,
            tag_change="create" if upload.tag else None,
        )
    check_visibility(upload, head, remote)
    added = [file for file in upload.files if file.path not in tree]
    present = [file for file in upload.files if file.path in tree]
    unchanged = [file for file in present if is_same(file, tree[file.path], known)]
    same = {file.path for file in unchanged}
    replaced = [file for file in present if file.path not in same]
    deleted, kept = _leftovers(upload, remote, head, tree, same)
    gone = {file.path for file in deleted}
    ours = {file.path for file in upload.files}
    return PushPlan(
        upload.target,
        upload.repo,
        upload.folder,
        exists=True,
        private=head.private,
        parent=head.commit,
        added=_digests(added),
        replaced=_digests(replaced),
        deleted=deleted,
        unchanged=_digests(unchanged),
        kept=kept,
        foreign=sum(path not in ours and path not in gone for path in tree),
        tag=upload.tag,
        tag_change=_tag_change(upload, remote, head, bool(added or replaced or deleted), known),
    )


def is_same(file: UploadFile, there: RemoteFile, known: dict[str, str]) -> bool:
    """Whether that remote file has the bytes of this local one. Large files are not read: their sha256 is known."""
    if there.size != file.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == file.sha256
    if file.path not in known:
        known[file.path] = git_oid(file)
    return there.oid == known[file.path]


def check_visibility(upload: Upload, head: Head, remote: Remote) -> None:
    """PublishError when everybody could read what the recipe calls private."""
    if upload.private and not head.private:
        raise PublishError(
            "the recipe says `private: true`, but the repository is public",
            where=f"{upload.repo} on {remote.hub.endpoint}",
            mend=f"Make it private at {remote.endpoint}/{upload.repo}/settings, or take `private` out of the recipe.",
        )


def release_path(folder: str | None) -> str:
    """Where the release file of a folder (or of a whole repository) lies."""
    return f"{folder}/{FILE_NAME}" if folder else FILE_NAME


def find_target(release: Release, repo: str, folder: str | None) -> TargetRecord | None:
    """The target of a release that is that repository and folder; names the file gives itself come first."""
    fitting = [target for target in release.targets if target.folder == folder]
    named = [target for target in fitting if target.name == release.target]
    return next(iter(named or [target for target in fitting if target.repo == repo]), None)


def _leftovers(
    upload: Upload, remote: Remote, head: Head, tree: Mapping[str, RemoteFile], same: set[str]
) -> tuple[tuple[FileDigest, ...], tuple[str, ...]]:
    """What an earlier release of hubforge put there and this upload has not: untouched since, and touched since."""
    path = release_path(upload.folder)
    if head.commit is None or path not in tree or path in same:
        return (), ()
    try:
        earlier = Release.model_validate_json(remote.read(path, head.commit, RELEASE_LIMIT))
    except HubError:
        raise  # the Hub did not answer, which says nothing of the file
    except (ValidationError, PublishError):
        text = f"{path} of {upload.repo} is not a release file that can be read, so nothing is deleted there"
        remote.report(Warned(remote.step, text))
        return (), ()
    target = find_target(earlier, upload.repo, upload.folder)
    ours = {file.path for file in upload.files}
    prefix = f"{upload.folder}/" if upload.folder else ""
    deleted: list[FileDigest] = []
    kept: list[str] = []
    for file in target.files if target else ():
        there = tree.get(file.path)
        if there is None or file.path in ours or not file.path.startswith(prefix) or path_fault(file.path):
            continue
        if file.path.rpartition("/")[2] in _NEVER_DELETED:
            continue
        sha256 = there.sha256
        if sha256 is None and there.size == file.size:
            _, sha256 = remote.digest(file.path, head.commit, file.size)
        if there.size == file.size and sha256 == file.sha256:
            deleted.append(FileDigest(file.path, there.size, file.sha256))
        else:
            kept.append(shown(file.path))
    return tuple(deleted), tuple(kept)


def _tag_change(
    upload: Upload, remote: Remote, head: Head, changes: bool, known: dict[str, str]
) -> Literal["create", "keep"] | None:
    """What must be done about the tag; PublishError when it marks a commit that is not this release."""
    if upload.tag is None:
        return None
    if head.commit is None:
        return "create"
    marked = remote.tags().get(upload.tag)
    if marked is None:
        return "create"
    if not changes and (marked == head.commit or _holds(upload, remote.tree(marked), known)):
        return "keep"
    raise tag_taken(upload, remote.hub, marked, head.commit)


def _holds(upload: Upload, tree: Mapping[str, RemoteFile], known: dict[str, str]) -> bool:
    return all(file.path in tree and is_same(file, tree[file.path], known) for file in upload.files)


def tag_taken(upload: Upload, hub: Hub, marked: str, head: str) -> PublishError:
    """The error for a tag that marks another release."""
    return PublishError(
        f"the tag {upload.tag} already marks commit {marked}, which is not this release (main is at {head})",
        where=f"{upload.repo} on {hub.endpoint}",
        mend="A published tag is not moved. Give the release another one with `tag:`, or delete the tag on the Hub.",
    )


def _digests(files: tuple[UploadFile, ...] | list[UploadFile]) -> tuple[FileDigest, ...]:
    return tuple(FileDigest(file.path, file.size, file.sha256) for file in files)
