"""What a publish set out to do and what came of it, on disk before and after each remote action.

One file per recipe and Hub, beside the store: JSON lines, only ever appended to, each on disk before the next step.

    {"at": "2026-05-01T12:00:00Z", "run": "9f2c", "action": "merge", "repo": "me/poet", "state": "intent", "number": 3}
    {"at": "2026-05-01T12:00:01Z", "run": "9f2c", "action": "merge", "repo": "me/poet", "state": "done", "number": 3}

An intent without an outcome is what a killed run, or a lost answer, leaves: the action may have been done or not. The
journal never decides that: the Hub is looked at, and the journal says where to look and what is ours to finish: a
repository that we made and that nobody may see yet, a pull request that we opened. A line that was torn by a power loss
is passed over. Nothing in it is secret, and tokens are taken out of everything that is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from hubforge.errors import HubforgeError, StoreError
from hubforge.publisher import Hub

State = Literal["intent", "done", "failed"]
Entry = Mapping[str, Any]
_LONG = 4 << 20  # bytes from which a journal with nothing unfinished is put aside and a new one begun


def journal_path(root: Path, recipe: str, hub: Hub) -> Path:
    """Where the journal of that recipe and Hub lies in a store."""
    named = re.sub(r"[^A-Za-z0-9._-]+", "-", hub.name or re.sub(r"^https?://", "", hub.endpoint))[:60]
    digest = hashlib.sha256((hub.name or hub.endpoint).encode()).hexdigest()[:8]
    return root / "publish" / recipe / f"{named}-{digest}.jsonl"


class Journal:
    """The entries of earlier runs, and a place for those of this one. path=None: kept in memory only."""

    def __init__(self, path: Path | None, hub: Hub) -> None:
        self.path, self.hub, self.run = path, hub, secrets.token_hex(4)
        self.entries: list[Entry] = read_journal(path) if path else []
        self._guard = threading.Lock()

    def record(self, action: str, repo: str, state: State, **facts: Any) -> None:
        """Append one entry; when this returns it is on disk. StoreError when it cannot be written."""
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = {"at": at, "run": self.run, "action": action, "repo": repo, "state": state, **facts}
        line = json.dumps(entry, ensure_ascii=False)
        for secret in self.hub.secrets():
            line = line.replace(secret, "***")
        with self._guard:
            self.entries.append(json.loads(line))
            if self.path is not None:
                _append(self.path, line)

    @contextmanager
    def doing(self, action: str, repo: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Around a remote action: its intent before, and its outcome after, with what is put into the yielded dict.

        An error of the Hub is an outcome; whatever else ends it (Ctrl-C, a kill) leaves the intent alone.
        """
        self.record(action, repo, "intent", **facts)
        found: dict[str, Any] = {}
        try:
            yield found
        except HubforgeError as error:
            status = getattr(error, "status", None)
            # Only a refusal says that nothing was done. An answer that makes no sense may follow on what was.
            refused = isinstance(status, int) and 400 <= status < 500 and not getattr(error, "doubted", False)
            doubt = not refused
            self.record(action, repo, "failed", **facts, error=error.what[:500], in_doubt=doubt)
            raise
        self.record(action, repo, "done", **{**facts, **found})

    def is_hidden_by_us(self, repo: str) -> bool:
        """Whether we made that repository, so that nobody sees it before it is verified, and never opened it."""
        last = None
        for entry in self.entries:
            if entry.get("repo") != repo:
                continue
            made = entry.get("action") == "create" and entry.get("hidden") is True
            opened = entry.get("action") in ("open", "leave") and entry.get("state") == "done"
            if made or opened:
                last = made and not (entry.get("state") == "failed" and entry.get("in_doubt") is False)
        return bool(last)

    def pulls(self, repo: str) -> set[int]:
        """The pull requests that we opened there, and neither merged nor closed as far as the journal knows."""
        found: set[int] = set()
        for entry in self.entries:
            if entry.get("repo") != repo or entry.get("state") != "done":
                continue
            number = entry.get("number")
            if isinstance(number, int):
                (found.add if entry.get("action") == "propose" else found.discard)(number)
        return found

    def titles(self, repo: str) -> set[str]:
        """Titles of pull requests that we set out to open there: of some the answer, and so the number, was lost."""
        return {
            str(entry["title"])
            for entry in self.entries
            if entry.get("repo") == repo and entry.get("action") == "propose" and "title" in entry
        }

    def did(self, action: str, repo: str, **facts: Any) -> bool:
        """Whether the last such action there ended well, with those facts."""
        for entry in reversed(self.entries):
            if entry.get("action") == action and entry.get("repo") == repo and entry.get("state") != "intent":
                return entry.get("state") == "done" and all(entry.get(name) == value for name, value in facts.items())
        return False

    def is_unfinished(self) -> bool:
        """Whether an earlier publish began and never came to its end."""
        for entry in reversed(self.entries):
            if entry.get("action") == "release":
                return entry.get("state") == "intent"
        return False

    @contextmanager
    def held(self, patience: float, told: Callable[[str], None]) -> Iterator[Journal]:
        """The journal, for one process at a time: a second publish from this store waits, and then reads it anew."""
        if self.path is None:
            yield self
            return
        lock = self.path.with_suffix(".lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = lock.open("a+")
        except OSError as error:
            raise _unwritable(lock, error) from error
        with handle:
            _wait_for(handle.fileno(), lock, patience, told)
            self.entries = read_journal(self.path)
            if self.path.exists() and self.path.stat().st_size > _LONG and not self.is_unfinished():
                self.path.replace(self.path.with_suffix(".old.jsonl"))
            yield self


def read_journal(path: Path) -> list[Entry]:
    """Every entry that is whole; [] when there is no journal."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"the journal of this publish cannot be read: {error.strerror}", where=str(path)) from error
    found: list[Entry] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # a torn line, or the empty one at the end
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _append(path: Path, line: str) -> None:
    try:
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as handle:
            torn = False
            if handle.seek(0, os.SEEK_END):
                handle.seek(-1, os.SEEK_END)
                torn = handle.read(1) != b"\n"
            # One write: what another process appends cannot come in between.
            handle.write((b"\n" if torn else b"") + line.encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        if new and os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"the journal of this publish cannot be written: {error.strerror or error}",
        where=str(path),
        mend="Without it a publish that is interrupted could not be finished, so nothing was sent.",
    )


def _wait_for(handle: int, path: Path, patience: float, told: Callable[[str], None]) -> None:
    """Take the lock; the process that holds it loses it when it ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks: two publishes at once are decided by the Hub alone
        return
    until, waiting = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= until:
                raise StoreError(
                    "another publish of this recipe has been under way all the time",
                    where=str(path),
                    mend="Wait for it to end, or give it more time with --patience.",
                ) from None
            if not waiting:
                told("another publish of this recipe is under way; waiting for it to end")
                waiting = True
            time.sleep(0.2)
