"""The largest elements of a tensor: exactly as many as asked for, and by a threshold rather than a sort."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def largest(tensor: Tensor, count: int) -> Tensor:
    """Which `count` elements have the largest magnitudes: bool, of the tensor's shape.

    Of equal magnitudes at the threshold (differences of bfloat16 weights have many) the first in order are taken.
    """
    import torch

    flat = tensor.abs().flatten()
    if count <= 0 or count >= flat.numel():
        return torch.full(tensor.shape, count > 0)
    threshold = kth_smallest(flat, flat.numel() - count)
    chosen = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view(tensor.shape)


def kth_smallest(tensor: Tensor, index: int) -> float:
    """The value that would stand at `index` (from 0) if the elements were sorted upwards; linear time."""
    import numpy as np

    # numpy's introselect takes a third of the time of torch.kthvalue.
    return float(np.partition(tensor.flatten().numpy(), index)[index])
