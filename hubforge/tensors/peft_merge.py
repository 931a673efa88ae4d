"""PEFT's arithmetic on the tensors of several adapters: prune each, then sum, or elect signs and average what agrees.

The same operations in the same order as peft.utils.merge_utils 0.21, so the bits are the same, given the same state of
the generator.
"""

from __future__ import annotations

import hashlib
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
    stacked = torch.stack(list(tensors))
    weighted = stacked * torch.tensor(list(weights)).view(-1, *[1] * (stacked.dim() - 1))
    if method in ("ties", "dare_ties"):
        agrees = stacked.sign() == elect_sign(stacked, sign_method)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)
    return weighted.sum(0)


def trim(tensor: Tensor, density: float) -> Tensor:
    """The tensor with only its int(density · n) largest magnitudes, the rest zero."""
    import torch

    if density >= 1:
        return tensor
    kept = tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


def drop(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """The tensor with each value kept by a chance of `density` and divided by it, so that its mean stays; else zero.

    Source: Yu et al. 2023, arXiv:2311.03099.
    """
    import torch

    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def elect_sign(stacked: Tensor, method: SignMethod) -> Tensor:
    """Sign of the sum (total) or of the sum of signs (frequency) over the first dimension; a zero sum elects +1."""
    import torch

    votes = stacked if method == "total" else stacked.sign()
    return torch.where(votes.sum(0) >= 0, 1, -1)


def generator_for(seed: int, name: str) -> torch.Generator:
    """torch's generator on the CPU, seeded by step and module: what is drawn depends on no order and no thread."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
