"""Lay a checkpoint out before any of it is computed: which tensor lies at which byte of which shard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from hubforge.tensors import dtypes
from hubforge.tensors.names import natural_order

GB = 10**9


@dataclass(frozen=True)
class Slot:
    """The place of one tensor: bytes [start, end) of the file of that name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(self.shape[0] if self.shape else 1, 1)


@dataclass(frozen=True)
class Layout:
    """Every file's header and size, and every tensor's slot, in the order of the files' bytes."""

    slots: dict[str, Slot]
    headers: dict[str, bytes]  # file -> length prefix and JSON, padded to 8 bytes
    sizes: dict[str, int]  # file -> bytes, header included
    index: tuple[str, bytes] | None  # name and content of the index; None for a single file

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values()) + (len(self.index[1]) if self.index else 0)


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_shard_bytes: int = 5 * GB, stem: str = "model"
) -> Layout:
    """The layout of tensors (name, dtype, shape), shards filled in turn up to `max_shard_bytes`.

    The order is the names' natural order, so it does not depend on how the inputs were sharded. Within a shard wider
    dtypes come first, so that every tensor starts at a multiple of its element size.
    """
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    filled = total = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: natural_order(tensor[0])):
        size = dtypes.nbytes(dtype, math.prod(shape))
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape, size))
        filled += size
        total += size
    slots: dict[str, Slot] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{suffix}.safetensors"
        shard.sort(key=lambda tensor: -dtypes.BITS[tensor[1]])
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape, size in shard:
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + offset
        start = len(headers[file])
        for name, dtype, shape, size in shard:
            slots[name] = Slot(name, dtype, shape, file, start, start + size)
            start += size
    return Layout(slots, headers, sizes, _index(slots, total, stem) if len(shards) > 1 else None)


def _index(slots: dict[str, Slot], total: int, stem: str) -> tuple[str, bytes]:
    weight_map = {name: slots[name].file for name in sorted(slots)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    return f"{stem}.safetensors.index.json", text.encode("utf-8")
