"""A base model that takes from another only the elements that changed most, where its rows changed most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.op import ModelRef, Place
from hubforge.stages._models import FromBase
from hubforge.tensors.selection import kth_smallest

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-8  # added to each probability, as mergekit does


class ArceeFusion(FromBase):
    """The base model with the elements of the other whose importance stands out, by Tukey's rule.

    The importance of an element is how far it moved, times how far the softmax of its row did (their KL divergence).
    Quartiles are those of all elements; mergekit 0.1.5 takes a random million of larger tensors.
    """

    hides: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "W₁ where I ≥ median(I) + 1.5 · (Q₃ − Q₁)(I), else W;  I = |W₁ − W| · KL(softmax W₁ ‖ softmax W) by row"
    )
    source: ClassVar[str] = "Arcee Fusion, https://arcee.ai; mergekit 0.1.5, merge_methods/arcee_fusion.py"

    models: list[ModelRef] = Field(min_length=1, max_length=1, description="The one other model.")

    def whole(self) -> bool:
        return True

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base, other = w[self.base_model], w[self.models[0]]
        scores = importance(other, base)
        return other.where(scores >= outstanding(scores), base)


def importance(other: Tensor, base: Tensor) -> Tensor:
    """Of each element: its change times the divergence of its row, which is the last dimension."""
    if base.dim() == 0:
        return (other - base).abs() * 0  # the softmax of one number is 1, whatever it is
    p, q = other.softmax(-1) + EPSILON, base.softmax(-1) + EPSILON
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    return (other - base).abs() * divergence


def outstanding(scores: Tensor) -> float:
    """The median plus 1.5 times the distance of the quartiles; of two middle elements the lower."""
    first, median, third = (kth_smallest(scores, int(share * (scores.numel() - 1))) for share in (0.25, 0.5, 0.75))
    return median + 1.5 * (third - first)
