"""Whether a repository holds what its release file says: the digests of both, compared. The file is not trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.tree import Entry, Tree
from hubforge.sections import digest, is_by_hand, split

FILE_NAME: Final = "hubforge.release.json"
_CARD: Final = "README.md"
_MAX_FILE, _MAX_FILES, _MAX_RELEASES = 8 << 20, 10_000, 20
_MAX_HASHED: Final = 64 << 20  # Bytes read for one page. LFS files are not read: their digest is their name.
_NAMED: Final = 5  # Differing files that are named.


@dataclass(frozen=True)
class ReleaseStatus:
    """One release file, against the tree it lies in."""

    path: str
    name: str = ""
    files: int = 0
    differ: tuple[str, ...] = ()  # Paths that are missing or have other bytes.
    unchecked: int = 0  # Too much to read for a page.
    problem: str = ""  # Why the file says nothing.

    def __str__(self) -> str:
        if self.problem:
            return f"{self.path}: {self.problem}"
        head = f"release {self.name}, {self.files} file{'s' if self.files != 1 else ''}, "
        if self.differ:
            more = len(self.differ) - _NAMED
            return f"{head}digests differ: {', '.join(self.differ[:_NAMED])}{f' and {more} more' if more > 0 else ''}"
        return head + ("digests match" + (f", {self.unchecked} not checked" if self.unchecked else ""))


def releases_of(repo: Repository, tree: Tree) -> list[ReleaseStatus]:
    """The release at the root and those of folders, as mask repositories have one for each model."""
    paths = [path for path in tree.files if path == FILE_NAME or path.endswith("/" + FILE_NAME)]
    paths.sort(key=lambda path: (path.count("/"), path))
    budget = [_MAX_HASHED]
    return [_status(repo, tree, path, budget) for path in paths[:_MAX_RELEASES]]


def _status(repo: Repository, tree: Tree, path: str, budget: list[int]) -> ReleaseStatus:
    entry = tree.files[path]
    if entry.size > _MAX_FILE:
        return ReleaseStatus(path, problem="too large to be read here")
    try:
        name, files, sections = _read(repo.path_of(entry))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return ReleaseStatus(path, problem="not a release file")
    differ, unchecked = [], 0
    for each, (size, sha256) in sorted(files.items()):
        held = tree.files.get(each)
        if each == _CARD and sections and held is not None and held.size <= _MAX_FILE:
            differ += [] if _is_as_written(repo.path_of(held), sections) else [each]
        elif held is None or held.size != size:
            differ.append(each)
        elif (digest := _digest(repo, held, budget)) is None:
            unchecked += 1
        elif digest != sha256:
            differ.append(each)
    return ReleaseStatus(path, name, len(files), tuple(differ), unchecked)


@lru_cache(maxsize=128)
def _read(path: Path) -> tuple[str, Mapping[str, tuple[int, str]], Mapping[str, str]]:
    """The release's name; of the target that this repository is: size and sha256 of each file, and of card sections."""
    with path.open("rb") as handle:
        data: Any = json.loads(handle.read(_MAX_FILE))
    targets = {target["name"]: target for target in data["targets"]}
    files = targets[data["target"]]["files"]
    if not isinstance(files, list) or len(files) > _MAX_FILES:
        raise ValueError("files")
    wanted = {str(file["path"]): (int(file["size"]), str(file["sha256"])) for file in files}
    written = (targets[data["target"]].get("card") or {}).get("sections") or {}
    return str(data["name"])[:100], wanted, {str(name): str(sha256) for name, sha256 in written.items()}


def _is_as_written(card: Path, wanted: Mapping[str, str]) -> bool:
    """Whether the sections that hubforge wrote are as they were; people may write around them."""
    text = card.read_text(encoding="utf-8", errors="replace")
    if is_by_hand(text):
        return True
    found = {piece.name: piece for piece in split(text)[1] if piece.name}
    return all(
        name in found and (found[name].by_hand or (digest(found[name].text) == sha256 and not found[name].damaged))
        for name, sha256 in wanted.items()
    )


def _digest(repo: Repository, entry: Entry, budget: list[int]) -> str | None:
    """The sha256 of a stored file; None when reading it would be too much."""
    if entry.sha256:
        return entry.sha256
    if budget[0] < entry.size:
        return None
    budget[0] -= entry.size
    return _sha256(repo.path_of(entry))


@lru_cache(maxsize=8192)
def _sha256(path: Path) -> str:
    """Of a stored file. Its name is its content's, so that it holds for good."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
