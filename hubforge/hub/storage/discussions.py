"""Discussions and pull requests: a JSON file each; a pull request is also the reference refs/pr/N."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.committing import Change, Delete, Put, check_head, commit_on
from hubforge.hub.storage.diffs import unified
from hubforge.hub.storage.facts import iso
from hubforge.hub.storage.repository import MAIN, PULLS, Commit, Repository
from hubforge.hub.storage.tree import changed_paths

Discussion = dict[str, Any]
_STATUSES = ("draft", "open", "closed")


def numbers(repo: Repository) -> list[int]:
    return sorted(int(path.name) for path in (repo.folder / "discussions").glob("*") if path.name.isdigit())


def read(repo: Repository, number: int) -> Discussion:
    if not (repo.folder / "discussions" / str(number)).exists():
        raise Refusal(404, f"No discussion {number}")
    found: Discussion = repo._read_json(f"discussions/{number}")
    return found


def _write(repo: Repository, discussion: Discussion) -> None:
    repo.write_json(f"discussions/{discussion['num']}", discussion)


def _event(kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": secrets.token_hex(12),
        "type": kind,
        "createdAt": iso(time.time()),
        "author": {"name": author},
        "data": data,
    }


def _comment(author: str, text: str) -> dict[str, Any]:
    return _event("comment", author, {"edited": False, "hidden": False, "latest": {"raw": text}})


def open_discussion(
    repo: Repository, author: str, title: str, description: str, *, pull_request: bool, status: str | None = None
) -> Discussion:
    """A new discussion, or a draft pull request that starts at main."""
    with repo.lock():
        return _open(repo, author, title, description, repo.refs()[MAIN] if pull_request else None, status)


def _open(
    repo: Repository, author: str, title: str, description: str, start: str | None, status: str | None = None
) -> Discussion:
    """The caller holds the lock. start: the commit of a pull request."""
    number = max(numbers(repo), default=0) + 1
    discussion: Discussion = {
        "num": number,
        "title": title,
        "status": status or ("draft" if start else "open"),
        "author": author,
        "created": int(time.time()),
        "pull_request": start is not None,
        "start": start,
        "events": [_comment(author, description)] if description else [],
        "merge_commit": None,
    }
    _write(repo, discussion)
    if start:
        repo.set_refs({f"{PULLS}{number}": start})
    return discussion


def commit_as_pull_request(
    repo: Repository,
    revision: str,
    changes: Sequence[Change],
    *,
    author: str,
    title: str,
    message: str,
    expected: str | None,
) -> tuple[Commit, int]:
    """A commit on a new pull request against main, and that request's number."""
    with repo.lock():
        start = repo.find(revision)
        check_head(start, expected)
        new = commit_on(repo, start, changes, author, title, message)
        discussion = _open(repo, author, title, message, start.id, "open")
        repo.set_refs({f"{PULLS}{discussion['num']}": new.id})
        return new, discussion["num"]


def comment(repo: Repository, number: int, author: str, text: str) -> dict[str, Any]:
    with repo.lock():
        discussion = read(repo, number)
        event = _comment(author, text)
        discussion["events"].append(event)
        _write(repo, discussion)
    return event


def set_status(repo: Repository, number: int, author: str, status: str, text: str = "") -> dict[str, Any]:
    if status not in _STATUSES:
        raise Refusal(400, f"Invalid status {status!r}: open, closed or draft")
    with repo.lock():
        discussion = read(repo, number)
        if discussion["status"] == "merged":
            raise Refusal(400, "This pull request is merged")
        if text:
            discussion["events"].append(_comment(author, text))
        event = _event("status-change", author, {"status": status})
        discussion["events"].append(event)
        discussion["status"] = status
        _write(repo, discussion)
    return event


def set_title(repo: Repository, number: int, author: str, title: str) -> dict[str, Any]:
    with repo.lock():
        discussion = read(repo, number)
        event = _event("title-change", author, {"from": discussion["title"], "to": title})
        discussion["events"].append(event)
        discussion["title"] = title
        _write(repo, discussion)
    return event


