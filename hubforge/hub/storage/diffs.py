"""What changed between two trees, as text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.tree import Entry, Tree, changed_paths
from hubforge.hub.storage.uploadmode import is_text

_LIMIT = 200_000  # Bytes of each side; difflib is quadratic in the worst case.
_LINES = 4000


@dataclass(frozen=True)
class FileDiff:
    """One changed file. `lines` is a unified diff without its two header lines; None when either side is not text."""

    path: str
    before: Entry | None
    after: Entry | None
    lines: list[str] | None

    @property
    def verb(self) -> str:
        return "added" if self.before is None else "deleted" if self.after is None else "changed"


def diff(repo: Repository, before: Tree, after: Tree) -> Iterator[FileDiff]:
    for path in changed_paths(before, after):
        old, new = before.files.get(path), after.files.get(path)
        texts = [_lines(repo, entry) for entry in (old, new)]
        lines = None
        if texts[0] is not None and texts[1] is not None:
            lines = list(difflib.unified_diff(texts[0], texts[1], lineterm=""))[2:]
        yield FileDiff(path, old, new, lines)


def _lines(repo: Repository, entry: Entry | None) -> list[str] | None:
    if entry is None:
        return []
    if entry.sha256 or entry.size > _LIMIT:
        return None
    data = repo.read(entry, _LIMIT)
    if not is_text(data, whole=True):
        return None
    lines = data.decode().split("\n")
    if lines[-1]:
        lines[-1] += "\n\\ No newline at end of file"  # As git says it.
    else:
        lines.pop()
    return lines if len(lines) <= _LINES else None


def unified(repo: Repository, before: Tree, after: Tree) -> str:
    """All of it as one patch, with git's headers."""
    out: list[str] = []
    for change in diff(repo, before, after):
        out.append(f"diff --git a/{change.path} b/{change.path}")
        old = f"a/{change.path}" if change.before else "/dev/null"
        new = f"b/{change.path}" if change.after else "/dev/null"
        if change.lines is None:
            out.append(f"Binary files {old} and {new} differ")
        else:
            out += [f"--- {old}", f"+++ {new}", *change.lines]
    return "\n".join(out) + ("\n" if out else "")
