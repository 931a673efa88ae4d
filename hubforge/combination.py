"""What many merges are: one weighted sum of their inputs, or of what is left of them. Said so, kernels can make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Combination:
    """A tensor as a weighted sum of inputs, by ref: Σ wᵢ·Wᵢ / divisor; or, from an origin W, W + Σ wᵢ·(Wᵢ − W).

    In float32, in the order of the weights, each product added unrounded (a fused multiply-add).
    """

    weights: Mapping[str, float]
    divisor: float = 1.0
    origin: str | None = None

    def of(self, w: Mapping[str, Tensor]) -> Tensor:
        """The sum over float32 rows."""
        import torch

        (first, weight), *rest = self.weights.items()
        if self.origin is not None:
            base, delta = w[self.origin], w[first] - w[self.origin]
            merged = torch.add(base, delta, alpha=weight, out=delta)
            for ref, weight in rest:
                merged.add_(w[ref] - base, alpha=weight)
            return merged
        if not rest and weight == self.divisor == 1:
            return w[first]
        merged = w[first] * weight
        for ref, weight in rest:
            merged.add_(w[ref], alpha=weight)
        return merged if self.divisor == 1 else merged.div_(self.divisor)


@dataclass(frozen=True)
class Part:
    """One task vector of a `Thinned` sum: wᵢ · fᵢ mᵢ ⊙ (Wᵢ − W)."""

    ref: str
    weight: float
    factor: float = 1.0  # f, in float32
    kept: Callable[[NDArray[Any]], Any] | None = None  # writes m, bool (count,), of the rows at hand; None: keeps all


@dataclass(frozen=True)
class Thinned:
    """A tensor W of the base as W + λ · the sum of its parts, in their order; float32.

    elects: only what agrees with the sign of the sum is added up; with `normalize`, over the sum of their weights.
    """

    parts: Sequence[Part]
    elects: bool
    normalize: bool
    scale: float
