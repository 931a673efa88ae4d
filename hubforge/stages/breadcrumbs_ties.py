"""Task vectors without their largest and smallest elements, of which only what agrees in sign is added up."""

from __future__ import annotations

from typing import ClassVar

from hubforge.stages.breadcrumbs import Breadcrumbs


class BreadcrumbsTies(Breadcrumbs):
    """The base model plus what agrees in sign of task vectors without their outliers and their smallest elements.

    The choice is that of `breadcrumbs`; the sign of each element is elected by the weighted sum, as in mergekit.
    """

    elects: ClassVar[bool] = True
    formula: ClassVar[str] = "δᵢ = wᵢ · mᵢ ⊙ (Wᵢ − W);  W + λ · Σ {δᵢ : sign δᵢ = sign Σ δ}"
    source: ClassVar[str] = "Davari and Belilovsky 2023, arXiv:2312.06795; Yadav et al. 2023, arXiv:2306.01708"
