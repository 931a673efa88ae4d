"""What rounding to the output's dtype does to a merge: how much of the intended change survives, and NaN or infinity.

bfloat16 keeps 8 bits: a change much smaller than its weight is rounded away. The *effective gain* of a tensor is
<rounded - W, merged - W> / <merged - W, merged - W>: 1 when the whole change survives, 0 when none does.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LOW = 0.9  # below this the merge is not the one that was asked for


def gain_sums(base: Tensor, merged: Tensor, rounded: Tensor) -> tuple[float, float]:
    """(<rounded - W, merged - W>, <merged - W, merged - W>) of some rows, all float32."""
    intended = (merged - base).flatten()
    kept = (rounded - base).flatten()
    return float(kept.dot(intended)), float(intended.dot(intended))


def gain_metrics(sums: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Least, median and largest effective gain over the tensors, and the five that kept least.

    Tensors whose intended change is zero have no gain and are only counted.
    """
    gains = {name: kept / intended for name, (kept, intended) in sums.items() if intended > 0}
    found: dict[str, Any] = {"tensors": len(gains), "unchanged": len(sums) - len(gains)}
    if gains:
        worst = sorted(gains.items(), key=lambda item: (item[1], item[0]))[:5]
        found |= {
            "min": round(worst[0][1], 4),
            "median": round(median(gains.values()), 4),
            "max": round(max(gains.values()), 4),
            "worst": [[name, round(gain, 4)] for name, gain in worst],
        }
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; a sum tells all but always."""
    import torch

    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def not_finite(tensor: Tensor, base: Tensor) -> bool:
    """Whether some value is NaN, or is infinite where the base's is not the same infinity (as clamp bounds are)."""
    import torch

    return not is_finite(tensor) and bool((~torch.isfinite(tensor) & (tensor != base)).any())
