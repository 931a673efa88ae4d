"""The pieces of a push to one repository: plan, upload, one commit, read back, tag; and all of them, straight to main.

Stopped anywhere, it goes on from there when run again. `_staging` puts them together so that main moves last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubforge.errors import PublishError, VerifyError
from hubforge.events import Note, Report
from hubforge.op import Metrics
from hubforge.publish._client import has_xet
from hubforge.publish._explain import HubError
from hubforge.publish._journal import Journal
from hubforge.publish._plan import PushPlan, is_same, plan, tag_taken
from hubforge.publish._remote import Remote, RemoteFile, Snapshot
from hubforge.publish._sending import Meter, additions, changed, check_files
from hubforge.publisher import Hub, Upload, UploadFile

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

ATTEMPTS = 6  # at one commit or merge, each planned afresh
_ALONE = 64 << 20  # bytes from which a file is sent by a call of its own, where the client tells no progress


@dataclass(frozen=True)
class Job:
    """One repository and all that is pushed to it, in one commit: one upload, or one for each of its folders."""

    repo: str
    uploads: tuple[Upload, ...]

    @property
    def private(self) -> bool:
        return any(upload.private for upload in self.uploads)

    @property
    def message(self) -> str:
        """The first line of the commit."""
        return self.uploads[0].message.strip() or f"Publish {self.uploads[0].target}"

    @property
    def files(self) -> tuple[UploadFile, ...]:
        return tuple(file for upload in self.uploads for file in upload.files)

    def plans(self, remote: Remote, known: dict[str, str], seen: Snapshot | None = None) -> tuple[PushPlan, ...]:
        """What each upload would change, of one look at the repository."""
        seen = seen or remote.look()
        return tuple(plan(upload, remote, known, seen) for upload in self.uploads)

    def result(self, first: Sequence[PushPlan], commit: str, endpoint: str, **more: object) -> list[Metrics]:
        """What `Publisher.push` gives back, for each upload; `first` is what was planned at the beginning."""
        return [
            {
                "repo": self.repo,
                "commit": commit,
                "url": f"{endpoint}/{self.repo}",
                "pushed": [file.path for file in (*plan.added, *plan.replaced)],
                "deleted": [file.path for file in plan.deleted],
                "unchanged": len(plan.unchanged),
                "bytes": plan.upload_bytes,
                "tag": upload.tag,
                "private": plan.private,
                **more,
            }
            for upload, plan in zip(self.uploads, first, strict=True)
        ]


def push(upload: Upload, hub: Hub, report: Report) -> Metrics:
    """Make main hold that upload, at once; see `Publisher.push` for what comes back and what is raised."""
    check_files(upload)
    with Remote(hub, upload.repo, report=report, step=f"publish.{upload.target}") as remote:
        return push_straight(Job(upload.repo, (upload,)), remote, Journal(None, hub))[0]


def push_straight(job: Job, remote: Remote, journal: Journal, seen: Snapshot | None = None) -> list[Metrics]:
    """One commit on main, read back, then the tags: what `--no-stage` does for each repository."""
    known: dict[str, str] = {}
    plans = job.plans(remote, known, seen)
    created = not plans[0].exists
    if created:
        with journal.doing("create", job.repo, hidden=False):
            remote.create(private=job.private)
        plans = job.plans(remote, known)
    first = plans
    commit, plans = commit_on_main(job, plans, remote, known, journal)
    if commit is None:
        raise nothing_to_publish(job)
    if changes_files(first):
        read_back(job, plans, commit, remote.tree(commit), remote, known, "Nothing was tagged.")
    put_tags(job, plans, commit, remote, journal)
    return job.result(first, commit, remote.endpoint, created=created)


def changes_files(plans: Iterable[PushPlan]) -> bool:
    return any(plan.changes_files for plan in plans)


def planned_files(plans: Iterable[PushPlan]) -> tuple[UploadFile, ...]:
    """What the repository is to hold by those plans: the card in it has what people wrote, unlike the job's."""
    return tuple(file for found in plans for file in found.upload.files)


def nothing_to_publish(job: Job) -> PublishError:
    return PublishError("there is nothing to publish", where=job.repo, mend="The upload holds no file.")


def commit_on_main(
    job: Job, plans: tuple[PushPlan, ...], remote: Remote, known: dict[str, str], journal: Journal
) -> tuple[str | None, tuple[PushPlan, ...]]:
    """The commit at main that holds the uploads, made if need be; and the plans that it was made by.

    A refusal as stale, or a lost answer, is answered by looking at what is there now.
    """
    for attempt in range(1, ATTEMPTS + 1):
        if not changes_files(plans):
            return plans[0].parent, plans  # also: the commit whose answer was lost
        operations, meter = uploaded(job, plans, remote)
        try:
            with journal.doing("commit", job.repo, parent=plans[0].parent) as found:
                found["commit"], _ = remote.commit(operations, job.message, plans[0].parent)
            meter.finish()
            return found["commit"], plans
        except HubError as error:
            if not (error.status == 412 or error.in_doubt) or attempt == ATTEMPTS:
                raise
            if error.in_doubt:
                remote.retry.pause(error, attempt - 1)
            plans = planned_again(plans, job, remote, known, error)
    raise AssertionError("the loop returns or raises")


