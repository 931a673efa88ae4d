"""Task vectors without their largest and smallest elements, added up: model breadcrumbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from hubforge.op import Place
from hubforge.stages._models import FOR_EACH, require_within
from hubforge.stages._task_vectors import ByMagnitude, elements
from hubforge.tensors.schedule import PerModel, values_of
from hubforge.tensors.selection import largest

if TYPE_CHECKING:
    from torch import Tensor


class Breadcrumbs(ByMagnitude):
    """The base model plus the weighted sum of task vectors without their outliers and their smallest elements.

    The share `gamma` of largest magnitudes goes first, then as many of the smallest as leave the share `density`.
    Where density and gamma together exceed 1, fewer outliers go, as in mergekit.
    """

    formula: ClassVar[str] = "W + λ · Σ wᵢ · mᵢ ⊙ (Wᵢ − W),  mᵢ = 1 between the ranks γ and γ + d from the top, else 0"
    source: ClassVar[str] = "Davari and Belilovsky 2023, arXiv:2312.06795"

    density: PerModel = Field(
        1.0, description=f"d, the share of each task vector that is kept, in (0, 1]: {FOR_EACH}; the paper: 0.1."
    )
    gamma: PerModel = Field(
        0.01, description=f"γ, the share of each task vector that is dropped for being too large: {FOR_EACH}."
    )

    @model_validator(mode="after")
    def _shares(self) -> Breadcrumbs:
        require_within("density", self.density, 0, 1, "it is the share of each task vector that is kept")
        if not all(0 <= gamma < 1 for gamma in values_of(self.gamma)):
            raise ValueError(
                "gamma must lie in [0, 1): it is the share of each task vector that is dropped as outliers"
            )
        return self

    def counts(self, index: int, at: Place) -> list[int]:
        """Of the outliers, and of them and what is kept together."""
        n = elements(at)
        kept = int(self.of_model(self.density, index, at) * n)
        outliers = min(int(self.of_model(self.gamma, index, at) * n), n - kept)
        return [outliers, outliers + kept]

    def chosen(self, delta: Tensor, index: int, at: Place) -> Tensor:
        if str(index) not in at.totals:
            return delta
        outliers, both = at.totals[str(index)]
        return largest(delta, both, at).sub_(largest(delta, outliers, at))
