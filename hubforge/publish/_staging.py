"""One repository of a release: put where nobody sees it, verified there, and then brought to main.

A repository that is new is made private and gets its commit on main; promoting makes it public. One that exists gets a
pull request, opened by the commit itself; promoting merges it. What was found there before decides which:

    look -> unchanged ------------------------------------------------> (tags)
         -> new, or made by us and never opened: create -> commit -> verify -> scan | -> open -> tags
         -> exists: find our pull request, or commit to a new one -> verify -> scan | -> merge -> read back -> tags

The bar stands for the barrier: `_release` promotes only when every repository has come that far. Any step may be the
last of a killed run; the next one looks again and enters at the first that is not done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from hubforge.errors import HubforgeError, PublishError, VerifyError
from hubforge.events import Note, Warned
from hubforge.op import Metrics
from hubforge.publish._explain import HubError
from hubforge.publish._journal import Journal
from hubforge.publish._plan import PushPlan
from hubforge.publish._pulls import Pull, UnsafeError, await_scan, close_pull, merge_pull, open_pulls, set_private
from hubforge.publish._push import (
    ATTEMPTS,
    Job,
    changes_files,
    commit_on_main,
    nothing_to_publish,
    planned_again,
    put_tags,
    read_back,
    uploaded,
)
from hubforge.publish._remote import Remote, RemoteFile, Snapshot
from hubforge.publisher import Hub

_UNTOUCHED = "Nothing was published: main is as it was."
_SAME = frozenset({".gitattributes"})  # the Hub's own, which it may rewrite with any commit


@dataclass(eq=False)
class Staging:
    """A repository on its way; `stage` and `promote` are called once each, with the repository open."""

    job: Job
    journal: Journal
    fingerprint: str  # of the whole release; written into the commit, so that people can tell what a staged one is
    known: dict[str, str] = field(default_factory=dict)
    first: tuple[PushPlan, ...] = ()  # as it was planned at the beginning
    plans: tuple[PushPlan, ...] = ()  # as it was planned last
    created: bool = False
    hidden: bool = False  # on main of a repository that nobody sees yet
    pull: int = 0
    commit: str | None = None

    def look(self, remote: Remote, seen: Snapshot | None = None) -> bool:
        """Plan; whether there is anything to do."""
        self.first = self.plans = self.job.plans(remote, self.known, seen)
        self.commit = self.plans[0].parent
        self.hidden = self.plans[0].private and self.journal.is_hidden_by_us(self.job.repo)
        if self.plans[0].exists and not self.plans[0].private and self.journal.is_hidden_by_us(self.job.repo):
            self.journal.record("open", self.job.repo, "done", why="found public")
        unfinished = self.hidden or self.journal.pulls(self.job.repo)
        return any(plan.changes for plan in self.plans) or bool(unfinished)

    def unchanged(self, hub: Hub) -> list[Metrics]:
        """The result where there was nothing to do."""
        if self.commit is None:
            raise nothing_to_publish(self.job)
        return self.job.result(self.first, self.commit, hub.endpoint.rstrip("/"), created=False)

    def stage(self, remote: Remote) -> None:
        """Have it all on the Hub, unseen and verified. Raises PublishError or VerifyError, with main as it was."""
        if not self.plans[0].exists:
            self._create(remote)
        if self.hidden or self.plans[0].parent is None:
            self.commit, self.plans = commit_on_main(self.job, self.plans, remote, self.known, self.journal)
            if self.commit is None:
                raise nothing_to_publish(self.job)
            self._verify(remote, self.commit, others=None)
        elif changes_files(self.plans):
            self._propose(remote)
            if not changes_files(self.plans):
                self.commit = self.plans[0].parent

    def _create(self, remote: Remote) -> None:
        with self.journal.doing("create", self.job.repo, hidden=True):
            remote.create(private=True)
        self.created = True
        self.plans = tuple(self.job.plans(remote, self.known))
        self.hidden = self.plans[0].exists and self.plans[0].private
        if self.plans[0].exists and not self.hidden:  # somebody else made it in this very moment
            self.journal.record("leave", self.job.repo, "done", why="it is public")

    def _propose(self, remote: Remote) -> None:
        """A pull request that holds what main is to hold, verified: one of ours that is open, or a new one."""
        ours = self._ours(remote)
        for attempt in range(1, ATTEMPTS + 1):
            main = remote.tree(self.plans[0].parent or "main")
            if self._adopt(remote, ours, main):
                return
            operations, meter = uploaded(self.job, self.plans, remote)
            parent = self.plans[0].parent
            try:
                with self.journal.doing("propose", self.job.repo, parent=parent, title=self.job.message) as found:
                    commit, number = remote.commit(
                        operations, self.job.message, parent, description=self._description(), pull=True
                    )
                    found |= {"commit": commit, "number": number or None}
            except HubError as error:
                if error.status == 403:
                    raise _no_proposing(error) from error
                if not (error.status == 412 or error.in_doubt) or attempt == ATTEMPTS:
                    raise
                if error.in_doubt:
                    remote.retry.pause(error, attempt - 1)
                    ours = self._ours(remote)
                self.plans = planned_again(self.plans, self.job, remote, self.known, error)
                if not changes_files(self.plans):
                    return
                continue
            if not number:  # the client found nothing to commit: somebody was faster
                self.plans = planned_again(self.plans, self.job, remote, self.known, None)
                if not changes_files(self.plans):
                    return
                continue
            meter.finish()
            self.pull, self.commit = number, commit
            try:
                self._verify(remote, commit, others=main, revision=Pull(self.pull, "", "").revision)
            except (VerifyError, UnsafeError):
                # A scan that is not done, and a Hub that does not answer, say nothing against it: it stays, for later.
                self._close(remote, self.pull, "What is here is not what was to be published.")
                raise
            return

    def _description(self) -> str:
        return f"Staged by hubforge, to be verified and then merged by it. Release {self.fingerprint}."

    def _ours(self, remote: Remote) -> list[Pull]:
        """The open pull requests that are ours: known to the journal, or of our account and with a title of ours.

        The title alone proves nothing: anybody may open one, and push to it after it was verified.
        """
        found = open_pulls(remote)
        journalled = self.journal.pulls(self.job.repo)
        titles = {self.job.message, *self.journal.titles(self.job.repo)}
        titled = [pull for pull in found if pull.title in titles and pull.number not in journalled]
        # The token of a job has no account of its own.
        me = str(remote.whoami().get("name") or "") if titled and remote.hub.credentials is None else ""
        ours = [pull for pull in found if pull.number in journalled or (pull in titled and me and pull.author == me)]
        for gone in journalled - {pull.number for pull in found}:
            self.journal.record("close", self.job.repo, "done", number=gone, why="it is not open any more")
        for pull in ours:
            if pull.number not in journalled:
                self.journal.record("propose", self.job.repo, "done", number=pull.number, why="found on the Hub")
        return ours

    def _adopt(self, remote: Remote, ours: Sequence[Pull], main: Mapping[str, RemoteFile]) -> bool:
        """Take the first of these that holds exactly what is wanted, on top of main as it is."""
        for pull in ours:
            head = remote.head(pull.revision)
            if head is None or head.commit is None:
                continue
            try:
                self._verify(remote, head.commit, others=main, revision=pull.revision)
            except VerifyError:
                continue
            except UnsafeError:
                self._close(remote, pull.number, "The Hub's security scan calls it unsafe.")
                raise
            self.pull, self.commit = pull.number, head.commit
            remote.report(Note(remote.step, f"going on with {pull.revision}, which an earlier publish left"))
            return True
        return False

    def _verify(
        self, remote: Remote, commit: str, *, others: Mapping[str, RemoteFile] | None, revision: str | None = None
    ) -> None:
        """VerifyError unless that commit holds the job, and of all else what `others` holds; then the scan."""
        tree = remote.tree(commit)
        read_back(self.job, self.plans, commit, tree, remote, self.known, _UNTOUCHED)
        if others is not None:
            touched = {file.path for file in self.job.files} | {
                file.path for plan in self.plans for file in plan.deleted
            }
            strange = sorted(
                path for path in (tree.keys() | others.keys()) - touched - _SAME if tree.get(path) != others.get(path)
            )
            if strange:
                raise VerifyError(
                    f"commit {commit} changes files that were to be left alone: {', '.join(strange[:5])}",
                    where=f"{self.job.repo} on {remote.hub.endpoint}",
                    mend=_UNTOUCHED,
                )
        await_scan(remote, revision or commit, frozenset(file.path for file in self.job.files))
        self.journal.record("verify", self.job.repo, "done", commit=commit)
        remote.report(Note(remote.step, f"staged and verified: {revision or 'a repository nobody sees yet'}"))

    def promote(self, remote: Remote) -> list[Metrics]:
        """Bring it to main, or open the repository; then the tags. Everything was verified before."""
        if self.hidden:
            self._open(remote)
        elif self.pull:
            self._merge(remote)
        if self.commit is None:
            raise nothing_to_publish(self.job)
        put_tags(self.job, self.plans, self.commit, remote, self.journal)
        self._tidy(remote)
        private = self.plans[0].private and not (self.hidden and not self.job.private)
        return self.job.result(
            self.first, self.commit, remote.endpoint, created=self.created, private=private, pull=self.pull or None
        )

    def _open(self, remote: Remote) -> None:
        """Let everybody see a repository that we made; unless the recipe, or what else lies in it, forbids."""
        if self.job.private:
            self.journal.record("leave", self.job.repo, "done", why="the recipe says private")
            return
        seen = remote.look()
        if seen.head is None or seen.head.commit != self.commit:
            raise PublishError(
                "somebody else committed to the new repository before it was made public",
                where=f"{self.job.repo} on {remote.hub.endpoint}",
                mend="It stays private. See what is there now; then run the same command again.",
            )
        strange = sorted(seen.tree.keys() - {file.path for file in self.job.files} - _SAME)
        if strange:
            text = f"it stays private: it holds files that this release did not put there ({', '.join(strange[:5])})"
            remote.report(Warned(remote.step, text))
            self.journal.record("leave", self.job.repo, "done", why="files of somebody else")
            self.hidden = False
            return
        if seen.head.private:
            with self.journal.doing("open", self.job.repo):
                set_private(remote, private=False)
                head = remote.head()
                if head is None or head.private:
                    raise PublishError(
                        "the Hub took the request to make the repository public, but it is still private",
                        where=f"{self.job.repo} on {remote.hub.endpoint}",
                        mend="Run the same command again.",
                    )
        else:  # the answer that it is done was lost
            self.journal.record("open", self.job.repo, "done")

    def _merge(self, remote: Remote) -> None:
        """Merge, and read main back; what moved main meanwhile is looked at, and staged again where it must be."""
        for attempt in range(1, ATTEMPTS + 1):
            seen = remote.look()
            if seen.head is None or seen.head.commit != self.plans[0].parent:
                self.plans = planned_again(self.plans, self.job, remote, self.known, None)
                if not changes_files(self.plans):
                    self.commit = self.plans[0].parent
                    return
                self._propose(remote)
                if not changes_files(self.plans):
                    self.commit = self.plans[0].parent
                    return
            error: HubError | None = None
            try:
                with self.journal.doing("merge", self.job.repo, number=self.pull):
                    merge_pull(remote, self.pull)
            except HubError as failed:
                # 400 and 409: somebody merged or closed it, or main changed the same files. Looking tells which.
                if not (failed.in_doubt or failed.status in (400, 409, 412)) or attempt == ATTEMPTS:
                    raise
                error = failed
                if failed.in_doubt:
                    remote.retry.pause(failed, attempt - 1)
            seen = remote.look()
            if error is None and seen.head is not None and seen.head.commit is not None:
                self.commit = seen.head.commit
                read_back(self.job, self.plans, self.commit, seen.tree, remote, self.known, "Nothing was tagged.")
                return
            now = self.job.plans(remote, self.known, seen)
            if not changes_files(now):
                self.plans, self.commit = now, now[0].parent
                return
            if error is not None and not error.in_doubt:
                # Perhaps it was closed: what is still wanted is staged anew.
                self.plans = planned_again(self.plans, self.job, remote, self.known, error)
                self._propose(remote)

    def _close(self, remote: Remote, number: int, comment: str) -> None:
        with self.journal.doing("close", self.job.repo, number=number):
            close_pull(remote, number, comment)

    def _tidy(self, remote: Remote) -> None:
        """Close what earlier publishes left open: staged releases never pile up."""
        for number in sorted(self.journal.pulls(self.job.repo) - {self.pull}):
            try:
                self._close(remote, number, "A later publish took its place.")
            except HubforgeError as error:
                remote.report(Warned(remote.step, f"refs/pr/{number} could not be closed: {error.what}"))
        if self.pull in self.journal.pulls(self.job.repo):  # merged by somebody else, or its answer was lost
            with suppress(HubforgeError):
                self._close(remote, self.pull, "Its content is on main.")


def _no_proposing(error: HubError) -> PublishError:
    return PublishError(
        error.what,
        where=error.where,
        mend=f"{error.mend} Or commit straight to main with --no-stage, which needs no pull request.",
    )
