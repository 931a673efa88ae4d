"""What a security scanner would say of a repository's files. Nothing is scanned here: it is set, to try publishers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.shelf import Shelf
from hubforge.hub.storage.tree import Tree
from hubforge.hub.tokens import split_name

STATUSES: Final = ("unscanned", "queued", "safe", "caution", "suspicious", "unsafe", "error")  # The real Hub's.
_ISSUES: Final = ("caution", "suspicious", "unsafe")


def set_scan(folder: Path, repo: str, files: Mapping[str, str] | None, *, done: bool = True) -> None:
    """Say what a scan found in a repository: path -> status. The Hub that serves the folder tells it from then on.

    repo: `ns/name` or `datasets/ns/name`. Files not named are safe once the scan is `done`, and queued before.
    files=None: nothing is said of any, as by a Hub that scans nothing.
    """
    found = Shelf(folder).get(*split_name(repo))
    for path, status in (files or {}).items():
        if status not in STATUSES:
            raise ValueError(f"{path}: {status!r} is no status of a scan: {', '.join(STATUSES)}")
    with found.lock():
        if files is None:
            (found.folder / "scans.json").unlink(missing_ok=True)
        else:
            found.write_json("scans.json", {"done": done, "files": dict(files)})


class Scan:
    """The scan of one repository; falsy when none was set."""

    def __init__(self, repo: Repository) -> None:
        try:
            self._data: dict[str, Any] = json.loads((repo.folder / "scans.json").read_bytes())
        except (FileNotFoundError, Refusal):
            self._data = {}

    def __bool__(self) -> bool:
        return bool(self._data)

    def status(self, path: str) -> str:
        found: str = self._data["files"].get(path, "safe" if self._data["done"] else "queued")
        return found

    def of_file(self, path: str) -> dict[str, Any]:
        """`securityFileStatus`, as listings of files show it."""
        status = self.status(path)
        pickles = status if path.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")) else "unscanned"
        return {"status": status, "avScan": {"status": status}, "pickleImportScan": {"status": pickles}}

    def of_repository(self, tree: Tree) -> dict[str, Any]:
        """`securityRepoStatus`, as a repository's facts show it."""
        issues = [(path, self.status(path)) for path in tree.files]
        return {
            "scansDone": self._data["done"],
            "filesWithIssues": [{"path": path, "level": level} for path, level in issues if level in _ISSUES],
        }
