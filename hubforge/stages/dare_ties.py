"""Task vectors thinned out at random, of which only what agrees in sign is added up: DARE with TIES."""

from __future__ import annotations

from typing import ClassVar

from hubforge.stages.dare_linear import DareLinear


class DareTies(DareLinear):
    """The base model plus what agrees in sign of task vectors of which a random share was kept and scaled up.

    The choice at random is that of `dare_linear`; the sign of each element is elected by the weighted sum, as in
    mergekit, and what is of the other sign is left out.
    """

    elects: ClassVar[bool] = True
    formula: ClassVar[str] = "δᵢ = wᵢ · mᵢ ⊙ (Wᵢ − W) / d;  W + λ · Σ {δᵢ : sign δᵢ = sign Σ δ},  mᵢ ~ Bernoulli(d)"
    source: ClassVar[str] = "Yu et al. 2023, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708"
