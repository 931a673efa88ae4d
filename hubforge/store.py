"""Where artifacts live: one folder per key. The manifest is written last; it being there means the artifact is whole.

<root>/
  artifacts/<key>/            files, and manifest.json
  artifacts/<key>.part/       being made, or left by a killed step, to be resumed
  history/<recipe>.json       what each step of a recipe was last made from, for "why is this stale"
  hashes.json                 digests of local files, by path, size and time
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hubforge.errors import StoreError
from hubforge.op import Artifact, FileDigest, Kind
from hubforge.sources import hash_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a step was asked for (key, op, fields, inputs) and which bytes came (files, metrics, versions, hardware)."""

    key: str
    name: str
    kind: Kind
    op: str  # "stages.slerp"
    fields: dict[str, Any]
    inputs: dict[str, str]  # ref -> key
    files: tuple[FileDigest, ...]
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    started: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    git: dict[str, Any] | None = None
    hubforge: str = ""
    fused: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Steps computed in the same pass, by key: name, op, fields, inputs, metrics. They have no artifact."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**(known | {"files": tuple(FileDigest(**file) for file in data["files"])}))


class Store(Protocol):
    """What a run needs of a store."""

    def has(self, key: str) -> bool: ...
    def manifest(self, key: str) -> Manifest: ...
    def get(self, key: str, name: str) -> Artifact: ...
    def begin(self, key: str, *, keep: bool) -> Path: ...
    def commit(self, manifest: Manifest) -> None: ...
    def drop(self, key: str) -> None: ...


class LocalStore:
    """A store in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.artifacts = root / "artifacts"

    def folder(self, key: str) -> Path:
        return self.artifacts / key

    def part(self, key: str) -> Path:
        return self.artifacts / f"{key}.part"

    def has(self, key: str) -> bool:
        return (self.folder(key) / MANIFEST).is_file()

    def has_part(self, key: str) -> bool:
        return self.part(key).is_dir() and any(self.part(key).iterdir())

    def manifest(self, key: str) -> Manifest:
        """The manifest of a whole artifact. Raises StoreError when it is missing or damaged."""
        path = self.folder(key) / MANIFEST
        try:
            return Manifest.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"a manifest of the store cannot be read: {error}",
                where=str(path),
                mend="Delete its folder; the next run makes it again.",
            ) from error

    def get(self, key: str, name: str) -> Artifact:
        """The artifact of that key; the sizes of its files are compared with its manifest's."""
        manifest = self.manifest(key)
        folder = self.folder(key)
        for file in manifest.files:
            try:
                size = (folder / file.path).stat().st_size
            except OSError:
                size = -1
            if size != file.size:
                found = "is gone" if size < 0 else f"is {size} bytes, not {file.size}"
                raise StoreError(
                    f"{file.path} of {manifest.name} {found}",
                    where=str(folder),
                    mend="Somebody changed the store. Delete that folder; the next run makes it again.",
                )
        origin = {"op": manifest.op, "fields": manifest.fields}
        return Artifact(name, manifest.kind, key, folder, manifest.files, manifest.metrics, origin)

    def begin(self, key: str, *, keep: bool) -> Path:
        """The folder to write into. keep: what a killed step left there stays, to be resumed from."""
        part = self.part(key)
        with disk_errors(self.root):
            if not keep and part.exists():
                shutil.rmtree(part)
            part.mkdir(parents=True, exist_ok=True)
        return part

    def commit(self, manifest: Manifest) -> None:
        """Make the part whole: sync its files, rename the folder, and write the manifest, last."""
        part, folder = self.part(manifest.key), self.folder(manifest.key)
        with disk_errors(self.root):
            for file in manifest.files:
                sync(part / file.path)
            if folder.exists():  # without a manifest: a commit that was cut off between rename and manifest
                shutil.rmtree(folder)
            part.replace(folder)
            sync(self.artifacts)
            write_json(folder / MANIFEST, {"format": 1} | asdict(manifest))

    def drop(self, key: str) -> None:
        """Remove an artifact: its manifest first, so that what remains is never taken for whole."""
        with suppress(FileNotFoundError):
            (self.folder(key) / MANIFEST).unlink()
        shutil.rmtree(self.folder(key), ignore_errors=True)
        shutil.rmtree(self.part(key), ignore_errors=True)

    def contents(self) -> Iterator[tuple[str, bool, int]]:
        """(key, is whole, bytes) of everything in the store."""
        if not self.artifacts.is_dir():
            return
        for path in sorted(self.artifacts.iterdir()):
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                yield path.name.removesuffix(".part"), self.has(path.name), size

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold a key against other processes while it is made. Raises StoreError when another one holds it."""
        try:
            import fcntl
        except ImportError:  # Windows: no advisory locks; two runs of one recipe at once are the user's to avoid
            yield
            return
        with disk_errors(self.root):
            self.artifacts.mkdir(parents=True, exist_ok=True)
            stream = (self.artifacts / f".{key}.lock").open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.close()
            raise StoreError(
                "another hubforge is making this step right now", where=str(self.part(key)), mend="Wait for it to end."
            ) from None
        try:
            yield
        finally:
            stream.close()  # The file stays: unlinking it could hand one lock to two processes.

    def history(self, recipe: str) -> dict[str, Any]:
        """For each step name of a recipe: what it was last made from. Empty when nothing is known."""
        try:
            found = json.loads((self.root / "history" / f"{recipe}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def remember(self, recipe: str, step: str, material: Mapping[str, Any]) -> None:
        known = self.history(recipe)
        if known.get(step) != material:
            with disk_errors(self.root):
                (self.root / "history").mkdir(parents=True, exist_ok=True)
                write_json(self.root / "history" / f"{recipe}.json", known | {step: dict(material)})


def digests(folder: Path, known: Mapping[str, str]) -> tuple[FileDigest, ...]:
    """Path, size and sha256 of every file below a folder, in order. known: digests taken while writing, by path."""
    files = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise StoreError(f"a step left a link, {relative}", where=str(folder))
        if path.is_file() and relative != MANIFEST:
            files.append(FileDigest(relative, path.stat().st_size, known.get(relative) or hash_file(path)))
    return tuple(files)


def sync(path: Path) -> None:
    """Ask the disk to hold what was written to that file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never a torn one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A lone surrogate, which somebody's file may hold, becomes its JSON escape; UTF-8 has no bytes for it.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync(path.parent)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(existing(where)).free
            raise StoreError(
                f"the disk is full ({free / 1e9:.1f} GB free)",
                where=str(where),
                mend="Free some space (`hubforge gc` removes what no recipe needs), then run again: it resumes.",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StoreError(f"cannot be written: {error.strerror}", where=str(error.filename or where)) from error
        raise


def existing(path: Path) -> Path:
    """The path, or the closest folder around it that is there."""
    while not path.exists():
        path = path.parent
    return path
