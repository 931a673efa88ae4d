"""Any number of models merged on the sphere: the direction of their weighted mean, at their mean length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.errors import StepError
from hubforge.op import ModelRef, Place
from hubforge.stages._gram import combination, gram, products
from hubforge.stages._models import Merge, from_base, indexed
from hubforge.tensors.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


class Multislerp(Merge):
    """The models' barycentre on the sphere, tensor by tensor, or that of what they changed in a base model.

    The models are projected to the tangent plane at the direction of their weighted mean, averaged there and taken
    back. That average is always zero: Σ wᵢ · (uᵢ − (uᵢ·m) · m) = |M| · m − (M·m) · m for M = Σ wᵢ · uᵢ and m = M / |M|.
    So the mean direction itself is the result, at the weighted mean of the lengths.
    """

    formula: ClassVar[str] = "(W₀ +) Σ wᵢ · |Tᵢ| · M / |M|,  M = Σ wᵢ · Tᵢ / |Tᵢ|,  Tᵢ = Wᵢ (− W₀),  Σ wᵢ = 1"
    source: ClassVar[str] = "Goddard 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"

    base_model: ModelRef | None = Field(
        None, description="The origin of the sphere; by default zero, and config and tokenizer are the first model's."
    )
    weights: list[Schedule] | None = Field(None, description="One factor per model; by default all equal.")
    normalize_weights: bool = Field(True, description="Whether to divide the weights by their sum.")

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        return from_base(self.base_model, self.models)

    def measures(self) -> int:
        return 1

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        return products(self.points(w))

    def points(self, w: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The models that have the tensor, as seen from the origin."""
        held = indexed(self.models, w)
        if self.base_model is None:
            return {index: w[model] for index, model in held}
        return {index: w[model] - w[self.base_model] for index, model in held}

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        points = self.points(w)
        weights = [self.of_model(self.weights, index, at) for index in points]
        if self.normalize_weights:
            if sum(weights) == 0:
                raise StepError(f"the weights of the models that have {at.name} sum to 0")
            weights = [weight / sum(weights) for weight in weights]
        inner = gram(at.totals, list(points))
        norms = [math.sqrt(inner[i, i]) for i in range(len(points))]
        # A point at the origin has no direction, and adds to the mean length only.
        shares = [weight / norm if norm else 0.0 for weight, norm in zip(weights, norms, strict=True)]
        length = math.sqrt(max(float(shares @ inner @ shares), 0.0))
        radius = sum(weight * norm for weight, norm in zip(weights, norms, strict=True))
        if length < 1e-8:
            if len(points) > 2 and any(norms):
                mend = "Change the weights: opposite tensors that balance have no mean direction."
                raise StepError(f"{at.name}: the weighted mean of the directions is zero", mend=mend)
            factors = weights  # mergekit's way out for two opposite points: the straight line
        else:
            factors = [radius / length * share for share in shares]
        merged = combination(factors, list(points.values()))
        return merged if self.base_model is None else merged + w[self.base_model]
