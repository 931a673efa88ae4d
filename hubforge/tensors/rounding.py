"""Rounding to the output's dtype: to the nearest value or at random, and what it does to a merge.

bfloat16 keeps 8 bits: a change much smaller than its weight is rounded away. The *effective gain* of a tensor is
<rounded - W, merged - W> / <merged - W, merged - W>: 1 when the whole change survives, 0 when none does.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from hubforge.tensors.random import uniform

if TYPE_CHECKING:
    from torch import Tensor, dtype

_MEASURED_AT_ONCE = 1 << 16  # elements: with what is made of them they stay in the cache of a core
LOW = 0.9  # below this the merge is not the one that was asked for


def round_to(rows: Tensor, kind: dtype, how: str, seed: int, name: str, first: int) -> Tensor:
    """Some rows of a tensor in another float type. how: nearest (half to even), or stochastic.

    Stochastic: the value below or above, each as likely as the other is near, so that the mean is the value itself;
    what the type holds exactly stays. The random numbers belong to the seed, the tensor's name and the element's place
    (`first` is that of the first element), so neither blocks nor threads show. Source: Gupta et al. 2015,
    arXiv:1502.02551; Zamirai et al. 2020, arXiv:2010.06192 (bfloat16).
    """
    import torch

    if how == "nearest" or kind not in (torch.bfloat16, torch.float16) or rows.dtype == kind:
        return rows.to(kind)
    values = rows.float().contiguous()
    drawn = uniform(seed, ("rounding", name), first, values.numel()).to(values.device).view(values.shape)
    # A float32 whose last bits are cut off goes towards zero by less than one step; a random share of a step is added
    # to its magnitude first. Infinities and NaN have no neighbours.
    bits = 16 if kind == torch.bfloat16 else 13
    whole = values.view(torch.int32)
    lifted = (whole + (drawn * (1 << bits)).int()) & -(1 << bits)
    rounded = lifted.view(torch.float32)
    if kind == torch.float16:  # Below its normal range all steps are 2^-24.
        steps = (values.abs() * 2.0**24 + drawn).floor() * 2.0**-24
        rounded = rounded.where(values.abs() >= 2.0**-14, steps.copysign(values))
    return rounded.where(torch.isfinite(values), values).to(kind)


def round_packed(base: Tensor, merged: Tensor) -> tuple[Tensor, float, float]:
    """Float32 rows on the CPU as bfloat16, to the nearest, and `gain_sums` of them: in one pass, by a kernel."""
    import torch

    from hubforge.tensors import kernels

    rounded = torch.empty(merged.shape, dtype=torch.bfloat16)
    flat = [each.contiguous().reshape(-1).numpy() for each in (base, merged, rounded.view(torch.uint16))]
    kept, intended = kernels.finish(*flat)
    return rounded, kept, intended


def gain_sums(base: Tensor, merged: Tensor, rounded: Tensor) -> tuple[float, float]:
    """(<rounded - W, merged - W>, <merged - W, merged - W>) of some rows."""
    import torch

    step = _MEASURED_AT_ONCE if merged.device.type == "cpu" else max(merged.numel(), 1)
    rows = zip(*(each.reshape(-1).split(step) for each in (base, merged, rounded)), strict=True)
    intended, error = torch.empty((2, step), device=merged.device)
    squares, products = [], []
    for before, wanted, stored in rows:
        one, other = intended[: len(wanted)], error[: len(wanted)]
        torch.sub(wanted, before, out=one)
        squares.append(one.dot(one))
        if rounded.dtype != torch.float32:
            products.append(one.dot(other.copy_(stored).sub_(wanted)))
    sums = torch.stack([*squares, *products]).tolist()  # at once: a GPU is waited for each time
    square = sum(sums[: len(squares)])
    return square + sum(sums[len(squares) :]), square


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
