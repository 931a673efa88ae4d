"""The contents of one repository's files, each under its own digest, and uploads on their way there."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import IO

from hubforge.hub.disk import sync_folder, write_whole
from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.gitids import blob_id


class Objects:
    """Regular files under their git blob id, LFS files under their sha256; a name appears only on a whole file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"

    def blob(self, oid: str) -> Path:
        return self.root / "blobs" / oid[:2] / oid

    def lfs(self, sha256: str) -> Path:
        return self.root / "lfs" / sha256[:2] / sha256

    def add_blob(self, data: bytes) -> str:
        """Store a regular file; its git blob id."""
        oid = blob_id(data)
        path = self.blob(oid)
        if not _touched(path):
            self.incoming.mkdir(parents=True, exist_ok=True)
            write_whole(path, data, scratch=self.incoming)
        return oid

    def lfs_size(self, sha256: str) -> int | None:
        """Bytes of a stored LFS file, or None when there is none."""
        try:
            return self.lfs(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def keep_lfs(self, sha256: str) -> int | None:
        """The same, and whoever collects garbage lets it live for the commit that is to come."""
        return self.lfs_size(sha256) if _touched(self.lfs(sha256)) else None

    def receive(self, sha256: str, size: int) -> Receiving:
        """An upload that becomes an LFS file if what arrives is what was announced."""
        return Receiving(self, sha256, size)

    def link_lfs(self, sha256: str, source: Path) -> None:
        """Take over a stored LFS file of another repository, without a copy where the file system can."""
        target = self.lfs(sha256)
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except FileExistsError:
            return
        except OSError:
            size = source.stat().st_size
            with source.open("rb") as handle, self.receive(sha256, size) as receiving:
                while piece := handle.read(1 << 20):
                    receiving.write(piece)
                receiving.finish()
            return
        sync_folder(target.parent)

    # Parts of a large upload are written to their place in one file, so that joining them copies nothing.
    def parted(self, upload: str) -> Path:
        return self.incoming / f"{upload}.parts"

    def write_part(self, upload: str, start: int) -> IO[bytes]:
        """The unfinished file of a multipart upload, at the byte where a part begins."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        handle = os.fdopen(os.open(self.parted(upload), os.O_WRONLY | os.O_CREAT, 0o644), "wb")
        handle.seek(start)
        return handle

    def join_parts(self, upload: str, sha256: str, size: int) -> None:
        """Name a multipart upload once its size and sha256 are what was announced; refuse it otherwise."""
        path = self.parted(upload)
        # Under another name no straggling part can be written into it between the check and the naming.
        closed = path.with_suffix(".closed")
        try:
            path.rename(closed)
        except FileNotFoundError:
            if self.lfs_size(sha256) == size:
                return
            raise Refusal(404, "No such upload") from None
        try:
            with closed.open("rb+") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
                if handle.tell() != size or digest != sha256:
                    raise Refusal(422, f"The parts make {handle.tell()} bytes with sha256 {digest}, not the announced")
                os.fsync(handle.fileno())
            self._name(closed, sha256)
        finally:
            closed.unlink(missing_ok=True)

    def _name(self, part: Path, sha256: str) -> None:
        target = self.lfs(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        sync_folder(target.parent)


def _touched(path: Path) -> bool:
    """Whether a file is there, its time made now. Not `exists`: it may be collected between a look and its use."""
    try:
        os.utime(path)
        return True
    except FileNotFoundError:
        return False


class Receiving:
    """One upload: bytes go to disk as they come, hashed on the way; nothing stays unless `finish` was reached."""

    def __init__(self, objects: Objects, sha256: str, size: int) -> None:
        self._objects, self._sha256, self._size = objects, sha256, size
        self._digest = hashlib.sha256()
        self._received = 0
        objects.incoming.mkdir(parents=True, exist_ok=True)
        self._path = objects.incoming / f"{secrets.token_hex(8)}.part"
        self._handle = self._path.open("xb")

    def __enter__(self) -> Receiving:
        return self

    def write(self, piece: bytes | bytearray) -> None:
        self._received += len(piece)
        if self._received > self._size:
            raise Refusal(422, f"More bytes than the announced {self._size}")
        self._digest.update(piece)
        self._handle.write(piece)

    def finish(self) -> None:
        """Name the file, or refuse it when it is not what was announced."""
        if self._received != self._size:
            raise Refusal(422, f"{self._received} bytes arrived, but {self._size} were announced")
        if self._digest.hexdigest() != self._sha256:
            raise Refusal(422, f"sha256 is {self._digest.hexdigest()}, but {self._sha256} was announced")
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        self._objects._name(self._path, self._sha256)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()
        self._path.unlink(missing_ok=True)
