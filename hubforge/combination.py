"""What many merges are: one weighted sum of their inputs. Said once, it is computed by torch or by compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
