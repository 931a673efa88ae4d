"""Task vectors thinned out by magnitude and chance, of which only what agrees in sign is merged: DELLA."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hubforge.stages.della_linear import DellaLinear


class Della(DellaLinear):
    """The base model plus the mean of what agrees in sign of task vectors thinned out by magnitude and chance.

    The three steps of the paper: drop (as in `della_linear`), elect (the sign of each element, by the weighted sum),
    fuse (the weighted mean of the elements of that sign).
    """

    elects: ClassVar[bool] = True
    formula: ClassVar[str] = "δᵢ = mᵢ ⊙ (Wᵢ − W) / pᵢ;  W + λ · Σ {wᵢ · δᵢ} / Σ {wᵢ} over the i with the elected sign"
    normalize: bool = Field(True, description="Whether to divide by the sum of the weights that were added up.")
