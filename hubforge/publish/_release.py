"""A release over all its repositories: staged, verified, and only then brought to where people see it.

    plan      every repository is looked at; where nothing is to be done, nothing is sent
    stage     one after the other: large files (what the Hub stores already is not sent), then one commit where nobody
              sees it, every digest compared, the Hub's own scan awaited: see `_staging`
    ========  only when all are good
    promote   one after the other: merge or make public, read main back, tag
    links     the collection each joins, and the page that it supersedes

Before the line nothing that anybody sees has changed, and an error leaves it so. After it every repository goes from
the old release to the whole new one by one action of the Hub. The Hub has no action for several repositories, so that a
publish that is killed between two of them leaves some old and some new, each whole; the next run promotes the rest.

Where a run begins is never taken from the journal alone. Each looks at the Hub; the journal says what on it is ours.

| what was cut short      | what the next run finds                        | and does                              |
|-------------------------|------------------------------------------------|---------------------------------------|
| an upload               | objects that the Hub stores already            | sends only the others                 |
| creating a repository   | it is there, private, and ours by the journal  | goes on                               |
| the commit of a new one | main holds the release                         | verifies, makes it public             |
| opening a pull request  | one of ours that is open and holds the release | verifies, merges it                   |
| a merge                 | main holds the release                         | closes the request, sets the tag      |
| a tag, collection, link | it is there, or not                            | sets what is missing                  |
| a release given up      | our pull requests that hold something else     | closes them after the next merge      |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hubforge.errors import PublishError
from hubforge.events import Note, Report, Started
from hubforge.op import Metrics
from hubforge.publish._journal import Journal
from hubforge.publish._links import join_collection, supersede
from hubforge.publish._push import Job, push_straight
from hubforge.publish._remote import Remote, Snapshot
from hubforge.publish._retry import Retry
from hubforge.publish._sending import check_files
from hubforge.publish._staging import Staging
from hubforge.publisher import Hub, Upload


def jobs_of(uploads: Sequence[Upload]) -> list[Job]:
    """One job a repository, in the order they are first named. Folders of one repository share its card: the last's."""
    by_repo: dict[str, list[Upload]] = {}
    for upload in uploads:
        by_repo.setdefault(upload.repo, []).append(upload)
    jobs = []
    for repo, those in by_repo.items():
        last: dict[str, Upload] = {file.path: upload for upload in those for file in upload.files}
        kept = [replace(one, files=tuple(file for file in one.files if last[file.path] is one)) for one in those]
        jobs.append(Job(repo, tuple(kept)))
    return jobs


def fingerprint(uploads: Sequence[Upload]) -> str:
    """16 hex digits that stand for what is published: every repository, path and digest."""
    digest = hashlib.sha256()
    for upload in uploads:
        for file in upload.files:
            digest.update(f"{upload.repo}\0{file.path}\0{file.sha256}\n".encode())
    return digest.hexdigest()[:16]


def publish_release(
    uploads: Sequence[Upload],
    hub: Hub,
    report: Report,
    journal: Journal,
    *,
    seen: Mapping[str, Snapshot] | None = None,
    stage: bool = True,
) -> list[Metrics]:
    """Publish all of them, or, when anything is wrong with one, none. What `Publisher.push` returns, for each.

    seen: what main of a repository holds, where that was looked at just now. stage=False: each is committed straight
    to its main, one after the other. Raises PublishError and VerifyError; run again, it goes on from where it was.
    """
    with Remote(hub, "", report=report, step="publish"):  # one client for all repositories
        return _publish(uploads, hub, report, journal, seen or {}, stage)


def _publish(
    uploads: Sequence[Upload],
    hub: Hub,
    report: Report,
    journal: Journal,
    seen: Mapping[str, Snapshot],
    stage: bool,
) -> list[Metrics]:
    for upload in uploads:
        check_files(upload)
    retry = Retry(report, "", hub.patience)
    mark = fingerprint(uploads)
    jobs = [Staging(job, journal, mark) for job in jobs_of(uploads)]

    def opened(one: Staging) -> Remote:
        return Remote(hub, one.job.repo, report=report, step=f"publish.{one.job.uploads[0].target}", retry=retry)

    todo = []
    for number, one in enumerate(jobs, 1):
        with opened(one) as remote:
            report(Started(remote.step, f"to {remote.endpoint}/{one.job.repo}", number, len(jobs)))
            if one.look(remote, seen.get(one.job.repo)):
                todo.append(one)
    links = [upload for upload in uploads if _unlinked(upload, journal)]
    if todo or links or journal.is_unfinished():
        journal.record("release", "", "intent", release=mark, stage=stage)
    results: dict[str, list[Metrics]] = {}
    for one in todo:
        if stage or one.hidden:  # what was begun unseen is finished unseen
            with opened(one) as remote:
                one.stage(remote)
    for one in jobs:
        if one not in todo:
            results[one.job.repo] = one.unchanged(hub)
            continue
        with opened(one) as remote:
            results[one.job.repo] = (
                one.promote(remote) if stage or one.hidden else push_straight(one.job, remote, journal)
            )
    for upload in links:
        one = next(one for one in jobs if one.job.repo == upload.repo)
        with opened(one) as remote:
            if upload.collection is not None:
                join_collection(remote, upload.collection, private=one.job.private, journal=journal)
            for old in upload.supersedes:
                supersede(hub, old, upload.repo, journal, remote)
    if journal.is_unfinished():
        journal.record("release", "", "done", release=mark)
        if not todo and not links:
            report(Note("publish", "an earlier publish was cut short; all of it is there"))
    by_target = {
        upload.target: result
        for one in jobs
        for upload, result in zip(one.job.uploads, results[one.job.repo], strict=True)
    }
    return [by_target[upload.target] for upload in uploads]


def _unlinked(upload: Upload, journal: Journal) -> bool:
    """Whether something is to be done once it is public, as far as the journal knows."""
    if upload.repo in upload.supersedes:
        raise PublishError(f"{upload.repo} cannot supersede itself", where=f"publish.{upload.target}")
    joins = upload.collection is not None and not journal.did("collect", upload.repo, collection=upload.collection)
    return joins or any(not journal.did("supersede", old, new=upload.repo) for old in upload.supersedes)
