"""Files that are whole or absent: atomic writes, folders made durable, and one writer at a time."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; does nothing where folders cannot be opened (Windows)."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes, *, scratch: Path | None = None) -> None:
    """Write a file so that a reader, or a machine that lost power, sees all of it or what was there before.

    scratch: a folder on the same file system for the unfinished file; the target's own folder by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = (scratch or path.parent) / f".{secrets.token_hex(8)}.part"
    try:
        with part.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


_held: dict[str, threading.Lock] = {}
_held_guard = threading.Lock()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock named by `path` against every other thread and, where the system has flock, process."""
    with _held_guard:
        within = _held.setdefault(str(path), threading.Lock())
    with within:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as handle:
            if sys.platform != "win32":
                fcntl.flock(handle, fcntl.LOCK_EX)  # Released when the file is closed, or the process killed.
            yield
