"""What a repository's own files say about it: card, tags, parameters. The `model_info` of the Hub."""

from __future__ import annotations

import datetime
import json
import math
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from hubforge.hub.storage.front_matter import BadFrontMatter, Card, read_card
from hubforge.hub.storage.repository import Commit, Repository
from hubforge.hub.storage.tree import Tree

_CARD_LIMIT = 4 << 20
_HEADER_LIMIT = 25 << 20  # A safetensors header; the format itself allows 100 MB.


def iso(seconds: float) -> str:
    """A time as the Hub writes it: `2026-01-31T12:00:00.000Z`."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def card_of(repo: Repository, tree: Tree) -> Card:
    """The card of a commit; without metadata when its YAML is bad, empty when there is no README.md."""
    entry = tree.files.get("README.md")
    return _card(repo.path_of(entry)) if entry else Card({}, "", has_block=False)


@lru_cache(maxsize=256)
def _card(path: Path) -> Card:
    with path.open("rb") as handle:
        text = handle.read(_CARD_LIMIT).decode("utf-8", "replace")
    try:
        return read_card(text)
    except BadFrontMatter:
        return Card({}, text, has_block=False)


def parameters_of(repo: Repository, tree: Tree) -> dict[str, Any] | None:
    """Parameters by dtype, as safetensors headers at the repository's root state; None without any."""
    counts: dict[str, int] = {}
    for path, entry in tree.files.items():
        if path.endswith(".safetensors") and "/" not in path:
            for dtype, count in _header_counts(repo.path_of(entry)):
                counts[dtype] = counts.get(dtype, 0) + count
    return {"parameters": counts, "total": sum(counts.values())} if counts else None


@lru_cache(maxsize=512)
def _header_counts(path: Path) -> tuple[tuple[str, int], ...]:
    """(dtype, elements) of each tensor; nothing when the header is not one."""
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > _HEADER_LIMIT:
                return ()
            header = json.loads(handle.read(length))
        return tuple(
            (str(spec["dtype"]), math.prod(int(side) for side in spec["shape"]))
            for name, spec in header.items()
            if name != "__metadata__"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return ()


def config_of(repo: Repository, tree: Tree) -> dict[str, Any] | None:
    """`architectures`, `model_type` and the like from config.json."""
    entry = tree.files.get("config.json")
    if entry is None or entry.size > 1 << 20:
        return None
    try:
        config = json.loads(repo.read(entry, 1 << 20))
        return {key: config[key] for key in ("architectures", "model_type", "quantization_config") if key in config}
    except (ValueError, TypeError, RecursionError):
        return None


def _strings(value: object) -> list[str]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


def tags_of(card: dict[str, Any], tree: Tree, config: dict[str, Any] | None) -> list[str]:
    """The tags that the Hub draws from metadata and files, in its order, none twice."""

    def found() -> Iterator[str]:
        yield from _strings(card.get("library_name"))
        for ending in ("safetensors", "gguf", "onnx"):
            if any(path.endswith("." + ending) for path in tree.files):
                yield ending
        yield from _strings((config or {}).get("model_type"))
        yield from _strings(card.get("tags"))
        yield from _strings(card.get("pipeline_tag"))
        yield from _strings(card.get("language"))
        yield from (f"dataset:{each}" for each in _strings(card.get("datasets")))
        for base in _strings(card.get("base_model")):
            yield f"base_model:{base}"
            if relation := card.get("base_model_relation"):
                yield f"base_model:{relation}:{base}"
        yield from (f"license:{each}" for each in _strings(card.get("license")))

    return list(dict.fromkeys(found()))


def info(repo: Repository, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    """The JSON of `GET /api/models/ID`. blobs: with each file's size and digests."""
    about = repo.about()
    tree = repo.tree(commit)
    card = card_of(repo, tree).data
    seen: dict[str, Any] = {
        "_id": commit.id[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "lastModified": iso(commit.date),
        "createdAt": iso(about["created"]),
        "private": about["visibility"] == "private",
        "visibility": about["visibility"],
        "gated": about["gated"],
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "siblings": [],
        "cardData": card,
    }
    for path, entry in tree.files.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            facts: Any = entry.as_json()
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256:
                lfs = facts["lfs"]
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": lfs["pointerSize"]}
        seen["siblings"].append(sibling)
    if blobs:
        seen["usedStorage"] = repo.used()  # Looks at every stored file, so only when details are asked for.
    config = config_of(repo, tree)
    seen["tags"] = tags_of(card, tree, config)
    if repo.kind == "models":
        seen["modelId"] = repo.id
        seen |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        if config:
            seen["config"] = config
        if parameters := parameters_of(repo, tree):
            seen["safetensors"] = parameters
    if repo.kind == "spaces":
        seen["sdk"] = about.get("sdk") or card.get("sdk") or "static"
    return seen
