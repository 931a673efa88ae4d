"""The mean of models weighted, element by element, by how much each model depends on that element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.errors import StepError
from hubforge.op import MaskRef, Place
from hubforge.stages._models import Merge, indexed
from hubforge.tensors.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


class FisherAverage(Merge):
    """The models' mean weighted by their diagonal Fisher information: where the product of their posteriors peaks.

    Each posterior is taken as a Gaussian at the model with the Fisher information as its precision. A tensor for
    which a mask has nothing (norms, say, of which no Fisher was taken) is the plain weighted mean, as is an element
    on which no model depends.
    """

    hides: ClassVar[bool] = True  # An element whose Fisher is no number would be taken for one that nothing depends on.
    formula: ClassVar[str] = "Σ wᵢ · Fᵢ ⊙ Wᵢ / Σ wᵢ · Fᵢ"
    source: ClassVar[str] = "Matena and Raffel 2022, arXiv:2111.09832"

    fishers: list[MaskRef] = Field(min_length=2, description="The Fisher mask of each model, in the models' order.")
    weights: list[Schedule] | None = Field(None, description="wᵢ, one factor per model, at least 0; by default equal.")
    floor: float = Field(0.0, ge=0, description="Least Fisher value that counts; the paper: 1e-6.")

    def misfit(self, field: str, form: str) -> str:
        return "" if form == "fisher" else "Precisions are Fisher masks as `op: fisher` makes them, one per model."

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        held = indexed(self.models, w)
        weights = [self.of_model(self.weights, index, at) for index, _ in held]
        if min(weights) < 0 or sum(weights) == 0:
            raise StepError(f"the weights for {at.name} must be at least 0, and not all 0")
        tensors = [w[model] for _, model in held]
        plain = mean(tensors, [weight / sum(weights) for weight in weights])
        if not all(self.fishers[index] in w for index, _ in held):
            return plain
        precisions = [
            w[self.fishers[index]].clamp(min=self.floor) * weight
            for (index, _), weight in zip(held, weights, strict=True)
        ]
        total = precisions[0]
        for more in precisions[1:]:
            total = total + more
        depends = total > 0
        shares = [precision / total.where(depends, total.new_ones(())) for precision in precisions]
        return mean(tensors, shares).where(depends, plain)


def mean(tensors: list[Tensor], shares: list[float] | list[Tensor]) -> Tensor:
    """Σ sᵢ · Tᵢ."""
    total = tensors[0] * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total = total + tensor * share
    return total
