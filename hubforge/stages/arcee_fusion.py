"""A base model that takes from another only the elements that changed most, where its rows changed most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hubforge.op import ModelRef, Place
from hubforge.stages._models import FromBase
from hubforge.tensors.selection import TURNS, narrow, survey

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = (0.25, 0.5, 0.75)
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

    def measures(self) -> int:
        return TURNS

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, Any]:
        return survey({"importance": lambda: importance(w[self.models[0]], w[self.base_model])}, at)

    def combine(self, found: Sequence[Mapping[str, Any]], at: Place) -> Mapping[str, Any]:
        n = math.prod(at.shape)
        # What stands at a place from below is the least of so many largest.
        return narrow(found, {"importance": [n - int(share * (n - 1)) for share in QUARTILES]}, at)

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base, other = w[self.base_model], w[self.models[0]]
        threshold = outstanding(*(cut.threshold for cut in at.totals["importance"]))
        return other.where(importance(other, base) >= threshold, base)


def importance(other: Tensor, base: Tensor) -> Tensor:
    """Of each element: its change times the divergence of its row, which is the last dimension."""
    if base.dim() == 0:
        return (other - base).abs() * 0  # the softmax of one number is 1, whatever it is
    p, q = other.softmax(-1) + EPSILON, base.softmax(-1) + EPSILON
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    return (other - base).abs() * divergence


def outstanding(first: float, median: float, third: float) -> float:
    """The median plus 1.5 times the distance of the quartiles; of two middle elements the lower."""
    return median + 1.5 * (third - first)
