"""Models merged by TIES: trim what each changed, elect signs, merge what agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from hubforge.op import Place
from hubforge.stages._models import FOR_EACH, require_within
from hubforge.stages._task_vectors import ByMagnitude, elements
from hubforge.tensors.schedule import PerModel
from hubforge.tensors.selection import largest

if TYPE_CHECKING:
    from torch import Tensor


class TiesModels(ByMagnitude):
    """The base model plus the mean of what agrees in sign of the models' trimmed task vectors.

    mergekit's `ties`; `op: ties` is PEFT's, of adapters. Here signs are elected after weighting and the mean is over
    the weights of what agrees; there before it, and over the number.
    """

    elects: ClassVar[bool] = True
    formula: ClassVar[str] = "δᵢ = wᵢ · trim(Wᵢ − W);  W + λ · Σ {δᵢ} / Σ {wᵢ} over the i with sign δᵢ = sign Σ δ"
    source: ClassVar[str] = "Yadav et al. 2023, arXiv:2306.01708"

    density: PerModel = Field(
        0.2, description=f"Share of each task vector that is kept, the largest by magnitude, in (0, 1]: {FOR_EACH}."
    )
    normalize: bool = Field(True, description="Whether to divide by the sum of the weights that were added up.")

    @model_validator(mode="after")
    def _density_is_a_share(self) -> TiesModels:
        require_within("density", self.density, 0, 1, "it is the share of each task vector that is kept")
        return self

    def counts(self, index: int, at: Place) -> list[int]:
        # At least one, as in mergekit: a norm of a few elements keeps its largest.
        return [max(1, int(self.of_model(self.density, index, at) * elements(at)))]

    def chosen(self, delta: Tensor, index: int, at: Place) -> Tensor:
        cuts = at.totals.get(str(index))
        return largest(delta, cuts[0], at) if cuts else delta
