"""One repository on a folder: what it holds at each commit, and which commit each name points to.

```
repo.json      visibility, gate, date of creation
tags.json      {"v1": {"message", "author", "date"}}: the tags that came with a message
refs.json      {"refs/heads/main": commit, "refs/tags/v1": ..., "refs/pr/1": ...}; replaced whole, never edited
commits/ID     JSON, never changed; ID is git's commit id
trees/ID       JSON rows of files, never changed; ID is git's tree id
blobs/ lfs/    contents, under git blob ids and sha256
discussions/N  JSON
incoming/      unfinished uploads; nothing in it counts
```
A commit exists once refs.json names it, and refs.json is replaced only after all else is on disk.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hubforge.hub.disk import locked, write_whole
from hubforge.hub.names import Kind, is_commit, prefix_of
from hubforge.hub.refusal import no_repository, no_revision
from hubforge.hub.storage.gitids import commit_id
from hubforge.hub.storage.objects import Objects
from hubforge.hub.storage.tree import Entry, Tree, changed_paths

HEADS, TAGS, PULLS = "refs/heads/", "refs/tags/", "refs/pr/"
MAIN = HEADS + "main"


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository. `date` is in seconds since 1970; `changed` lists the paths that differ from before."""

    id: str
    tree: str
    parents: tuple[str, ...]
    title: str
    message: str
    author: str
    date: int
    changed: tuple[str, ...]


@lru_cache(maxsize=1024)
def _read_commit(path: Path) -> Commit:
    data = json.loads(path.read_bytes())
    return Commit(**{**data, "parents": tuple(data["parents"]), "changed": tuple(data["changed"])})


_OVERHEAD = 10  # What a tree itself takes, in files.


class _Trees:
    """Trees read lately, so many files in all: a tree may hold one file or fifty thousand."""

    def __init__(self, limit: int) -> None:
        self._limit, self._files = limit, 0
        self._trees: OrderedDict[Path, Tree] = OrderedDict()
        self._guard = threading.Lock()

    def read(self, path: Path) -> Tree:
        with self._guard:
            if path in self._trees:
                self._trees.move_to_end(path)
                return self._trees[path]
        tree = Tree.from_bytes(path.read_bytes())
        with self._guard:
            if path not in self._trees:
                self._trees[path] = tree
                self._files += len(tree.files) + _OVERHEAD
            while self._files > self._limit and len(self._trees) > 1:
                self._files -= len(self._trees.popitem(last=False)[1].files) + _OVERHEAD
        return tree


_trees = _Trees(limit=20_000)  # About 8 MB: a file takes 400 bytes.


