"""Inputs: what a recipe names and which bytes that means. A local source is keyed by its content.

A Hub source is keyed by repository, commit and files; `lock.py` pins and fetches it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hubforge.errors import SourceError
from hubforge.front_matter import front_matter_in
from hubforge.op import FileDigest, Kind

SourceKind = Literal["model", "adapter", "dataset", "mask", "gguf"]
CHUNK = 1 << 20

# What a source of each kind is made of. The rest of a repository is neither fetched nor keyed.
PATTERNS: dict[SourceKind, tuple[str, ...]] = {
    "model": (
        "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
        "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken",
    ),
    "adapter": ("*.safetensors", "adapter_model.bin", "*.json", "*.jinja", "*.model"),
    "dataset": ("*",),
    "mask": ("*.safetensors", "*.json", "*.pt"),
    "gguf": ("*.gguf",),
}  # fmt: skip
UNKEYED = ("*.md", ".*", "LICENSE*", "NOTICE*", "USE_POLICY*", "__pycache__/*", "*.pyc", "*.lock")
REPO = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$", re.ASCII)


class SourceSpec(BaseModel):
    """One input: exactly one of model, adapter, dataset, mask, gguf, and where in it.

    The value is a Hub repository ("namespace/name"), or a local folder or file that starts with ./ ../ / or ~ and is
    relative to the recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = Field(None, min_length=1)
    """A model: Hub repository or local folder."""
    adapter: str | None = Field(None, min_length=1)
    """A PEFT adapter: Hub repository or local folder."""
    dataset: str | None = Field(None, min_length=1)
    """Rows of text: Hub dataset, local folder or local file (.jsonl, .json, .csv, .parquet, .txt)."""
    mask: str | None = Field(None, min_length=1)
    """A mask repository or local folder."""
    gguf: str | None = Field(None, min_length=1)
    """A GGUF repository or local file."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository; `lock` turns it into a commit."""
    folder: str | None = None
    """A folder inside the repository, such as "g4-e4b-it" of a mask repository."""
    file: str | None = None
    """One file of the repository, such as "model-Q6_K.gguf"."""
    split: str | None = None
    """Split of a dataset: keeps the files whose name holds that word."""
    license: str | None = None
    """Licence, where neither the Hub nor the source's own README tells."""

    @model_validator(mode="after")
    def _one_kind(self) -> SourceSpec:
        given = [kind for kind in get_args(SourceKind) if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"names {len(given)} of model, adapter, dataset, mask and gguf; it must name exactly one")
        if not self.is_local and not REPO.match(self.value):
            raise ValueError(f"{self.value!r} is no Hub repository; write namespace/name, or ./folder for a local one")
        if self.is_local and self.revision:
            raise ValueError("a local source has no revision; it is keyed by its content")
        for inside in (self.folder, self.file):
            if inside is not None and (inside.startswith("/") or ".." in PurePosixPath(inside).parts):
                raise ValueError(f"{inside!r} leaves the repository")
        return self

    @property
    def kind(self) -> SourceKind:
        return next(kind for kind in get_args(SourceKind) if getattr(self, kind) is not None)

    @property
    def value(self) -> str:
        return str(getattr(self, self.kind))

    @property
    def is_local(self) -> bool:
        return self.value.startswith(("./", "../", "/", "~", ".\\")) or self.value in (".", "..")

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"

    def wants(self, path: str) -> bool:
        """Whether that file of the repository (forward slashes) belongs to this source."""
        if self.file is not None:
            return path == self.file
        if self.folder is not None:
            if not path.startswith(self.folder.rstrip("/") + "/"):
                return False
            path = path[len(self.folder.rstrip("/")) + 1 :]
        elif "/" in path and self.kind in ("model", "adapter"):
            return False  # original/, onnx/, checkpoints: not what from_pretrained reads
        name = path.rsplit("/", 1)[-1]
        if any(fnmatch(name, pattern) or fnmatch(path, pattern) for pattern in UNKEYED):
            return False
        if self.split is not None and self.split not in path:
            return name.endswith(".json") and self.kind != "dataset"
        return any(fnmatch(name, pattern) for pattern in PATTERNS[self.kind])


class Digested(Protocol):
    """What has a path and a sha256."""

    @property
    def path(self) -> str: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class LockedFile:
    """A file of a Hub repository at a commit. sha256 for what Git LFS holds, the git blob's sha1 for the rest."""

    path: str
    size: int
    oid: str
    is_lfs: bool


@dataclass(frozen=True)
class Source:
    """A source whose bytes are known: a local one by content, a Hub one by its lock."""

    name: str
    spec: SourceSpec
    key: str
    path: Path | None = None  # local: the folder or file
    files: tuple[FileDigest, ...] = ()  # local: what was hashed
    commit: str | None = None
    locked: tuple[LockedFile, ...] = ()
    license: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return self.spec.kind


