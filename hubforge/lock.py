"""The lock: a Hub source pinned to a commit and digests, and fetched so that every byte is checked against them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hubforge.errors import LockError, SourceError
from hubforge.events import Event, Progress
from hubforge.op import FileDigest
from hubforge.sources import PATTERNS, LockedFile, Source, SourceSpec, digest, git_blob_sha1, hash_file


def lock_path(recipe: Path) -> Path:
    return recipe.with_name(recipe.stem + ".lock.json")


def read_lock(recipe: Path) -> dict[str, Any] | None:
    """The lock beside a recipe, or None. Raises LockError when it is not a lock."""
    path = lock_path(recipe)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LockError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        lock = json.loads(raw)
        if not isinstance(lock, dict) or lock.get("version") != 1 or not isinstance(lock.get("sources"), dict):
            raise ValueError("it is not a lock of version 1")
        if not isinstance(lock.get("packages", {}), dict):
            raise ValueError("its packages are no mapping of names to versions")
    except (ValueError, RecursionError) as error:
        raise LockError(str(error), where=str(path), mend=f"`hubforge lock {recipe}` writes it anew.") from error
    return lock


def resolve_locked(name: str, spec: SourceSpec, lock: dict[str, Any] | None, recipe: Path, where: str = "") -> Source:
    """A Hub source as the lock has it. Raises LockError when the lock lacks it or was made for another one."""
    mend = f"`hubforge lock {recipe}` resolves it (needs the network once)."
    entry = (lock or {}).get("sources", {}).get(name)
    if entry is None:
        what = "there is no lock yet" if lock is None else f"the lock has no source {name!r}"
        raise LockError(what, where=where or str(lock_path(recipe)), mend=mend)
    asked = spec.model_dump(exclude_none=True, exclude={"license"})
    if not isinstance(entry, dict) or entry.get("asked") != asked:
        raise LockError(f"source {name!r} was changed after it was locked", where=where, mend=mend)
    try:
        commit, files = entry["commit"], tuple(LockedFile(**file) for file in entry["files"])
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not files:
            raise ValueError(f"commit {commit!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise LockError(f"source {name!r} is damaged in the lock: {error}", where=where, mend=mend) from error
    key = digest(
        {
            "hub": spec.value,
            "type": spec.repo_type,
            "commit": commit,
            "files": [file.path for file in files],
        }
    )
    license_ = spec.license or entry.get("license")
    return Source(name, spec, key, commit=commit, locked=files, license=license_, facts=entry.get("facts", {}))


def resolve_online(name: str, spec: SourceSpec, endpoint: str, token: str | None, where: str = "") -> dict[str, Any]:
    """The lock entry of a Hub source: revision -> commit, and each file's size and digest. Asks the Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint, token=token or False)
    with hub_errors(f"source {name!r}", spec.value, where):
        info = api.repo_info(spec.value, revision=spec.revision, repo_type=spec.repo_type)
        commit = info.sha
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise SourceError(f"source {name!r}: the Hub gave {commit!r} for a commit", where=where)
        tree = api.list_repo_tree(spec.value, recursive=True, revision=commit, repo_type=spec.repo_type)
        files = [
            {
                "path": entry.path,
                "size": entry.size,
                "oid": entry.lfs.sha256 if entry.lfs else entry.blob_id,
                "is_lfs": entry.lfs is not None,
            }
            for entry in tree
            if isinstance(entry, RepoFile) and spec.wants(entry.path)
        ]
    paths = [str(file["path"]) for file in files]
    if spec.kind == "model" and any(path.endswith(".safetensors") for path in paths):
        files = [file for file in files if not str(file["path"]).startswith("pytorch_model")]
    if not files:
        raise SourceError(
            f"source {name!r}: {spec.value} at {commit[:8]} holds no file of a {spec.kind}",
            where=where,
            mend=f"Looked for {', '.join(PATTERNS[spec.kind])}" + (f" in {spec.folder}." if spec.folder else "."),
        )
    card_data = getattr(info, "card_data", None)
    license_ = card_data.to_dict().get("license") if card_data else None
    return {
        "asked": spec.model_dump(exclude_none=True, exclude={"license"}),
        "commit": commit,
        "license": license_ if isinstance(license_, str) else None,
        "gated": bool(getattr(info, "gated", False)),
        "files": sorted(files, key=lambda file: str(file["path"])),
    }


