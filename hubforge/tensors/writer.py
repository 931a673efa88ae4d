"""Write a laid-out checkpoint in any order, each piece straight to its place; digest it meanwhile; resume after a kill.

While a file is incomplete its name ends in `.partial`, so a torn one is never taken for whole. A journal lists the
finished pieces with a checksum of each; after a kill a piece counts as finished only if its bytes still match, so
neither a lost write nor a torn journal line can pass.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubforge.errors import HubforgeError, StoreError
from hubforge.tensors.layout import Layout, Slot

JOURNAL = "journal.jsonl"
_CHUNK = 4 << 20  # bytes read back at once for digests


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor, written and journalled together: bytes [start, end) of a file."""

    key: str  # of the journal: "model.norm.weight/0"
    file: str
    start: int
    end: int


def piece_of(slot: Slot, number: int, first_row: int, last_row: int) -> Piece:
    row = slot.row_bytes
    return Piece(f"{slot.name}/{number}", slot.file, slot.start + first_row * row, slot.start + last_row * row)


@dataclass
class _Shard:
    """One open file: its descriptor, and how far from the start its digest has come."""

    path: Path  # without .partial
    size: int
    descriptor: int
    digest: Any
    hashed: int
    finished: dict[int, int] = field(default_factory=dict)  # pieces past `hashed`: start -> end
    lock: threading.Lock = field(default_factory=threading.Lock)


