"""All files of one commit, and the folders between them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from hubforge.hub.storage.gitids import folder_ids, parent_of, pointer


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: bytes, git blob id (of the pointer, for LFS), and the content's sha256 when it is in LFS."""

    path: str
    size: int
    oid: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """What names the content: the sha256 in LFS, else the git blob id."""
        return self.sha256 or self.oid

    def as_json(self) -> dict[str, object]:
        """The entry as tree listings and paths-info show it."""
        seen: dict[str, object] = {"type": "file", "oid": self.oid, "size": self.size, "path": self.path}
        if self.sha256:
            seen["lfs"] = {
                "oid": self.sha256,
                "size": self.size,
                "pointerSize": len(pointer(self.sha256, self.size)),
            }
        return seen


class Tree:
    """The files of a commit by path. Never changed once made."""

    def __init__(self, files: Mapping[str, Entry]) -> None:
        self.files = dict(sorted(files.items()))

    @cached_property
    def folders(self) -> dict[str, str]:
        """git's tree id of every folder, by path; `""` is the root."""
        return folder_ids({path: entry.oid for path, entry in self.files.items()})

    @property
    def id(self) -> str:
        return self.folders[""]

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        inside: dict[str, list[str]] = {folder: [] for folder in self.folders}
        for path in sorted([*self.files, *(folder for folder in self.folders if folder)]):
            inside[parent_of(path)].append(path)
        return inside

    def below(self, folder: str, *, recursive: bool) -> list[str]:
        """Paths of files and folders in a folder, sorted; of all below it when recursive. KeyError: no such folder."""
        if not recursive:
            return self._children[folder]
        paths = sorted([*self.files, *(path for path in self.folders if path)])
        if not folder:
            return paths
        _ = self._children[folder]
        return [path for path in paths if path.startswith(folder + "/")]

    def to_bytes(self) -> bytes:
        rows = [[entry.path, entry.size, entry.oid, entry.sha256] for entry in self.files.values()]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Tree:
        return cls({path: Entry(path, size, oid, sha256) for path, size, oid, sha256 in json.loads(data)})


def changed_paths(before: Tree, after: Tree) -> list[str]:
    """Paths added, removed or given other content, sorted."""
    paths: Iterable[str] = before.files.keys() | after.files.keys()
    return sorted(path for path in paths if _identity(before.files.get(path)) != _identity(after.files.get(path)))


def _identity(entry: Entry | None) -> str | None:
    return entry.oid if entry else None
