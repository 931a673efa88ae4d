"""The push: plan, upload, one commit, read back, tag. Stopped anywhere, it goes on from there when run again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hubforge.errors import PublishError, VerifyError
from hubforge.events import Note, Report
from hubforge.op import Hub, Metrics, Upload, UploadFile
from hubforge.publish._explain import HubError
from hubforge.publish._plan import PushPlan, is_same, plan, tag_taken
from hubforge.publish._remote import Remote, RemoteFile, has_xet
from hubforge.publish._sending import Meter, additions, changed, check_files

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_COMMITS = 6  # attempts at one commit, each planned afresh
_ALONE = 64 << 20  # bytes from which a file is sent by a call of its own, where the client tells no progress


def push(upload: Upload, hub: Hub, report: Report) -> Metrics:
    """Make the repository hold that upload; see `Publisher.push` for what comes back and what is raised."""
    check_files(upload)
    step = f"publish.{upload.target}"
    with Remote(hub, upload.repo, report=report, step=step) as remote:
        known: dict[str, str] = {}
        found = plan(upload, remote, known)
        created = not found.exists
        if created:
            remote.create(private=upload.private)
            found = plan(upload, remote, known)
        first, commit = found, found.parent
        for attempt in range(1, _COMMITS + 1):
            if not found.changes_files:
                commit = found.parent  # also: the commit whose answer was lost
                break
            operations, meter = _uploaded(found, upload, remote)
            try:
                commit = remote.commit(operations, upload.message.strip() or f"Publish {upload.target}", found.parent)
                meter.finish()
                break
            except HubError as error:
                if not (error.status == 412 or error.in_doubt) or attempt == _COMMITS:
                    raise
                if error.in_doubt:
                    remote.retry.pause(error, attempt - 1)
                found = _planned_again(found, upload, remote, known, error)
        if commit is None:
            raise PublishError("there is nothing to publish", where=step, mend="The upload holds no file.")
        if first.changes_files:
            _read_back(upload, first, commit, remote, known)
        if found.tag_change == "create":
            _tag(upload, remote, commit)
        pushed = [file.path for file in (*first.added, *first.replaced)]
        return {
            "repo": upload.repo,
            "commit": commit,
            "url": f"{remote.endpoint}/{upload.repo}",
            "pushed": pushed,
            "deleted": [file.path for file in first.deleted],
            "unchanged": len(first.unchanged),
            "bytes": first.upload_bytes,
            "tag": upload.tag,
            "created": created,
            "private": found.private,
        }


def _uploaded(
    found: PushPlan, upload: Upload, remote: Remote
) -> tuple[list[CommitOperationAdd | CommitOperationDelete], Meter]:
    """The operations of the commit that the plan asks for, with all large files uploaded; and what counted them."""
    from huggingface_hub import CommitOperationDelete

    by_path = {file.path: file for file in upload.files}
    files = [by_path[file.path] for file in (*found.added, *found.replaced)]
    card = next((file for file in files if file.path == "README.md"), None)
    if card is not None:
        remote.check_card(_text(card))
    xet = has_xet(remote.endpoint)
    meter = Meter(found.upload_bytes, remote.report, remote.step)
    adding = additions(files, meter, hashed=not xet)
    # By LFS the client takes five files at a time and our reader counts the bytes. xet reads the files itself and
    # tells nobody, so there every large file is a call of its own, to have something to show between them.
    alone = [one for one in adding if xet and one.upload_info.size >= _ALONE]
    together = [one for one in adding if not xet or one.upload_info.size < _ALONE]
    for batch in ([together] if together else []) + [[one] for one in alone]:
        remote.preupload(batch)
        for one in batch:
            file = by_path[one.path_in_repo]
            if one._should_ignore:
                raise PublishError(
                    f"{file.path} is named in the .gitignore of the repository, so the Hub would leave it out",
                    where=f"{upload.repo} on {remote.hub.endpoint}",
                    mend="Take that line out of .gitignore there.",
                )
            if one.upload_info.is_hashed and one.upload_info.sha256.hex() != file.sha256:
                raise changed(file)
            if one._upload_mode == "lfs":
                meter.at(file.path, file.size, whole=True)
    return [*adding, *(CommitOperationDelete(file.path, is_folder=False) for file in found.deleted)], meter


def _text(card: UploadFile) -> str:
    content = card.content if isinstance(card.content, bytes) else card.content.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PublishError(f"{card.path} is not UTF-8: {error}") from error


def _planned_again(
    before: PushPlan, upload: Upload, remote: Remote, known: dict[str, str], error: HubError
) -> PushPlan:
    """The plan against what is there now, after a commit that was refused as stale or whose answer was lost.

    Somebody else's commit to other files is no matter. One that touched a file of this push is: two releases are
    being published at once, and the second must not silently undo the first.
    """
    now = plan(upload, remote, known)
    if not now.changes_files:
        remote.report(Note(remote.step, "the commit is there, though its answer was lost"))
        return now

    def touched(plan: PushPlan) -> tuple[set[str], ...]:
        return tuple({file.path for file in files} for files in (plan.added, plan.replaced, plan.deleted))

    differing = {path for old, new in zip(touched(before), touched(now), strict=True) for path in old ^ new}
    if differing:
        some = ", ".join(sorted(differing)[:5]) + (" ..." if len(differing) > 5 else "")
        raise PublishError(
            f"somebody else published to this repository at the same time: {some} changed meanwhile",
            where=f"{upload.repo} on {remote.hub.endpoint}",
            mend="See what is there now; then run the same command again to publish on top of it.",
        ) from error
    if now.parent != before.parent:
        remote.report(Note(remote.step, f"main moved to {now.parent} meanwhile; committing on top of it"))
    return now


def _read_back(upload: Upload, done: PushPlan, commit: str, remote: Remote, known: dict[str, str]) -> None:
    """VerifyError unless the tree at that commit holds every file of the upload, and nothing that was to go."""
    tree = remote.tree(commit)
    faults = list(differences(upload.files, tree, known))
    faults += [f"{file.path}: was deleted, but is still there" for file in done.deleted if file.path in tree]
    if faults:
        raise VerifyError(
            f"commit {commit} does not hold what was pushed:\n  " + "\n  ".join(faults),
            where=f"{upload.repo} on {remote.hub.endpoint}",
            mend="Nothing was tagged. Run the same command again: it replaces what differs.",
        )


def differences(files: Iterable[UploadFile], tree: Mapping[str, RemoteFile], known: dict[str, str]) -> Iterable[str]:
    """One line for each file that is missing from the tree, or there with another size or content."""
    for file in files:
        there = tree.get(file.path)
        if there is None:
            yield f"{file.path}: missing"
        elif there.size != file.size:
            yield f"{file.path}: {there.size:,} bytes, but {file.size:,} were pushed"
        elif not is_same(file, there, known):
            yield f"{file.path}: sha256 {there.sha256 or 'unknown'}, but {file.sha256} was pushed"


def _tag(upload: Upload, remote: Remote, commit: str) -> None:
    assert upload.tag is not None
    try:
        remote.tag(upload.tag, commit)
    except HubError as error:
        if error.status != 409:
            raise
        marked = remote.tags().get(upload.tag)  # somebody was faster, or the answer to an earlier try was lost
        if marked != commit:
            raise tag_taken(upload, remote.hub, marked or "that is hidden", commit) from error
