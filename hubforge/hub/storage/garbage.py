"""What nothing leads to any more: commits that no reference reaches, and contents that no such commit holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hubforge.errors import StoreError
from hubforge.hub.storage import discussions
from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.shelf import Shelf

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class Collected:
    """What `collect` removed, or would have."""

    repositories: int = 0
    commits: int = 0
    files: int = 0  # Contents: blobs and LFS objects.
    bytes: int = 0

    def __add__(self, other: Collected) -> Collected:
        return Collected(
            self.repositories + other.repositories,
            self.commits + other.commits,
            self.files + other.files,
            self.bytes + other.bytes,
        )


def collect(folder: Path, *, older: float = DAY, dry_run: bool = False) -> Collected:
    """Remove what is in no repository's history, of everything that nobody touched for `older` seconds.

    Safe while the Hub serves and while another `collect` runs: each repository's lock is held, so its references stand
    still; contents uploaded for a commit that is yet to come are younger than `older`, or were touched when the Hub
    said that it has them already.
    """
    if not (folder / "hub.json").exists():
        raise StoreError(
            "the folder is not a Hub's", where=str(folder), mend="Name the folder that `hub serve` serves."
        )
    shelf = Shelf(folder)
    total = Collected()
    for repo in list(shelf.all()):
        with repo.lock():
            if (repo.folder / "repo.json").exists():  # Deleted or moved meanwhile.
                total += _collect(repo, time.time() - older, dry_run)
    if not dry_run:
        shelf.sweep(max(older, HOUR))  # An upload that is under way may stand still for a while.
    return total


def _collect(repo: Repository, limit: float, dry_run: bool) -> Collected:
    """The caller holds the lock."""
    for path in list(repo.folder.rglob(".*.dead")):  # A `collect` was killed here.
        path.replace(path.with_name(path.name[1:].removesuffix(".dead")))
    for path in list(repo.folder.rglob(".*.part")):
        _remove(path, min(limit, time.time() - HOUR), dry_run)
    commits, trees, contents = reachable(repo)
    gone = Collected(repositories=1)
    for path in _files(repo, "commits"):
        if path.name not in commits and _remove(path, limit, dry_run):
            gone += Collected(commits=1)
    for path in _files(repo, "trees"):
        if path.name not in trees:
            _remove(path, limit, dry_run)
    for part in ("blobs", "lfs"):
        for path in _files(repo, f"{part}/*"):
            if path.name not in contents and (size := _remove(path, limit, dry_run)):
                gone += Collected(files=1, bytes=size[0])
    return gone


def _files(repo: Repository, pattern: str) -> Iterator[Path]:
    for path in list(repo.folder.glob(f"{pattern}/*")):
        if not path.name.startswith("."):  # A file being written.
            yield path


def reachable(repo: Repository) -> tuple[set[str], set[str], set[str]]:
    """Commits, trees and contents (git blob ids and sha256s) that references and pull requests lead to."""
    starts = set(repo.refs().values())
    for number in discussions.numbers(repo):
        found = discussions.read(repo, number)
        starts |= {found[key] for key in ("start", "merge_commit", "merged_onto") if found.get(key)}
    commits: set[str] = set()
    trees: set[str] = set()
    contents: set[str] = set()
    while starts:
        commit = repo.commit(starts.pop())
        commits.add(commit.id)
        starts |= set(commit.parents) - commits
        if commit.tree not in trees:
            trees.add(commit.tree)
            for entry in repo.tree(commit).files.values():
                contents.add(entry.etag)
    return commits, trees, contents


def _remove(path: Path, limit: float, dry_run: bool) -> tuple[int] | None:
    """Unlink a file last touched before `limit`; its size. None: it is younger, and stays."""
    try:
        seen = path.stat()
        if seen.st_mtime >= limit:
            return None
        if dry_run:
            return (seen.st_size,)
        # Aside first: who finds it there now and touches it has either done so already, which shows in its time, or
        # finds it missing and uploads it again.
        aside = path.with_name(f".{path.name.lstrip('.')}.dead")
        path.rename(aside)
        if aside.stat().st_mtime >= limit:
            aside.replace(path)
            return None
        aside.unlink()
        return (seen.st_size,)
    except FileNotFoundError:
        return None