class Writer:
    """Writes the files of a layout under `folder`. Safe to use from several threads.

    plan: whatever the bytes depend on, as text. A journal left behind by the same plan is continued: `finished` then
    holds the facts recorded with each piece that is in place. One of another plan is dropped, with its files.
    """

    def __init__(self, folder: Path, layout: Layout, pieces: Sequence[Piece], plan: str) -> None:
        self.folder, self.layout = folder, layout
        self.finished: dict[str, Any] = {}
        self._plan = hashlib.sha256(plan.encode()).hexdigest()
        self._sums: dict[str, int] = {}  # of the pieces that are being written
        self._journal_lock = threading.Lock()
        recorded = self._read_journal()
        if recorded is None:
            _clear(folder)
        self._require_space()
        self._shards = {file: self._open(file) for file in layout.headers}
        if recorded is None:
            self._journal = (folder / JOURNAL).open("wb")
            self._append({"plan": self._plan})
        else:
            self._journal = (folder / JOURNAL).open("ab")
            self._append({})  # Ends a line that the kill may have cut short.
            for piece in pieces:
                total, facts = recorded.get(piece.key, (None, None))
                if total is not None and self._checksum(piece) == total:
                    self.finished[piece.key] = facts
                    self._mark(piece)

    def write(self, piece: Piece, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` within a piece, of which one thread writes each byte once. Then `finish` it."""
        shard = self._shards[piece.file]
        self._sums[piece.key] = checksum(data, offset, self._sums.get(piece.key, 0))
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(shard.descriptor, data[done:], piece.start + offset + done)
            except OSError as error:
                raise store_error(error, shard.path) from error
        if shard.lock.acquire(blocking=False):  # Held by another: it is not our turn, and `_mark` will see to it.
            try:
                if shard.hashed == piece.start + offset:  # In turn: digest it while it is in the cache.
                    shard.digest.update(data)
                    shard.hashed += len(data)
            finally:
                shard.lock.release()

    def finish(self, piece: Piece, facts: Any = None) -> None:
        """Record a piece as written. facts: JSON, given back after a kill."""
        self._append({"piece": piece.key, "sum": self._sums.pop(piece.key, 0), "facts": facts})
        self._mark(piece)

    def close(self) -> None:
        """Stop, leaving everything in place for another try."""
        for shard in self._shards.values():
            os.close(shard.descriptor)
        self._shards.clear()
        self._journal.close()

    def complete(self) -> dict[str, str]:
        """Give the files their names, write the index, drop the journal; the sha256 of each file by its name."""
        digests = {}
        for file, shard in self._shards.items():
            self._advance(shard, shard.size)
            digests[file] = shard.digest.hexdigest()
        self.close()
        for file in self.layout.headers:
            (self.folder / f"{file}.partial").replace(self.folder / file)
        if self.layout.index:
            name, content = self.layout.index
            write_whole(self.folder / name, content)
            digests[name] = hashlib.sha256(content).hexdigest()
        (self.folder / JOURNAL).unlink()
        return digests

    def _open(self, file: str) -> _Shard:
        path, header, size = self.folder / file, self.layout.headers[file], self.layout.sizes[file]
        partial = self.folder / f"{file}.partial"
        if path.exists() and not partial.exists():  # Killed while files were being given their names.
            path.replace(partial)
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, header, 0)
        except OSError as error:
            raise store_error(error, partial) from error
        return _Shard(path, size, descriptor, hashlib.sha256(header), len(header))

    def _require_space(self) -> None:
        """StoreError with needed and free bytes, unless what is still to be written fits."""
        present = sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.safetensors*") if path.is_file())
        needed = self.layout.nbytes - present
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            what = f"no space: {needed:,} bytes are needed and {free:,} are free"
            raise StoreError(
                what, where=str(self.folder), mend="Free some space (hubforge gc), or choose another --store."
            )

    def _mark(self, piece: Piece) -> None:
        shard = self._shards[piece.file]
        with shard.lock:
            if piece.end > shard.hashed:
                shard.finished[piece.start] = piece.end
            # What others finished out of turn is in the page cache: read it back from there.
            while True:
                reached = [end for start, end in shard.finished.items() if start <= shard.hashed]
                if not reached:
                    return
                self._advance(shard, max(reached))
                shard.finished = {start: end for start, end in shard.finished.items() if end > shard.hashed}

    def _advance(self, shard: _Shard, end: int) -> None:
        while shard.hashed < end:
            data = os.pread(shard.descriptor, min(_CHUNK, end - shard.hashed), shard.hashed)
            if not data:
                raise StoreError(f"is shorter than {end} bytes", where=str(shard.path))
            shard.digest.update(data)
            shard.hashed += len(data)

    def _checksum(self, piece: Piece) -> int:
        total, at = 0, piece.start
        while at < piece.end:
            data = os.pread(self._shards[piece.file].descriptor, min(_CHUNK, piece.end - at), at)
            if not data:
                return -1
            total = checksum(memoryview(data), at - piece.start, total)
            at += len(data)
        return total

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":"))
        with self._journal_lock:
            try:
                self._journal.write(f"{zlib.crc32(line.encode()):08x} {line}\n".encode())
                self._journal.flush()
            except OSError as error:
                raise store_error(error, self.folder / JOURNAL) from error

    def _read_journal(self) -> dict[str, tuple[int, Any]] | None:
        """What a killed run of the same plan recorded: piece -> checksum and facts. None: start afresh."""
        try:
            lines = (self.folder / JOURNAL).read_bytes().split(b"\n")
        except OSError:
            return None
        entries = []
        for line in lines:
            crc, _, text = line.partition(b" ")
            if text and crc == f"{zlib.crc32(text):08x}".encode():
                entries.append(json.loads(text))
        if not entries or entries[0].get("plan") != self._plan:
            return None
        return {entry["piece"]: (entry["sum"], entry["facts"]) for entry in entries if "sum" in entry}


def checksum(data: memoryview, offset: int, before: int = 0) -> int:
    """The sum, modulo 2^64, of a piece's bytes as little-endian words of 64 bits; `data` lies at `offset` in the piece.

    It tells a write that was lost or torn, of which zeros are left, and takes a tenth of the time of a CRC, which took
    a twentieth of a merge's. before: the sum of the bytes before these.
    """
    import numpy as np

    head = min(-offset % 8, len(data))  # up to the next whole word
    tail = len(data) - (len(data) - head) % 8
    words = np.frombuffer(data[head:tail], "<u8").sum(dtype=np.uint64)
    first = int.from_bytes(data[:head], "little") << 8 * (offset % 8)
    return (before + first + int(words) + int.from_bytes(data[tail:], "little")) & 0xFFFFFFFFFFFFFFFF


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file at once: under its name there is either all of it or what was there before."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise store_error(error, path) from error


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def store_error(error: OSError, path: Path) -> HubforgeError:
    """What to raise when a file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"the disk is full ({shutil.disk_usage(path.parent).free:,} bytes free)"
        return StoreError(what, where=str(path), mend="Free some space (hubforge gc), then run again: it will resume.")
    return StoreError(f"cannot be written: {error.strerror}", where=str(path))
