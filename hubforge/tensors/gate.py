"""Importance in [0, 1]: what the values of a Fisher become before a change is damped by 1 − importance.

`minmax` (F − min) / (max − min); `log` and `sqrt`, minmax of the logarithm (zeros count as the least positive value)
and of the root; `rank`, the share of values below; `clip:p`, minmax with all from the p-quantile on counting as 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from hubforge.errors import StepError

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("minmax", "log", "rank", "sqrt", "clip", "none")
_CLIP = 0.99  # the p of `clip` alone
_PATTERNS = 1 << 15  # bfloat16 numbers from 0 up, by their bits
_BLOCK = 1 << 22  # values counted at once


def known(how: str) -> str:
    """The normalisation, if it is one; ValueError for Pydantic if not."""
    if how in NAMES or (re.fullmatch(r"clip:\d*\.?\d+", how) and 0 < float(how[5:]) <= 1):
        return how
    raise ValueError(f"{how!r} is no normalisation: {', '.join(NAMES[:4])}, clip:P with P in (0, 1], or none")


Normalize = Annotated[str, AfterValidator(known)]


def needs_all(how: str) -> bool:
    """Whether the least and largest value of a tensor are not enough."""
    return how == "rank" or how.startswith("clip")


def normalized(fisher: Tensor, how: str, totals: Mapping[str, float], name: str = "") -> Tensor:
    """F_param in [0, 1], float32, of one tensor's values: all of them for `rank` and `clip`, else some rows of it.

    totals: the least and largest value of the whole tensor (log: the least positive). A tensor whose values are all
    equal has importance 0: none of its weights stands out. name: of the tensor, for errors.
    """
    if how == "none":
        return in_unit_interval(fisher)
    if not needs_all(how):
        return between(fisher, how, totals["min"], totals["max"])
    spread = Spread()
    spread.add(fisher, name)
    require_some(spread.high, name)
    if spread.exact:
        return spread.normalized(fisher, how)
    if how == "rank":
        return _ranks(fisher)
    from hubforge.tensors.selection import kth_smallest

    return between(fisher, how, spread.low, kth_smallest(fisher, math.ceil(quantile_of(how) * fisher.numel()) - 1))


def require_range(low: float, high: float, name: str) -> None:
    """StepError, naming the tensor, unless values from `low` to `high` are finite and not negative."""
    if not 0 <= low <= high < math.inf:
        what = f"{name or 'the mask'} holds values from {low:.3g} to {high:.3g}"
        raise StepError(what, mend="Importance is finite and not negative: make or fetch the mask again.")


def require_some(high: float, name: str) -> None:
    """StepError, naming the tensor, when its largest value is zero: what gradients leave that underflowed."""
    if high == 0:
        mend = "Nothing would be spared there: make or fetch the mask again."
        raise StepError(f"{name or 'the mask'} is zero throughout", mend=mend)


def between(fisher: Tensor, how: str, low: float, high: float) -> Tensor:
    """minmax, log, sqrt or clip, given what becomes 0 and what becomes 1."""
    import torch

    if not low < high:
        return torch.zeros_like(fisher)
    if how == "log":
        return (fisher.clamp(min=low) / low).log() / math.log(high / low)
    if how == "sqrt":
        bottom, top = math.sqrt(low), math.sqrt(high)
        return ((fisher.sqrt() - bottom) / (top - bottom)).clamp(0, 1)
    return ((fisher - low) / (high - low)).clamp(0, 1)


def in_unit_interval(gate: Tensor) -> Tensor:
    """The same values; StepError unless all lie in [0, 1], as a gate's do."""
    if gate.numel() and not (float(gate.min()) >= 0 and float(gate.max()) <= 1):
        mend = "Set `normalize: minmax`, or another way to bring the mask's values to [0, 1]."
        raise StepError("`normalize: none` is for gates, but the mask has values outside [0, 1]", mend=mend)
    return gate


def quantile_of(how: str) -> float:
    """P of `clip:P`."""
    return float(how[5:]) if ":" in how else _CLIP


class Spread:
    """The values of a tensor, or of a whole mask, counted: enough to normalise any one of them.

    Non-negative values are counted by their bfloat16 bits, in the order of which they rise: 2^15 counters hold exact
    ranks and quantiles of any number of bfloat16 values, as `fisher` writes them, after one pass and in 256 kB. Wider
    values are rounded to bfloat16 for ranks and quantiles, and `exact` is then False; least and largest stay exact.
    """

    def __init__(self) -> None:
        import torch

        self.counts = torch.zeros(_PATTERNS, dtype=torch.int64)
        self.low, self.high, self.least_positive, self.exact = math.inf, 0.0, math.inf, True

    def add(self, values: Tensor, name: str = "") -> None:
        """Take in some values; StepError, naming the tensor, when one is negative or not finite."""
        import torch

        flat = values.reshape(-1)
        for first in range(0, flat.numel(), _BLOCK):
            some = flat[first : first + _BLOCK]
            low, high = (float(value) for value in torch.aminmax(some.float()))
            require_range(low, high, name)
            rounded = some.to(torch.bfloat16)
            self.exact = self.exact and (some.dtype == torch.bfloat16 or bool((rounded.float() == some).all()))
            self.counts += torch.bincount(_bits(rounded), minlength=_PATTERNS)[:_PATTERNS]
            self.low, self.high = min(self.low, low), max(self.high, high)
            if (positive := some[some > 0]).numel():
                self.least_positive = min(self.least_positive, float(positive.min()))

    def normalized(self, values: Tensor, how: str) -> Tensor:
        """Importance in [0, 1], float32, of some of the values."""
        import torch

        if how == "rank":
            return self._ranks()[_bits(values.to(torch.bfloat16))].view(values.shape)
        high = self.quantile(quantile_of(how)) if how.startswith("clip") else self.high
        return between(values.float(), how, self.least_positive if how == "log" else self.low, high)

    def quantile(self, share: float) -> float:
        """The least value that `share` of the values do not exceed."""
        import torch

        total = int(self.counts.sum())
        at = int(torch.searchsorted(self.counts.cumsum(0), max(1, math.ceil(share * total))))
        return float(torch.tensor(at, dtype=torch.int16).view(torch.bfloat16))

    def _ranks(self) -> Tensor:
        """By bits: the mean place, in [0, 1], of the values that share them; 0 when all values are equal."""
        import torch

        if int((self.counts > 0).sum()) < 2:
            return torch.zeros(_PATTERNS)
        middle = self.counts.cumsum(0) - (self.counts + 1) / 2
        return (middle / (int(self.counts.sum()) - 1)).float()


def _bits(values: Tensor) -> Tensor:
    """bfloat16 numbers from 0 up as the numbers of their bits, which rise with them; int64, flat."""
    import torch

    # -0 has the sign bit alone.
    return (values.reshape(-1).view(torch.int16) & (_PATTERNS - 1)).long()


def _ranks(fisher: Tensor) -> Tensor:
    """Mid-ranks: equal values share the mean of their places."""
    import torch

    _, place, count = torch.unique(fisher, return_inverse=True, return_counts=True)
    middle = (count.cumsum(0) - (count + 1) / 2) / max(fisher.numel() - 1, 1)
    return middle.float()[place] if len(count) > 1 else torch.zeros_like(fisher)