def uploaded(
    job: Job, plans: Sequence[PushPlan], remote: Remote
) -> tuple[list[CommitOperationAdd | CommitOperationDelete], Meter]:
    """The operations of the commit that the plans ask for, with all large files uploaded; and what counted them."""
    from huggingface_hub import CommitOperationDelete

    by_path = {file.path: file for file in planned_files(plans)}
    files = [by_path[file.path] for found in plans for file in (*found.added, *found.replaced)]
    card = next((file for file in files if file.path == "README.md"), None)
    if card is not None:
        remote.check_card(_text(card))
    xet = has_xet(remote.endpoint)
    sizes = {file.path: file.size for file in files}
    meter = Meter(sum(sizes.values()), remote.report, remote.step, sizes)
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
                    where=f"{job.repo} on {remote.hub.endpoint}",
                    mend="Take that line out of .gitignore there.",
                )
            if one.upload_info.is_hashed and one.upload_info.sha256.hex() != file.sha256:
                raise changed(file)
            if one._upload_mode == "lfs":
                meter.at(file.path, file.size, whole=True)
    gone = [CommitOperationDelete(file.path, is_folder=False) for found in plans for file in found.deleted]
    return [*adding, *gone], meter


def _text(card: UploadFile) -> str:
    content = card.content if isinstance(card.content, bytes) else card.content.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PublishError(f"{card.path} is not UTF-8: {error}") from error


def planned_again(
    before: Sequence[PushPlan], job: Job, remote: Remote, known: dict[str, str], error: HubError | None
) -> tuple[PushPlan, ...]:
    """The plans against what is there now, after a commit that was refused as stale or whose answer was lost.

    Somebody else's commit to other files is no matter. One that touched a file of this push is: two releases are
    being published at once, and the second must not silently undo the first.
    """
    now = job.plans(remote, known)
    if not changes_files(now):
        remote.report(Note(remote.step, "what was to be pushed is there: by a lost answer, or by somebody else"))
        return now

    def touched(plans: Sequence[PushPlan]) -> tuple[set[str], ...]:
        def paths(kind: str) -> set[str]:
            return {file.path for plan in plans for file in getattr(plan, kind)}

        return paths("added"), paths("replaced"), paths("deleted")

    differing = {path for old, new in zip(touched(before), touched(now), strict=True) for path in old ^ new}
    if differing:
        some = ", ".join(sorted(differing)[:5]) + (" ..." if len(differing) > 5 else "")
        raise PublishError(
            f"somebody else published to this repository at the same time: {some} changed meanwhile",
            where=f"{job.repo} on {remote.hub.endpoint}",
            mend="See what is there now; then run the same command again to publish on top of it.",
        ) from error
    if now[0].parent != before[0].parent:
        remote.report(Note(remote.step, f"main moved to {now[0].parent} meanwhile; going on from there"))
    return now


def read_back(
    job: Job,
    done: Sequence[PushPlan],
    commit: str,
    tree: Mapping[str, RemoteFile],
    remote: Remote,
    known: dict[str, str],
    state: str,
) -> None:
    """VerifyError unless that tree holds every file of the job and nothing that was to go. state: what was not done."""
    faults = list(differences(planned_files(done), tree, known))
    faults += [
        f"{file.path}: was deleted, but is still there" for plan in done for file in plan.deleted if file.path in tree
    ]
    if faults:
        raise VerifyError(
            f"commit {commit} does not hold what was pushed:\n  " + "\n  ".join(faults),
            where=f"{job.repo} on {remote.hub.endpoint}",
            mend=f"{state} Run the same command again: it replaces what differs.",
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


def put_tags(job: Job, plans: Sequence[PushPlan], commit: str, remote: Remote, journal: Journal) -> None:
    """The tags that the plans ask for, on that commit. A tag that marks another commit is an error, never moved."""
    for upload, found in zip(job.uploads, plans, strict=True):
        if found.tag_change != "create" or upload.tag is None:
            continue
        with journal.doing("tag", job.repo, tag=upload.tag, commit=commit):
            refused = None
            try:
                remote.tag(upload.tag, commit)
            except HubError as error:
                if error.status != 409:  # somebody was faster, or the answer to an earlier try was lost
                    raise
                refused = error
            marked = remote.tags().get(upload.tag)
            if marked is None:
                raise PublishError(
                    f"the Hub took the tag {upload.tag}, but does not have it",
                    where=f"{job.repo} on {remote.hub.endpoint}",
                    mend="Run the same command again.",
                )
            if marked != commit:
                raise tag_taken(upload, remote.hub, marked, commit) from refused
