"""The weighted mean of models."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field, model_validator

from hubforge.combination import Combination
from hubforge.errors import StepError
from hubforge.op import ModelRef, Place
from hubforge.stages._models import Merge, indexed
from hubforge.tensors.schedule import Schedule


class Linear(Merge):
    """The weighted mean of models of one architecture: a model soup."""

    version: ClassVar[int] = 2  # The sum is divided, not each weight.
    combines: ClassVar[bool] = True
    on_gpu: ClassVar[bool] = True
    formula: ClassVar[str] = "Σ wᵢ · Wᵢ / Σ wᵢ"
    source: ClassVar[str] = "Wortsman et al. 2022, arXiv:2203.05482"

    models: list[ModelRef] = Field(
        min_length=1, description="The models, of one architecture; one alone is multiplied, with `normalize: false`."
    )
    weights: list[Schedule] | None = Field(None, description="One factor per model, any sign; by default all equal.")
    normalize: bool = Field(True, description="Whether to divide by the sum of the weights, which must then not be 0.")

    @model_validator(mode="after")
    def _sum_is_not_zero(self) -> Linear:
        weights = [weight for weight in self.weights or [1.0] if isinstance(weight, (int, float))]
        if self.normalize and len(weights) == len(self.weights or [1.0]) and math.fsum(weights) == 0:
            raise ValueError("weights must be numbers whose sum is not 0")
        return self

    def changes(self, name: str, present: frozenset[str]) -> bool:
        others = super().changes(name, present)
        return others or (self.selects(name) and not self.normalize)

    def combination(self, present: frozenset[str], at: Place) -> Combination:
        held = {str(model): self.of_model(self.weights, index, at) for index, model in indexed(self.models, present)}
        total = math.fsum(held.values())
        if self.normalize and total == 0:
            mend = "Give weights whose sum is not 0 there, or `normalize: false`."
            raise StepError(f"the weights of the models that have {at.name} sum to 0", mend=mend)
        # The sum is divided, as in mergekit: dividing each weight would round otherwise where a mean of bfloat16
        # numbers lies half-way between two others. By a power of 2, or for a single weight, dividing weights is exact.
        divisor = total if self.normalize else 1.0
        if abs(math.frexp(divisor)[0]) == 0.5 or sum(weight != 0 for weight in held.values()) == 1:
            return Combination({model: weight / divisor for model, weight in held.items()})
        return Combination(held, divisor)
