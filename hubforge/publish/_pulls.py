"""Pull requests, visibility and the scan of one repository: what staging asks of the Hub besides commits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubforge.errors import PublishError, shown
from hubforge.events import Note, Warned
from hubforge.publish._explain import HubError
from hubforge.publish._remote import Remote

_POLLS = (2.0, 4.0, 8.0, 15.0, 30.0)  # seconds between two looks at a scan; the last again and again


class UnsafeError(PublishError):
    """The Hub's scan found something in what was staged."""


@dataclass(frozen=True)
class Pull:
    number: int
    title: str
    author: str

    @property
    def revision(self) -> str:
        return f"refs/pr/{self.number}"


def open_pulls(remote: Remote) -> list[Pull]:
    """The pull requests of a repository that are open, the newest first."""

    def listed() -> list[Pull]:
        found = remote.api.get_repo_discussions(
            remote.repo, repo_type="model", discussion_type="pull_request", discussion_status="open"
        )
        return [Pull(one.num, one.title, one.author) for one in found]

    return remote.call("list the pull requests", listed)


def pull_status(remote: Remote, number: int) -> str:
    """open, draft, closed or merged."""
    details = remote.call(
        "look at the pull request",
        lambda: remote.api.get_discussion_details(remote.repo, discussion_num=number, repo_type="model"),
    )
    return str(details.status)


def merge_pull(remote: Remote, number: int) -> None:
    """Merge it; HubError with status 409 or 400 where it cannot be merged, `in_doubt` where it may have been."""
    remote.call(
        "merge the pull request",
        lambda: remote.api.merge_pull_request(remote.repo, discussion_num=number, repo_type="model"),
        resend=False,
    )


def close_pull(remote: Remote, number: int, comment: str) -> None:
    """Close it; fine when it is closed or merged already."""
    try:
        remote.call(
            "close the pull request",
            lambda: remote.api.change_discussion_status(
                remote.repo, discussion_num=number, new_status="closed", comment=comment, repo_type="model"
            ),
        )
    except HubError as error:
        if error.status not in (400, 404, 409) or pull_status(remote, number) in ("open", "draft"):
            raise


def set_private(remote: Remote, *, private: bool) -> None:
    """Say who may see the repository. Saying it twice does no harm."""
    remote.call(
        f"make the repository {'private' if private else 'public'}",
        lambda: remote.api.update_repo_settings(remote.repo, private=private, repo_type="model"),
    )


def await_scan(remote: Remote, revision: str, ours: frozenset[str]) -> None:
    """Return once the Hub's scan of that revision found nothing, or at once where the Hub reports none.

    UnsafeError for a file of ours that it calls so; PublishError when patience ends before the scan does.
    """
    for poll in range(10_000):
        scan = _scan(remote, revision)
        if scan is None:
            return
        levels = {
            str(one.get("path")): str(one.get("level"))
            for one in scan.get("filesWithIssues") or ()
            if isinstance(one, Mapping)
        }
        unsafe = sorted(path for path, level in levels.items() if level == "unsafe" and path in ours)
        where = f"{remote.repo} on {remote.hub.endpoint}"
        if unsafe:
            raise UnsafeError(
                f"the Hub's security scan calls {', '.join(map(shown, unsafe[:5]))} unsafe",
                where=where,
                mend="Nothing was published: main is as it was. See what the scan found on the staged files' page.",
            )
        if scan.get("scansDone"):
            for path, level in sorted(levels.items()):
                remote.report(Warned(remote.step, f"the Hub's security scan says {shown(level)} of {shown(path)}"))
            return
        seconds = _POLLS[min(poll, len(_POLLS) - 1)]
        if not remote.retry.has_patience_for(seconds):
            raise PublishError(
                f"the Hub's security scan of the staged files is not done after {remote.retry.waited:.0f} s of waiting",
                where=where,
                mend="Nothing was published yet. Run the same command again later, or give it time: --patience 2h."
                " --no-stage publishes without waiting for a scan.",
            )
        if poll == 0:
            remote.report(Note(remote.step, "waiting for the Hub's security scan"))
        remote.retry.wait(seconds, "waiting for the Hub's security scan")


def _scan(remote: Remote, revision: str) -> Mapping[str, Any] | None:
    """What the Hub says of its scan of a revision, or None when it says nothing."""
    info = remote.call(
        "ask for the security scan",
        lambda: remote.api.model_info(remote.repo, revision=revision, securityStatus=True),
    )
    status = getattr(info, "security_repo_status", None)
    return status if isinstance(status, Mapping) and "scansDone" in status else None
