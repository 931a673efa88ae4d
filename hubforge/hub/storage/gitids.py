"""The identifiers git would give: of a file's content, of an LFS pointer, of folders, of a commit.

Source: git's object format, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects, and the LFS pointer file,
https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence


def _object_id(kind: str, body: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(body)}\0".encode() + body, usedforsecurity=False).hexdigest()


def blob_id(data: bytes) -> str:
    return _object_id("blob", data)


def pointer(sha256: str, size: int) -> bytes:
    """The small text that stands in git for an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def folder_ids(blobs: Mapping[str, str]) -> dict[str, str]:
    """The tree id of every folder, by path; `""` is the root, there even when nothing is in it.

    blobs: the blob id of every file, by path.
    """
    inside: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)  # folder -> name -> (mode, id)
    inside[""] = {}
    for path, oid in blobs.items():
        folder, _, name = path.rpartition("/")
        inside[folder][name] = ("100644", oid)
        while folder and folder not in inside.get(parent_of(folder), {}):
            inside.setdefault(parent_of(folder), {})
            folder = parent_of(folder)
    ids: dict[str, str] = {}
    for folder in sorted(inside, key=lambda path: path.count("/") if path else -1, reverse=True):
        # git sorts a folder as if its name ended in a slash.
        names = sorted(
            inside[folder], key=lambda name: name.encode() + (b"/" if inside[folder][name][0] == "40000" else b"")
        )
        body = b"".join(
            f"{inside[folder][name][0]} {name}\0".encode() + bytes.fromhex(inside[folder][name][1]) for name in names
        )
        ids[folder] = _object_id("tree", body)
        if folder:
            inside[parent_of(folder)][folder.rpartition("/")[2]] = ("40000", ids[folder])
    return ids


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def commit_id(tree: str, parents: Sequence[str], author: str, date: int, message: str) -> str:
    """A commit's id: a function of tree, parents, author, date (seconds since 1970, UTC) and message alone."""
    who = f"{author} <{author}@users.noreply.invalid> {date} +0000"
    lines = [f"tree {tree}", *(f"parent {parent}" for parent in parents), f"author {who}", f"committer {who}"]
    return _object_id("commit", ("\n".join(lines) + "\n\n" + message).encode())
