"""What a source's own files say of it: the facts that cards show. Read once, kept in the store beside its digests.

Everything here comes from other people's files: it is read as data, bounded in size, and shown escaped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubforge.errors import SourceError
from hubforge.events import Report
from hubforge.lock import fetch
from hubforge.op import FileDigest
from hubforge.publisher import Hub
from hubforge.sources import Source
from hubforge.store import LocalStore, write_json

MAX_JSON = 64 << 20  # bytes; the largest real index is a few megabytes


@dataclass(frozen=True)
class SourceFacts:
    """A source that is here: where, its digests, and what its own files say."""

    path: Path
    files: tuple[FileDigest, ...]
    repo: str | None
    facts: dict[str, Any]


def gather(source: Source, store: LocalStore, hub: Hub, *, offline: bool, report: Report) -> SourceFacts:
    """Where a source is and what is known of it; fetches it when it is not here. Raises SourceError."""
    repo = None if source.spec.is_local else source.spec.value
    record = store.root / "sources" / f"{source.key}.json"
    known = _recorded(record, source)
    if known is not None:
        path, files, facts = known
        return SourceFacts(path, files, repo, facts)
    path, files = fetch(source, hub.endpoint, hub.token, offline=offline, report=report)
    facts = _read(source, path)
    folder = path if path.is_dir() else path.parent
    stamps = {file.path: (folder / file.path).stat().st_mtime_ns for file in files}
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"path": str(path), "files": [[f.path, f.size, f.sha256] for f in files], "stamps": stamps,
                        "facts": facts})  # fmt: skip
    return SourceFacts(path, files, repo, facts)


def _recorded(record: Path, source: Source) -> tuple[Path, tuple[FileDigest, ...], dict[str, Any]] | None:
    """What was recorded of a source, if its files are still there and untouched since they were checked."""
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        path = Path(data["path"])
        files = tuple(FileDigest(*file) for file in data["files"])
        folder = path if path.is_dir() else path.parent
        for file in files:
            stat = (folder / file.path).stat()
            if stat.st_size != file.size or stat.st_mtime_ns != data["stamps"][file.path]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if source.path is not None and path != source.path:
        return None
    return path, files, dict(data["facts"])


def _json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; {} when there is none. Raises SourceError when it is not JSON."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise SourceError(f"{path.name} is over {MAX_JSON >> 20} MB", where=str(path))
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path.name} is not JSON: {error}", where=str(path)) from error
    return data if isinstance(data, dict) else {}


def _read(source: Source, path: Path) -> dict[str, Any]:
    """The facts of a source, by kind."""
    if source.kind == "model":
        return _model(path)
    if source.kind == "adapter":
        return _adapter(path)
    if source.kind == "dataset":
        return _dataset(path)
    return {}


def _model(path: Path) -> dict[str, Any]:
    """architecture, model_type, dtype, parameters (from the safetensors headers), whether it has a chat template."""
    from hubforge.tensors.reader import open_checkpoint

    config = _json(path / "config.json")
    architectures = config.get("architectures")
    facts: dict[str, Any] = {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "model_type": config.get("model_type"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
    }
    with open_checkpoint(path) as checkpoint:
        facts["parameters"] = sum(checkpoint.info(name).elements for name in checkpoint)
    tokenizer = _json(path / "tokenizer_config.json")
    if tokenizer.get("chat_template") or list(path.glob("chat_template*")):
        facts["chat_template"] = True
    return {key: value for key, value in facts.items() if value is not None}


def _adapter(path: Path) -> dict[str, Any]:
    """rank, alpha, use_rslora, use_dora, target_modules, base_model, and `training` where training.json tells."""
    config = _json(path / "adapter_config.json")
    facts = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "use_rslora": config.get("use_rslora") or None,
        "use_dora": config.get("use_dora") or None,
        "target_modules": config.get("target_modules"),
        "base_model": _public(config.get("base_model_name_or_path")),
        "training": _json(path / "training.json") or None,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _public(base: Any) -> str | None:
    """A base model as recorded, unless it is a path on somebody's machine: then only its last part."""
    if not isinstance(base, str) or not base:
        return None
    return Path(base).name if base.startswith(("/", ".", "~")) or base.count("/") > 1 or "\\" in base else base


def _dataset(path: Path) -> dict[str, Any]:
    """rows, where counting needs no library: lines of .jsonl and .txt files."""
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    count = 0
    for file in files:
        if file.suffix not in (".jsonl", ".txt"):
            return {}
        with file.open("rb") as stream:
            count += sum(1 for line in stream if line.strip())
    return {"rows": count} if count else {}