def digest(value: Any) -> str:
    """sha256 in hex of a JSON value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 in hex of a file, read in pieces; `progress` hears the bytes of each."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            state.update(piece)
            if progress:
                progress(len(piece))
    return state.hexdigest()


def hash_bytes(content: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


class HashCache:
    """sha256 of files already hashed, by path, size, inode and time of change; kept beside the store.

    A file changed within the last two seconds is hashed anew: its time cannot tell two writes apart.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.known: dict[str, list[Any]] = json.loads(file.read_text())
        except (OSError, ValueError):
            self.known = {}
        self.changed = False

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = self.known.get(str(path))
        if entry and entry[:3] == stamp:
            return str(entry[3])
        found = hash_file(path)
        if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            self.known[str(path)] = [*stamp, found]
            self.changed = True
        return found

    def save(self) -> None:
        if not self.changed:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self.known))
            temporary.replace(self.file)
        except OSError:
            return  # a cache: losing it costs time, never truth


def local_files(root: Path, spec: SourceSpec) -> Iterator[tuple[str, Path]]:
    """(relative path, file) of what belongs to a local source, in order. Symlinks that leave the folder are refused."""
    if root.is_file():
        yield root.name, root
        return
    base = root.resolve()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if not path.is_file() or not spec.wants(relative) or any(part.startswith(".") for part in relative.split("/")):
            continue
        target = path.resolve()
        # Hub caches are folders of links to the blobs beside them; following those is the point.
        if not target.is_relative_to(base) and "blobs" not in target.parts:
            raise SourceError(f"{relative} is a link that leaves the folder", where=str(root))
        yield relative, path


def resolve_local(name: str, spec: SourceSpec, folder: Path, hashes: HashCache, where: str = "") -> Source:
    """A local source, keyed by the content of its files. folder: that of the recipe."""
    path = (folder / Path(spec.value).expanduser()).resolve()
    if spec.folder or spec.file:
        path = path / (spec.file or spec.folder or "")
    if not path.exists():
        mend = "Paths are relative to the recipe."
        if ".lab" in path.parts:
            mend = f"`hubforge lab {_lab_folder(path)}` trains the lab's models there."
        raise SourceError(f"source {name!r}: there is no {spec.value}", where=where, mend=mend)
    if mend := _of_another_kind(spec, path):
        raise SourceError(f"source {name!r}: {spec.value} is no {spec.kind}", where=where, mend=mend)
    bare = spec.model_copy(update={"folder": None, "file": None})
    files = tuple(
        FileDigest(relative, file.stat().st_size, hashes.sha256(file)) for relative, file in local_files(path, bare)
    )
    if not files:
        raise SourceError(
            f"source {name!r}: {spec.value} holds no file of a {spec.kind}",
            where=where,
            mend=f"Looked for {', '.join(PATTERNS[spec.kind])}.",
        )
    key = local_key(spec, files)
    return Source(name, spec, key, path=path, files=files, license=spec.license or _readme_license(path))


def _of_another_kind(spec: SourceSpec, path: Path) -> str:
    """How to mend a model or adapter that is a file, or the other of the two; "" for what may be one."""
    if spec.kind not in ("model", "adapter"):
        return ""
    if path.is_file():
        return f"Name its folder, where config and tokenizer are: {path.parent}."
    has_model, has_adapter = (path / "config.json").is_file(), (path / "adapter_config.json").is_file()
    if spec.kind == "model" and has_adapter and not has_model:
        return f"It is an adapter: write {{adapter: {spec.value}}}, and fold it into its model with `op: apply`."
    if spec.kind == "adapter" and has_model and not has_adapter:
        return f"It is a model: write {{model: {spec.value}}}; `op: extract_lora` makes an adapter of two models."
    return ""


def local_key(spec: SourceSpec, files: Iterable[Digested]) -> str:
    """The key of a local source: its kind, and the paths and digests of its files."""
    return digest({"local": spec.kind, "split": spec.split, "files": [[file.path, file.sha256] for file in files]})


def _lab_folder(path: Path) -> str:
    parts = path.parts[: path.parts.index(".lab") + 1]
    try:
        return str(Path(*parts).relative_to(Path.cwd()))
    except ValueError:
        return str(Path(*parts))


def _readme_license(path: Path) -> str | None:
    """The `license` of a README's front matter, when it is short plain text."""
    said = front_matter_in(path if path.is_dir() else path.parent).get("license")
    return said if isinstance(said, str) and re.fullmatch(r"[\w.-]{1,60}", said) else None


def git_blob_sha1(path: Path) -> str:
    """The id git gives a file's content: sha1 of "blob <size>\\0" and the bytes."""
    state = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            state.update(piece)
    return state.hexdigest()


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each package, without its build ("+cpu"); "absent" for one that is not there."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in sorted(set(names)):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "absent"
    return found
