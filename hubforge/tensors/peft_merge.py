"""PEFT's arithmetic on the tensors of several adapters: prune each, then sum, or elect signs and average what agrees.

The same values in the same order as peft.utils.merge_utils 0.21, so the bits are the same, given the same state of the
generator. Masks are floats of 0 and 1, which torch multiplies by ten times as fast as by booleans.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SignMethod = Literal["total", "frequency"]


def combine(
    method: Method,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float = 1.0,
    sign_method: SignMethod = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One tensor from several of a shape, float32.

    linear: Σ wᵢ·τᵢ. magnitude_prune and dare_linear: the same of pruned tensors. ties and dare_ties: of those pruned
    by magnitude or at random, the mean of wᵢ·τᵢ over the i whose sign is the elected one. `generator` draws for DARE,
    one tensor after another.
    """
    import torch

    if method.startswith("dare"):
        tensors = [drop(tensor, density, generator) for tensor in tensors]
    elif method != "linear":
        tensors = [trim(tensor, density) for tensor in tensors]
    elected = elect_sign(tensors, sign_method) if method in ("ties", "dare_ties") else None
    # Sums start from a zero, as torch's do: the sum of negative zeros is then a positive one.
    merged, part = torch.zeros_like(tensors[0]), torch.empty_like(tensors[0])
    agrees, count = torch.empty_like(merged), torch.zeros_like(merged)
    for tensor, weight in zip(tensors, weights, strict=True):
        torch.mul(tensor, weight, out=part)
        if elected is None:
            merged += part
        else:
            torch.sign(tensor, out=agrees).mul_(elected).clamp_(min=0)
            count += agrees
            merged += part.mul_(agrees)
    return merged if elected is None else merged.div_(count.clamp_(min=1))


def signed_roots(scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """The factors of each adapter's A and B in what PEFT does with factors: √|scale| each, A with the scale's sign."""
    roots = [math.sqrt(abs(scale)) for scale in scales]
    return [-root if scale < 0 else root for root, scale in zip(roots, scales, strict=True)], roots


def trim(tensor: Tensor, density: float) -> Tensor:
    """The tensor with only its int(density · n) largest magnitudes, the rest zero.

    Equal magnitudes at the threshold (factors in bfloat16 have many) are taken as torch.topk takes them.
    """
    import torch

    if density >= 1:
        return tensor
    # Unsorted it takes the same ones, in half the time.
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * tensor.numel()), sorted=False).indices
    trimmed = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    trimmed[kept] = flat[kept]
    return trimmed.view(tensor.shape)


def drop(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """The tensor with each value kept by a chance of `density` and divided by it, so that its mean stays; else zero.

    Source: Yu et al. 2023, arXiv:2311.03099.
    """
    import torch

    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def elect_sign(tensors: Sequence[Tensor], method: SignMethod) -> Tensor:
    """Sign of the sum (total) or of the sum of signs (frequency): +1 or -1.

    A zero sum elects +1, as PEFT does; the paper leaves it open.
    """
    import torch

    votes = torch.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor if method == "total" else tensor.sign()
    return votes.sign_().mul_(2).add_(1).clamp_(-1, 1)


def generator_for(seed: int, name: str) -> torch.Generator:
    """torch's generator on the CPU, seeded by step and module: what is drawn depends on no order and no thread."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
