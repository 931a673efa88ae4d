"""Task vectors thinned out at random, the small elements more often than the large, and added up: DELLA's MagPrune."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from hubforge.op import Place
from hubforge.stages._models import FOR_EACH
from hubforge.stages._task_vectors import TaskVectors, first_element
from hubforge.tensors.random import uniform
from hubforge.tensors.schedule import PerModel, values_of

if TYPE_CHECKING:
    from torch import Tensor


class DellaLinear(TaskVectors):
    """The base model plus the weighted sum of task vectors whose larger elements were more likely to be kept.

    Within each row the probability rises from density − epsilon for the smallest magnitude to density + epsilon for
    the largest, by rank; what is kept is divided by its own probability, as in the paper. (mergekit 0.1.5 scales a
    whole tensor by one factor instead, so that the sum of magnitudes stays the same.) Of equal magnitudes the later
    ranks higher.
    """

    formula: ClassVar[str] = "W + λ · Σ wᵢ · mᵢ ⊙ (Wᵢ − W) / pᵢ,  mᵢ ~ Bernoulli(pᵢ),  pᵢ = d − ε + 2ε · rank in [0, 1]"
    source: ClassVar[str] = "Deep et al. 2024, arXiv:2406.11617"

    density: PerModel = Field(
        1.0, description=f"d, the share of each task vector that is kept: {FOR_EACH}; 1 keeps all of it."
    )
    epsilon: PerModel = Field(
        0.15, description=f"ε, how far the probabilities reach below and above the density: {FOR_EACH}."
    )
    rescale: bool = Field(True, description="Whether to divide what is kept by the probability that it was.")
    seed: int = Field(0, description="Of the choice of elements.")

    @model_validator(mode="after")
    def _probabilities_are_within(self) -> DellaLinear:
        widest = max(values_of(self.epsilon))
        if min(values_of(self.epsilon)) < 0:
            raise ValueError("epsilon is negative, but must be at least 0")
        for density in values_of(self.density):
            if density != 1 and not 0 < density - widest <= density + widest < 1:
                reach = f"{density - widest:g} to {density + widest:g}"
                raise ValueError(f"density - epsilon to density + epsilon is {reach}, but must lie within (0, 1)")
        return self

    def thinned(self, delta: Tensor, index: int, at: Place) -> Tensor:
        density = self.of_model(self.density, index, at)
        if density >= 1:
            return delta
        keep = probabilities(delta, density, self.of_model(self.epsilon, index, at))
        drawn = uniform(self.seed, (index, at.name), first_element(at), delta.numel()).to(delta.device)
        kept = drawn.view(delta.shape) < keep
        return delta * kept / keep if self.rescale else delta * kept


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Of each element to be kept: by its magnitude's rank within its row, which is the last dimension."""
    import torch

    if delta.dim() == 0 or delta.shape[-1] == 1:
        return torch.full_like(delta, density)
    order = delta.abs().sort(dim=-1, stable=True).indices
    ladder = torch.linspace(density - epsilon, density + epsilon, delta.shape[-1]).to(delta.device)
    return torch.empty_like(delta).scatter_(-1, order, ladder.expand(delta.shape))