def conflicts(repo: Repository, discussion: Discussion) -> list[str]:
    """Paths that both main and the pull request changed, differently, since it began."""
    start, head, main = _three(repo, discussion)
    theirs = set(changed_paths(repo.tree(start), repo.tree(main)))
    head_files, main_files = repo.tree(head).files, repo.tree(main).files
    return [
        path
        for path in changed_paths(repo.tree(start), repo.tree(head))
        if path in theirs and head_files.get(path) != main_files.get(path)
    ]


def _three(repo: Repository, discussion: Discussion) -> tuple[Commit, Commit, Commit]:
    refs = repo.refs()
    return (
        repo.commit(discussion["start"]),
        repo.commit(refs[f"{PULLS}{discussion['num']}"]),
        repo.commit(refs[MAIN]),
    )


def merge(repo: Repository, number: int, author: str, text: str = "") -> Commit:
    """The pull request's changes as one commit on main; 409 when main changed the same files meanwhile."""
    with repo.lock():
        discussion = read(repo, number)
        if not discussion["pull_request"]:
            raise Refusal(400, f"Discussion {number} is no pull request")
        if discussion["status"] not in ("open", "draft"):
            raise Refusal(400, f"Pull request {number} is {discussion['status']}")
        if discussion["status"] == "draft":
            raise Refusal(400, f"Pull request {number} is a draft: open it first")
        clash = conflicts(repo, discussion)
        if clash:
            raise Refusal(409, f"Merge conflict in {', '.join(clash[:5])}")
        start, head, main = _three(repo, discussion)
        after = repo.tree(head).files
        present = repo.tree(main).files
        changes: list[Change] = [
            Put(after[path]) if path in after else Delete(path)
            for path in changed_paths(repo.tree(start), repo.tree(head))
            if path in after or path in present
        ]
        new = commit_on(repo, main, changes, author, f"{discussion['title']} (#{number})", text)
        # The reference moves first: killed in between, the request stays open and merging it again changes nothing.
        if new != main:
            repo.set_refs({MAIN: new.id})
        if text:
            discussion["events"].append(_comment(author, text))
        discussion["events"].append(_event("status-change", author, {"status": "merged"}))
        discussion |= {"status": "merged", "merge_commit": new.id, "merged_onto": main.id}
        _write(repo, discussion)
        return new


def brief(repo: Repository, discussion: Discussion) -> dict[str, Any]:
    """A discussion as lists of them show it."""
    return {
        "num": discussion["num"],
        "title": discussion["title"],
        "status": discussion["status"],
        "author": {"name": discussion["author"]},
        "repo": {"name": repo.id, "type": repo.kind[:-1]},
        "isPullRequest": discussion["pull_request"],
        "createdAt": iso(discussion["created"]),
        "numComments": sum(event["type"] == "comment" for event in discussion["events"]),
    }


def details(repo: Repository, discussion: Discussion, *, with_diff: bool) -> dict[str, Any]:
    """A discussion whole: events, and for a pull request its commits, conflicts and, if asked, its patch."""
    seen = {**brief(repo, discussion), "events": list(discussion["events"])}
    if not discussion["pull_request"]:
        return seen
    start, head, _ = _three(repo, discussion)
    seen["changes"] = {"base": MAIN, "mergeCommitId": discussion["merge_commit"]}
    seen["filesWithConflicts"] = [] if discussion["status"] == "merged" else conflicts(repo, discussion)
    commits = []
    for commit in repo.history(head):
        if commit.id == start.id:
            break
        event = _event("commit", commit.author, {"subject": commit.title, "oid": commit.id})
        commits.append({**event, "id": commit.id[:24], "createdAt": iso(commit.date)})
    seen["events"] = sorted([*seen["events"], *commits], key=lambda event: str(event["createdAt"]))
    if with_diff:
        seen["diff"] = unified(repo, repo.tree(start), repo.tree(head))
    return seen
