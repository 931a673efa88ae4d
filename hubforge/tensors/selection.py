"""The largest magnitudes of a tensor that is never held whole: exactly as many as asked for, in passes over blocks.

The first pass takes a sample, which brackets the threshold. The second counts what lies above the bracket, and how
often each magnitude within it occurs, which gives the threshold exactly. A third is for brackets that missed it, since
the sample misled: the result does not depend on it. Of equal magnitudes at the threshold (differences of bfloat16
weights have many) the first in order are taken. It is all done in integers: the bits of non-negative floats rise with
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubforge.op import Place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TURNS = 3  # passes that `survey` needs
SAMPLE = 1 << 17  # least number of magnitudes in a sample; a tensor with no more is searched whole
_STRIDE = 251  # most elements to one of the sample
_SIGMAS = 6  # half the width of a bracket, in standard errors of the sample's quantile
_TOP = 0x7FFFFFFF  # the bits of the largest magnitude, NaN included
_INFINITE = 0x7F800000


@dataclass(frozen=True)
class Cut:
    """Which magnitudes are the largest: those above a threshold, and the first of those that equal it."""

    bits: int  # of the threshold, a float32
    row: int = -1  # where the block begins that holds the last of the equal ones that are taken
    equal: int = 0  # how many of that block's are taken

    @property
    def threshold(self) -> float:
        """The least magnitude that is taken; 0 where every element but zeros is."""
        return _value(self.bits)


@dataclass(frozen=True)
class Bracket:
    """The bits of magnitudes, first and last, among which a threshold is sought."""

    low: int
    high: int


Found = Mapping[str, Any]  # of one block, or of the whole tensor: for each name, a Bracket or Cut for each count


def survey(values: Mapping[str, Callable[[], Tensor]], at: Place) -> dict[str, Any]:
    """What a block adds to the search for the largest magnitudes of the named tensors; for `measure`.

    values: what gives the block of each; not called where nothing is sought any more.
    """
    if at.turn == 0:
        return {name: _sampled(value, at) for name, value in values.items()}
    found: dict[str, Any] = {"row": at.first}
    for name, value in values.items():
        sought = [cut if isinstance(cut, Bracket) else None for cut in at.totals[name]]
        found[name] = _counted(value(), sought) if any(sought) else [None] * len(sought)
    return found


def narrow(found: Sequence[Found], counts: Mapping[str, Sequence[int]], at: Place) -> dict[str, list[Cut | Bracket]]:
    """What is known after a pass; for `combine`. After `TURNS` all are Cuts.

    counts: how many of the largest are wanted, of each named tensor; any number of such choices.
    """
    import numpy as np

    elements = math.prod(at.shape)
    if at.turn == 0:
        known: dict[str, list[Cut | Bracket]] = {}
        for name, wanted in counts.items():
            sample = np.sort(np.concatenate([each[name] for each in found]))[::-1]
            known[name] = [_bracket(sample, count, elements) for count in wanted]
        return known
    rows = [each["row"] for each in found]
    return {
        name: [
            _cut(sought, count, rows, [each[name][place] for each in found]) if isinstance(sought, Bracket) else sought
            for place, (sought, count) in enumerate(zip(at.totals[name], wanted, strict=True))
        ]
        for name, wanted in counts.items()
    }


def largest(block: Tensor, cut: Cut, at: Place) -> Tensor:
    """A block with all but the chosen elements zero."""
    import numpy as np
    import torch
    from torch.nn.functional import hardshrink

    below = _value(max(cut.bits - 1, 0))  # hardshrink keeps what is larger
    if at.first != cut.row:
        return hardshrink(block, below if at.first < cut.row else cut.threshold)
    flat = block.reshape(-1)
    last = int(np.flatnonzero(_bits(flat) == cut.bits)[cut.equal - 1]) + 1
    parts = hardshrink(flat[:last], below), hardshrink(flat[last:], cut.threshold)
    return torch.cat(parts).view(block.shape)


def kth_smallest(tensor: Tensor, index: int) -> float:
    """The value that would stand at `index` (from 0) if all elements at hand were sorted upwards; linear time."""
    import numpy as np

    return float(np.partition(tensor.flatten().numpy(), index)[index])


def _value(bits: int) -> float:
    import numpy as np

    return float(np.uint32(bits).view(np.float32))


def _bits(flat: Tensor) -> NDArray[np.uint32]:
    """The bits of the magnitudes."""
    import numpy as np

    bits: NDArray[np.uint32] = flat.cpu().numpy().view(np.uint32) & np.uint32(_TOP)
    return bits


def _sampled(value: Callable[[], Tensor], at: Place) -> NDArray[np.uint32]:
    """Every so many magnitudes of a block, by their place in the tensor; none of a tensor that is searched whole."""
    import numpy as np

    elements = math.prod(at.shape)
    if elements <= SAMPLE:
        return np.empty(0, np.uint32)
    stride = min(elements // SAMPLE, _STRIDE) | 1  # Odd, so that it runs through all columns.
    start = at.first * (elements // at.shape[0])
    return _bits(value().reshape(-1)[-start % stride :: stride].contiguous())


def _bracket(sample: NDArray[np.uint32], count: int, elements: int) -> Cut | Bracket:
    """Where the threshold of the `count` largest is to be sought, from a sample in falling order."""
    if count <= 0:
        return Cut(_INFINITE)
    if count >= elements:
        return Cut(0)
    size = len(sample)
    if not size:
        return Bracket(1, _TOP)
    share = count / elements
    margin = _SIGMAS * math.sqrt(share * (1 - share) / size) + 2 / size
    first, last = math.floor((share - margin) * size), math.ceil((share + margin) * size)
    low, high = int(sample[last]) if last < size else 1, int(sample[first]) if first >= 0 else _TOP
    # Zeros are never sought: whether one is taken makes no difference.
    return Bracket(max(low, 1), max(high, 1))


def _counted(block: Tensor, sought: Sequence[Bracket | None]) -> list[Any]:
    """For each bracket: how many lie above it, and the bits within it, each once, with how often they occur."""
    import numpy as np

    bits = _bits(block.reshape(-1))
    found: list[Any] = []
    for bracket in sought:
        if bracket is None:
            found.append(None)
            continue
        inside = np.subtract(bits, np.uint32(bracket.low)) <= np.uint32(bracket.high - bracket.low)
        within = np.unique(bits[np.flatnonzero(inside)], return_counts=True)
        above = int(np.count_nonzero(bits > np.uint32(bracket.high))) if bracket.high < _TOP else 0
        found.append((above, *within))
    return found


def _cut(bracket: Bracket, count: int, rows: Sequence[int], blocks: Sequence[Any]) -> Cut | Bracket:
    """The cut, if its threshold lies in the bracket; else where to look on."""
    import numpy as np

    left = count - sum(above for above, _, _ in blocks)
    if left <= 0:
        return Bracket(bracket.high + 1, _TOP)
    bits, place = np.unique(np.concatenate([bits for _, bits, _ in blocks]), return_inverse=True)
    often = np.bincount(place, np.concatenate([often for _, _, often in blocks]), len(bits)).astype(np.int64)
    down_to = often[::-1].cumsum()  # how many there are from the top down to each
    if not len(bits) or left > down_to[-1]:
        return Cut(0) if bracket.low == 1 else Bracket(1, bracket.low - 1)
    place_of = int(np.searchsorted(down_to, left))
    threshold = int(bits[len(bits) - 1 - place_of])
    left -= int(down_to[place_of - 1]) if place_of else 0
    for row, (_, bits, often) in zip(rows, blocks, strict=True):
        held = int(often[bits == threshold].sum())
        if held >= left:
            return Cut(threshold, row, left)
        left -= held
    raise AssertionError("counts do not add up")
