"""Merges from bytes to bytes: bfloat16 as it lies in the files, combined by compiled kernels, without torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hubforge.tensors.chain import Link, Measure
from hubforge.tensors.desk import Kept
from hubforge.tensors.inputs import Weights
from hubforge.tensors.targets import Target

if TYPE_CHECKING:
    from numpy import ndarray

    from hubforge.op import Place

# Elements to compute from which the kernels save more than the second it takes to load them: where they take torch's
# place, which takes longer to load, and where they only round what it computed.
_WORTH, _WORTH_ROUNDING = 1 << 26, 1 << 31


def has_kernels(wanted: Sequence[Target]) -> bool:
    """Whether compiled kernels are at hand, and so much is computed that they pay."""
    changed = [target for target in wanted if not target.copied]
    if (
        sum(target.elements for target in changed if target.packed) < _WORTH
        and sum(target.elements for target in changed) < _WORTH_ROUNDING
    ):
        return False
    try:
        from hubforge.tensors import kernels  # noqa: F401 - compiled, or loaded, before there are threads
    except (ImportError, OSError):
        return False
    return True


class Packed(threading.local):
    """One per run; every thread that touches it has buffers of its own."""

    def __init__(self, link: Link, kept: Kept) -> None:
        self._link, self._kept = link, kept
        self._buffers: dict[str, ndarray] = {}

    def copy(self, target: Target, block: int) -> memoryview:
        """The bytes of a block that no op changes."""
        (checkpoint, name), (first, last) = target.leaf, target.blocks[block]
        data = self._buffer("out", checkpoint.row_bytes(name) * (last - first)).data
        checkpoint.read_into(name, first, last, data)
        return data

    def measure(self, one: Measure, target: Target, block: int) -> Mapping[str, Any]:
        """What the op must know of a block. Its rows stay in memory until they are written, as far as that goes."""
        first, last = target.blocks[block]
        refs, rows = self._rows(target, first, last, again=True)
        return self._link.op.measure_packed(
            dict(zip(refs, rows, strict=True)), self._link.place(one.source, first, one.turn)
        )

    def compute(self, target: Target, block: int) -> tuple[memoryview, float, float]:
        """The bytes of a block, and its gain sums, which are not finite where something in the block is not."""
        import numpy as np

        first, last = target.blocks[block]
        refs, rows = self._rows(target, first, last, again=False)
        place = self._link.place(self._link.outputs[target.name].source, first)
        out = self._buffer("out", 2 * rows.shape[1])
        make = self._thin if self._link.op.thins else self._combine
        kept, intended = make(refs, rows, place, out.view(np.uint16))
        return out.data, kept, intended

    def _combine(self, refs: list[str], rows: ndarray, place: Place, out: ndarray) -> tuple[float, float]:
        import numpy as np

        from hubforge.tensors import kernels

        asked = self._link.op.combination(frozenset(refs), place)
        picked = np.array([refs.index(ref) for ref in asked.weights])
        weights = np.array(list(asked.weights.values()), np.float32)
        sums: tuple[float, float] = kernels.combine(
            rows, picked, weights, np.float32(asked.divisor), asked.origin is not None, out
        )
        return sums

    def _thin(self, refs: list[str], rows: ndarray, place: Place, out: ndarray) -> tuple[float, float]:
        import numpy as np

        from hubforge.tensors import kernels

        asked = self._link.op.thinned_sum(frozenset(refs), place)
        picked = np.array([refs.index(part.ref) for part in asked.parts])
        factors = np.array([part.factor for part in asked.parts], np.float32)
        weights = np.array([part.weight for part in asked.parts], np.float32)
        kept = self._buffer("kept", len(picked) * rows.shape[1]).view(np.bool_).reshape(len(picked), -1)
        for part, chosen in zip(asked.parts, kept, strict=True):
            if part.kept is None:
                chosen.fill(True)
            else:
                part.kept(chosen)
        sums: tuple[float, float] = kernels.thin(
            rows, picked, kept, factors, weights, asked.elects, asked.normalize, np.float32(asked.scale), out
        )
        return sums

    def _rows(self, target: Target, first: int, last: int, *, again: bool) -> tuple[list[str], ndarray]:
        """The refs that have part in a target, the base first, and their rows, uint16 [refs, elements].

        again: they will be asked for once more.
        """
        import numpy as np

        source, by_ref = self._link.outputs[target.name].source, self._link.inputs.by_ref
        refs = [ref for ref, held in by_ref.items() if source in held]
        kept = self._kept.get(target.name, (first, last), last=not again)
        if kept is not None:
            return refs, kept
        size = target.leaf[0].row_bytes(target.leaf[1]) * (last - first) * len(refs)
        rows = (np.empty(size, np.uint8) if again else self._buffer("rows", size)).reshape(len(refs), -1)
        for ref, row in zip(refs, rows, strict=True):
            held = by_ref[ref]
            assert isinstance(held, Weights)
            held.checkpoint.read_into(held.names[source], first, last, row.data)
        if again:
            self._kept.put(target.name, (first, last), rows.view(np.uint16))
        return refs, rows.view(np.uint16)

    def _buffer(self, name: str, size: int) -> ndarray:
        import numpy as np

        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size]