class hub_errors:
    """Turns what the Hub's client raises into a SourceError with a way out. Tokens are never in these messages."""

    def __init__(self, what: str, repo: str, where: str) -> None:
        self.what, self.repo, self.where = what, repo, where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (SourceError, KeyboardInterrupt, SystemExit)):
            return
        from huggingface_hub import errors as hub

        if isinstance(error, hub.HFValidationError):
            return  # what was asked is no name of a repository

        mend = "`hubforge doctor` says whether a token is set and which Hub is asked."
        if isinstance(error, hub.GatedRepoError):
            what, mend = "is gated", f"Accept its terms on the page of {self.repo}, then `hf auth login`."
        elif isinstance(error, hub.RevisionNotFoundError):
            what, mend = "has no such revision", "Look at its branches and tags on the Hub."
        elif isinstance(error, hub.RepositoryNotFoundError):
            what, mend = "does not exist, or is private to others", "A private one needs a token: `hf auth login`."
        elif isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
            what, mend = "is not here, and the Hub is not reachable", "Run once without --offline."
        elif isinstance(error, (hub.HfHubHTTPError, OSError)) or type(error).__module__.startswith("httpx"):
            what = f"could not be read from the Hub ({type(error).__name__})"
        elif isinstance(error, (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)):
            what = f"could not be read: the Hub's answer is not one ({type(error).__name__})"
        else:
            return
        raise SourceError(f"{self.what}: {self.repo} {what}", where=self.where, mend=mend) from error


def fetch(
    source: Source, endpoint: str, token: str | None, *, offline: bool, report: Callable[[Event], None]
) -> tuple[Path, tuple[FileDigest, ...]]:
    """The folder (or file) of a source, every byte checked against the lock.

    Raises SourceError naming the file whose size or digest is not the lock's.
    """
    if source.path is not None:
        return source.path, source.files
    from huggingface_hub import snapshot_download

    step, total = f"sources.{source.name}", sum(file.size for file in source.locked)
    with hub_errors(f"source {source.name!r}", source.spec.value, ""):
        folder = Path(
            snapshot_download(
                source.spec.value,
                repo_type=source.spec.repo_type,
                revision=source.commit,
                allow_patterns=[_literal(file.path) for file in source.locked],
                endpoint=endpoint,
                token=token or False,
                local_files_only=offline,
                tqdm_class=_progress_bars(step, total, report),
            )
        )
    digests, done = [], 0
    for file in source.locked:
        path = folder / file.path
        if not path.is_file():
            raise SourceError(f"{file.path} of {source.spec.value} is not here", mend="Run once without --offline.")
        size = path.stat().st_size
        if size != file.size:
            raise _differs(source, file, path, f"is {size} bytes, and the lock says {file.size}")
        sha256 = hash_file(path)
        found = sha256 if file.is_lfs else git_blob_sha1(path)
        if found != file.oid:
            raise _differs(source, file, path, f"has digest {found[:16]}…, and the lock says {file.oid[:16]}…")
        digests.append(FileDigest(_inside(file.path, source.spec), size, sha256))
        done += size
        report(Progress(step, "checking", done, total, "B"))
    inside = source.spec.file or source.spec.folder
    return (folder / inside if inside else folder), tuple(digests)


def _progress_bars(step: str, total: int, report: Callable[[Event], None]) -> Any:
    """A tqdm class that draws nothing and reports bytes: the client's bars would fight with our own line."""
    import io

    from tqdm.auto import tqdm

    class Reported(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self.unit == "B" and self.n:
                report(Progress(step, "downloading", min(self.n, total), total, "B"))
            return drawn

    return Reported


def _inside(path: str, spec: SourceSpec) -> str:
    return path[len(spec.folder.rstrip("/")) + 1 :] if spec.folder else path


def _literal(path: str) -> str:
    """An fnmatch pattern that matches that path alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _differs(source: Source, file: LockedFile, path: Path, how: str) -> SourceError:
    return SourceError(
        f"{file.path} of {source.spec.value} {how}",
        where=str(path),
        mend="The copy here is damaged, or the lock is not of this repository: delete the file and run again.",
    )
