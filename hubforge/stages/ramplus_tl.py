"""Task vectors merged as by `ram`, what one model alone changed made up for what it shares with others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.op import Place
from hubforge.stages._models import FromBase, indexed
from hubforge.stages.ram import changed, counts, sum_of

if TYPE_CHECKING:
    from torch import Tensor


class RamplusTl(FromBase):
    """The base model plus the mean of the changes models share and, scaled up, those that one model alone made.

    The more of a model's changes in a tensor are shared (and so averaged), the larger the factor of its own.
    """

    formula: ClassVar[str] = (
        "W + Σ λᵢ · Δᵢ where one changed, mean {Δᵢ} where several did;  λᵢ = 1 + r · min(sharedᵢ / aloneᵢ, α)"
    )
    source: ClassVar[str] = "Reinforced Agent Merging Plus, tensor-local, 2026, arXiv:2601.13572"

    r: float = Field(0.1, ge=0, description="How much of the ratio of shared to own changes is made up for.")
    alpha: float = Field(0.2, ge=0, description="α, the largest ratio that counts.")
    epsilon: float = Field(1e-5, gt=0, description="ε, the change of an element that still counts as none.")

    def measures(self) -> int:
        return 1

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        base = w[self.base_model]
        held = indexed(self.models, w)
        deltas = changed([w[model] - base for _, model in held], self.epsilon)
        several = counts(deltas) > 1
        found = {}
        for (index, _), delta in zip(held, deltas, strict=True):
            found[f"shared {index}"] = float(((delta != 0) & several).sum())
            found[f"alone {index}"] = float(((delta != 0) & ~several).sum())
        return found

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base = w[self.base_model]
        held = indexed(self.models, w)
        deltas = changed([w[model] - base for _, model in held], self.epsilon)
        number = counts(deltas)
        alone = [delta * self.factor(index, at) for (index, _), delta in zip(held, deltas, strict=True)]
        return base + sum_of(alone).where(number == 1, sum_of(deltas) / number.clamp(min=1))

    def factor(self, index: int, at: Place) -> float:
        """λᵢ of this tensor. A model with no change of its own has nothing to scale."""
        ratio: float = at.totals[f"shared {index}"] / max(at.totals[f"alone {index}"], self.epsilon)
        return 1 + self.r * min(ratio, self.alpha)
