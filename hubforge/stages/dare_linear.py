"""Task vectors thinned out at random, rescaled, and added up: DARE."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from hubforge.combination import Part, Thinned
from hubforge.op import Place
from hubforge.stages._models import FOR_EACH, indexed, require_within
from hubforge.stages._task_vectors import TaskVectors, first_element, shares
from hubforge.tensors.random import bernoulli, choose, resolved
from hubforge.tensors.schedule import PerModel

if TYPE_CHECKING:
    from torch import Tensor


class DareLinear(TaskVectors):
    """The base model plus the weighted sum of task vectors of which a random share was kept and scaled up.

    Kept elements are divided by `density`, as in the paper, so that the expected change stays the same; mergekit 0.1.5
    scales so that the sum of magnitudes stays the same, which is that but for chance. Which elements are kept follows
    from the seed, the model's place in the list, the tensor's name and the element's index, and from nothing else;
    density is taken to the nearest multiple of 2⁻¹⁶, both as the chance and in the division.
    """

    version: ClassVar[int] = 2  # 16 bits are drawn for an element.
    thins: ClassVar[bool] = True

    formula: ClassVar[str] = "W + λ · Σ wᵢ · mᵢ ⊙ (Wᵢ − W) / d,  mᵢ ~ Bernoulli(d)"
    source: ClassVar[str] = "Yu et al. 2023, arXiv:2311.03099"

    density: PerModel = Field(
        1.0, description=f"d, the share of each task vector that is kept, in (0, 1]: {FOR_EACH}; the paper: 0.1 to 1."
    )
    rescale: bool = Field(True, description="Whether to divide what is kept by the density.")
    seed: int = Field(0, description="Of the choice of elements.")

    @model_validator(mode="after")
    def _density_is_a_share(self) -> DareLinear:
        require_within("density", self.density, 0, 1, "it is the share of each task vector that is kept")
        return self

    def thinned(self, delta: Tensor, index: int, at: Place) -> Tensor:
        density = self.of_model(self.density, index, at)
        if density >= 1:
            return delta
        kept = bernoulli(self.seed, (index, at.name), first_element(at), delta.numel(), density)
        if self.rescale:
            kept.div_(resolved(density))
        return kept.to(delta.device).view(delta.shape).mul_(delta)

    def thinned_sum(self, present: frozenset[str], at: Place) -> Thinned:
        held = indexed(self.models, present)
        weights = [self.of_model(self.weights, index, at) for index, _ in held]
        if not self.elects:
            weights = shares(weights, self.normalize)
        parts = []
        for (index, model), weight in zip(held, weights, strict=True):
            density = self.of_model(self.density, index, at)
            if density >= 1:
                parts.append(Part(model, weight))
                continue
            chosen = partial(choose, seed=self.seed, names=(index, at.name), first=first_element(at), chance=density)
            parts.append(Part(model, weight, 1 / resolved(density) if self.rescale else 1.0, chosen))
        return Thinned(parts, self.elects, self.normalize, self.value(self.scale, at))
