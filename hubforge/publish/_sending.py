"""Local files on their way to the Hub: read once, counted for the progress line, and hashed as they pass.

The sha256 of every file is known from when it was written, so nothing is read just to be hashed: the client is handed
the known digest, and the bytes are hashed while they are sent. A file that changed on disk since is noticed before its
last byte leaves, and so never arrives whole under a digest that is not its own.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hubforge.errors import PublishError
from hubforge.events import Progress, Report
from hubforge.publish._client import STALLED
from hubforge.publish._paths import path_fault
from hubforge.publisher import Upload, UploadFile

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_STEP = 1 << 20  # bytes between two progress events of one file
_BLOCK = 1 << 20
_RECENT = 10.0  # seconds over which the rate is taken


class Meter:
    """Adds up what several threads send, and reports it: of each file, of the whole upload, and how fast it goes."""

    def __init__(self, total: int, report: Report, step: str, sizes: Mapping[str, int] | None = None) -> None:
        self.total, self.report, self.step, self.sizes = total, report, step, sizes or {}
        self._at: dict[str, int] = {}
        self._told = -1
        self._recent: deque[tuple[float, int]] = deque()  # (seconds, bytes in all) of the last events
        self._lock = threading.Lock()

    def at(self, path: str, position: int, *, whole: bool = False) -> None:
        """That file is sent up to there. A retry begins again, so the number may go down."""
        with self._lock:
            self._at[path] = position
            done = sum(self._at.values())
            if whole or abs(done - self._told) >= _STEP:
                self._told = done
                part = {"part_done": position, "part_total": self.sizes.get(path)} if path in self.sizes else {}
                self.report(Progress(self.step, path, done, self.total, "B", **part, rate=self._rate(done)))

    def _rate(self, done: int) -> float | None:
        """Bytes a second over the last ten seconds; None until there is a second to tell from."""
        now = time.monotonic()
        self._recent.append((now, done))
        while now - self._recent[0][0] > _RECENT:
            self._recent.popleft()
        began, before = self._recent[0]
        return (done - before) / (now - began) if now - began >= 1 and done > before else None

    def finish(self) -> None:
        """Everything is there, be it sent or known to the Hub before."""
        with self._lock:
            self.report(Progress(self.step, "", self.total, self.total, "B"))


class _WatchedBytes(io.FileIO):
    """The raw file below a WatchedFile. Working here and not on what the client asks for (64 KiB at a time) means that
    five sending threads meet at the interpreter's lock sixteen times less often."""

    def __init__(self, file: UploadFile, path: Path, meter: Meter | None) -> None:
        super().__init__(path)
        self._file, self._meter = file, meter
        self._sha256, self._hashed = hashlib.sha256(), 0

    def readinto(self, buffer: Any) -> int | None:
        at = self.tell()
        try:
            count = super().readinto(buffer)
        except OSError as error:
            raise unreadable(self._file, error) from error
        if count:
            self._passed(at, memoryview(buffer).cast("B")[:count])
        return count

    def readall(self) -> bytes:
        at = self.tell()
        try:
            data = super().readall() or b""
        except OSError as error:
            raise unreadable(self._file, error) from error
        self._passed(at, memoryview(data))
        return data

    def _passed(self, at: int, data: memoryview) -> None:
        """Hash what passes for the first time; raise before the end is given out when it is not what was made."""
        end = at + len(data)
        if at <= self._hashed < end:
            self._sha256.update(data[self._hashed - at :])
            self._hashed = end
            if end > self._file.size or (end == self._file.size and self._sha256.hexdigest() != self._file.sha256):
                raise changed(self._file)
        if self._meter is not None:
            self._meter.at(self._file.path, end)