class Repository:
    """A repository and its files. Reading takes no lock; every change of refs.json happens under `lock()`."""

    def __init__(self, folder: Path, lock: Path, kind: Kind, id: str) -> None:
        self.folder, self.kind, self.id = folder, kind, id
        self._lock = lock
        self.objects = Objects(folder)

    @property
    def name(self) -> str:
        """The id with its prefix, as in addresses: `me/model`, `datasets/me/data`."""
        return prefix_of(self.kind) + self.id

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def lock(self) -> Any:
        return locked(self._lock)

    def about(self) -> dict[str, Any]:
        """repo.json: `visibility`, `gated`, `created` (seconds), `sdk`."""
        about: dict[str, Any] = self._read_json("repo.json")
        return about

    def set_about(self, changes: Mapping[str, Any]) -> None:
        with self.lock():
            self.write_json("repo.json", {**self.about(), **changes})

    @property
    def private(self) -> bool:
        return bool(self.about()["visibility"] == "private")

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            raise no_repository() from None

    def write_json(self, name: str, value: Any) -> None:
        write_whole(self.folder / name, json.dumps(value, ensure_ascii=False, indent=1).encode())

    # Names and commits.
    def refs(self) -> dict[str, str]:
        """The commit each full reference name points to."""
        refs: dict[str, str] = self._read_json("refs.json")
        return refs

    def set_refs(self, changes: Mapping[str, str | None]) -> None:
        """Point references elsewhere, or drop them (None), all at once. The caller holds the lock."""
        refs = {**self.refs(), **changes}
        self.write_json("refs.json", {name: commit for name, commit in sorted(refs.items()) if commit})

    def tag_notes(self) -> dict[str, dict[str, Any]]:
        """What was said of tags when they were made: `message`, `author`, `date` (seconds), by tag."""
        try:
            notes: dict[str, dict[str, Any]] = json.loads((self.folder / "tags.json").read_bytes())
            return notes
        except FileNotFoundError:
            return {}

    def set_tag(self, tag: str, commit: str | None, note: Mapping[str, Any] | None = None) -> None:
        """Make a tag, or drop it (None). The caller holds the lock."""
        notes = self.tag_notes()
        before = dict(notes)
        notes.pop(tag, None)
        if note:
            notes[tag] = dict(note)
        if notes != before:  # First: a note without its tag is shown nowhere.
            self.write_json("tags.json", notes)
        self.set_refs({TAGS + tag: commit})

    def branch(self, revision: str) -> str:
        """The full name of the branch or pull request that a revision names: the ones that can be committed to."""
        refs = self.refs()
        for name in (revision, HEADS + revision):
            if name in refs and name.startswith((HEADS, PULLS)):
                return name
        raise no_revision(revision)

    def find(self, revision: str) -> Commit:
        """The commit that a branch, tag, full reference, commit id or its first 7 or more digits names."""
        refs = self.refs()
        for name in (HEADS + revision, TAGS + revision, revision):
            if name in refs:
                return self.commit(refs[name])
        if is_commit(revision):
            return self.commit(revision)
        if 7 <= len(revision) < 40 and all(letter in "0123456789abcdef" for letter in revision):
            matches = list((self.folder / "commits").glob(revision + "*"))
            if len(matches) == 1:
                return self.commit(matches[0].name)
        raise no_revision(revision)

    def commit(self, id: str) -> Commit:
        path = self.folder / "commits" / id
        if not path.exists():  # It may be cached from a repository of this name that was deleted.
            raise no_revision(id)
        return _read_commit(path)

    def tree(self, commit: Commit) -> Tree:
        return _trees.read(self.folder / "trees" / commit.tree)

    def history(self, start: Commit) -> Iterator[Commit]:
        """A commit and its first parents, newest first."""
        commit = start
        while True:
            yield commit
            if not commit.parents:
                return
            commit = self.commit(commit.parents[0])

    def last_changes(self, start: Commit, paths: list[str]) -> dict[str, Commit]:
        """The newest commit that touched each of those files or folders."""
        found: dict[str, Commit] = {}
        wanted = set(paths)
        for commit in self.history(start):
            touched = set(commit.changed)
            for path in commit.changed:
                while "/" in path:
                    path = path.rpartition("/")[0]
                    touched.add(path)
            for path in wanted & touched:
                found[path] = commit
            wanted -= touched
            if not wanted:
                break
        return found

    def record(
        self, files: Mapping[str, Entry], parents: tuple[str, ...], author: str, title: str, message: str = ""
    ) -> Commit:
        """Write a commit of those files to disk; nothing points to it yet."""
        tree = Tree(files)
        before = self.tree(self.commit(parents[0])) if parents else Tree({})
        date = int(time.time())
        text = f"{title}\n\n{message}" if message else title
        id = commit_id(tree.id, parents, author, date, text)
        commit = Commit(id, tree.id, parents, title, message, author, date, tuple(changed_paths(before, tree)))
        if not (self.folder / "trees" / tree.id).exists():
            write_whole(self.folder / "trees" / tree.id, tree.to_bytes())
        write_whole(self.folder / "commits" / id, json.dumps(asdict(commit), ensure_ascii=False).encode())
        return commit

    def path_of(self, entry: Entry) -> Path:
        """Where the bytes of a file are."""
        return self.objects.lfs(entry.sha256) if entry.sha256 else self.objects.blob(entry.oid)

    def read(self, entry: Entry, limit: int) -> bytes:
        """At most `limit` bytes from the start of a file."""
        with self.path_of(entry).open("rb") as handle:
            return handle.read(limit)

    def used(self) -> int:
        """Bytes of stored contents, every version counted once."""
        return sum(path.stat().st_size for part in ("blobs", "lfs") for path in (self.folder / part).glob("*/*"))
