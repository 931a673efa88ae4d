"""The mean of fine-tuned models, drawn back to the base the more their changes disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.op import ModelRef, Place
from hubforge.stages._gram import products
from hubforge.stages._models import FromBase, indexed

if TYPE_CHECKING:
    from torch import Tensor


class ModelStock(FromBase):
    """The point between the base and the models' mean that geometry puts nearest the centre of all fine-tunes.

    θ is the angle between two models as seen from the base, its cosine averaged over the pairs: for models that all
    changed alike t is 1, the mean; for changes at right angles it is 0, the base.
    """

    formula: ClassVar[str] = "t · mean Wᵢ + (1 − t) · W,  t = N·cos θ / (1 + (N − 1)·cos θ)"
    source: ClassVar[str] = "Jang et al. 2024, arXiv:2403.19522"

    models: list[ModelRef] = Field(min_length=2, description="The fine-tuned models, of the base's architecture.")
    filter_wise: bool = Field(False, description="Whether each row of a matrix has a t of its own.")

    def measures(self) -> int:
        return 1

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        base = w[self.base_model]
        if self.filter_wise and base.dim() > 1:
            return {}
        return products({index: w[model] - base for index, model in indexed(self.models, w)})

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base = w[self.base_model]
        held = indexed(self.models, w)
        deltas = [w[model] - base for _, model in held]
        mean = deltas[0]
        for more in deltas[1:]:
            mean = mean + more
        mean = mean / len(deltas)
        if self.filter_wise and base.dim() > 1:
            return base + mean * by_row(deltas)
        cosines = [
            cosine(at.totals[f"{i} {j}"], at.totals[f"{i} {i}"], at.totals[f"{j} {j}"])
            for i, j in combinations([index for index, _ in held], 2)
        ]
        return base.add(mean, alpha=share(cosines, len(held)))


def cosine(ab: float, aa: float, bb: float) -> float:
    """Of the angle between two vectors, from their inner products; 0 if either is zero."""
    return ab / math.sqrt(aa * bb) if aa * bb > 0 else 0.0


def share(cosines: list[float], count: int) -> float:
    """t, from the cosines of all pairs of `count` models. A lone model is its own mean; the pole gives the base."""
    if count == 1:
        return 1.0
    mean = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * mean
    return count * mean / denominator if abs(denominator) > 1e-6 else 0.0


def by_row(deltas: list[Tensor]) -> Tensor:
    """t of each row (the last dimension), with that dimension of length 1; computed in float64."""
    import torch

    wide = [delta.double() for delta in deltas]
    norms = [delta.norm(dim=-1, keepdim=True) for delta in wide]
    cosines = [
        (wide[i] * wide[j]).sum(-1, keepdim=True) / (norms[i] * norms[j]).clamp(min=1e-300)
        for i, j in combinations(range(len(wide)), 2)
    ]
    if not cosines:
        return torch.ones_like(norms[0]).float()
    mean = torch.stack(cosines).mean(0)
    denominator = 1 + (len(wide) - 1) * mean
    pole = denominator.abs() <= 1e-6
    return (len(wide) * mean / denominator.masked_fill(pole, 1.0)).masked_fill(pole, 0.0).float()