class WatchedFile(io.BufferedReader):
    """A local file that tells a meter how far it was read, and refuses to be read to its end when it has changed.

    Reading goes front to back, perhaps in slices and perhaps again from the front (a retry): a byte is hashed the first
    time it passes.
    """

    def __init__(self, file: UploadFile, path: Path, meter: Meter | None = None) -> None:
        try:
            raw = _WatchedBytes(file, path, meter)
        except OSError as error:
            raise unreadable(file, error) from error
        super().__init__(raw, _BLOCK)
        self._asked = 0.0  # when the sender last came for more

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes; httpx2.WriteTimeout when the sender took too long over the last ones.

        httpx asks for 64 KiB at a time, once those before are on their way. That its own timeout for a write counts
        each of the system's sends apart, and so never ends a connection that drips, is why this looks at the clock.
        """
        now = time.monotonic()
        if self._asked and now - self._asked > STALLED:
            self._asked = 0.0
            import httpx2

            raise httpx2.WriteTimeout(f"the upload stalled: less than 64 KiB in {STALLED:.0f} s")
        self._asked = now
        return super().read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._asked = 0.0  # a retry begins
        return super().seek(offset, whence)


def changed(file: UploadFile) -> PublishError:
    """The error for a file whose bytes are not those that were made."""
    return PublishError(
        f"{file.path} is not what was made: its sha256 should be {file.sha256}",
        where=str(file.content) if isinstance(file.content, Path) else "",
        mend="Something wrote to the store. Drop that artifact and run again: `hubforge run` makes it anew.",
    )


def unreadable(file: UploadFile, error: OSError) -> PublishError:
    """The error for a file that is gone or may not be read."""
    return PublishError(
        f"{file.path} cannot be read: {error.strerror or error}",
        where=str(file.content) if isinstance(file.content, Path) else "",
        mend="If it is gone from the store, `hubforge run` makes it anew.",
    )


def check_files(upload: Upload) -> None:
    """PublishError unless every file of the upload is there, of its size, and has a path the repository may hold.

    With a folder, only what is below it and the card at the root may be touched.
    """
    seen: set[str] = set()
    for file in upload.files:
        where = f"publish.{upload.target}"
        if fault := path_fault(file.path):
            raise PublishError(f"the path {file.path!r} {fault}", where=where)
        if file.path in seen:
            raise PublishError(f"{file.path} is in the upload twice", where=where)
        seen.add(file.path)
        if file.path.rpartition("/")[2] == ".gitattributes":
            raise PublishError(
                f"{file.path} would replace the repository's own, which says what is stored as a large file",
                where=where,
            )
        if upload.folder and file.path != "README.md" and not file.path.startswith(f"{upload.folder}/"):
            raise PublishError(f"{file.path} lies outside the folder {upload.folder}", where=where)
        if isinstance(file.content, bytes):
            if len(file.content) != file.size or hashlib.sha256(file.content).hexdigest() != file.sha256:
                raise changed(file)
            continue
        try:
            size = file.content.stat().st_size
        except OSError as error:
            raise unreadable(file, error) from error
        if size != file.size or not file.content.is_file():
            raise changed(file)


def git_blob_oid(data: bytes) -> str:
    """Git's name for these bytes as a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def git_oid(file: UploadFile) -> str:
    """Git's name for that file as a blob: sha1 of a header and the bytes. For files kept in git, which are small.

    PublishError when the bytes are not those whose sha256 is known.
    """
    sha1, sha256 = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False), hashlib.sha256()
    for block in _blocks(file):
        sha1.update(block)
        sha256.update(block)
    if sha256.hexdigest() != file.sha256:
        raise changed(file)
    return sha1.hexdigest()


def _blocks(file: UploadFile) -> Iterator[bytes]:
    if isinstance(file.content, bytes):
        yield file.content
        return
    try:
        with file.content.open("rb") as handle:
            while block := handle.read(_BLOCK):
                yield block
    except OSError as error:
        raise unreadable(file, error) from error


def additions(files: Iterable[UploadFile], meter: Meter, *, hashed: bool) -> list[CommitOperationAdd]:
    """The client's operations that add those files.

    hashed: hand the client the sha256 that is known. LFS needs it beforehand, and the bytes are checked against it
    while they are sent. xet reads the files itself and computes the sha256 on the way, so there it is compared after.
    """
    made = []
    for file in files:
        try:
            addition = _addition_class()(file.path, file.content, file, meter)
        except (OSError, ValueError) as error:  # the client looks at the file; gone since it was checked
            raise changed(file) from error
        if hashed:
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)
        made.append(addition)
    return made


@cache
def _addition_class() -> Any:
    """A CommitOperationAdd that reads its file through WatchedFile. Made on first use: the import takes a while."""
    from huggingface_hub import CommitOperationAdd

    class WatchedAddition(CommitOperationAdd):
        def __init__(self, path: str, content: Path | bytes, file: UploadFile, meter: Meter) -> None:
            self.file, self.meter = file, meter
            super().__init__(path, content)

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
            if isinstance(self.file.content, bytes):
                yield io.BytesIO(self.file.content)
                return
            with WatchedFile(self.file, self.file.content, self.meter) as reader:
                yield reader

    return WatchedAddition
