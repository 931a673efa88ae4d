"""Task vectors merged by SCE: select what varies, calculate weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hubforge.op import Place
from hubforge.stages._models import FromBase, indexed
from hubforge.stages._task_vectors import divide, positive_or_negative
from hubforge.stages.ram import sum_of
from hubforge.tensors.selection import TURNS, largest, narrow, survey

if TYPE_CHECKING:
    from torch import Tensor


class Sce(FromBase):
    """The base model plus a weighted mean of the task vectors at the elements where they vary most.

    The weight of a model in a tensor is the share of its squared changes among all models'; at each element only
    models of the majority's sign count. mergekit 0.1.5 weights all models alike where the mean squared changes sum to
    less than 1e-6, as those of most fine-tunes do; here they are weighted as in the paper.
    """

    formula: ClassVar[str] = "W + Σ {wᵢ · mask · Δᵢ} / Σ {wᵢ} over the i with sign Δᵢ = sign Σ Δ,  wᵢ = ΣΔᵢ² / ΣⱼΣΔⱼ²"
    source: ClassVar[str] = "Wan et al. 2024, arXiv:2408.07990"

    select_topk: float = Field(
        1.0, gt=0, le=1, description="Share kept of the elements that vary over the models, by variance; in (0, 1]."
    )

    def measures(self) -> int:
        return TURNS + 1 if self.select_topk < 1 else 1

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, Any]:
        held = indexed(self.models, w)
        if at.turn == self.measures() - 1:
            deltas = self.selected([w[model] - w[self.base_model] for _, model in held], at)
            return {str(index): squares(delta) for (index, _), delta in zip(held, deltas, strict=True)}
        varying = cache(lambda: variance([w[model] - w[self.base_model] for _, model in held]))
        found = survey({"variance": varying}, at)
        return found | {"varying": int(varying().count_nonzero())} if at.turn == 0 else found

    def combine(self, found: Sequence[Mapping[str, Any]], at: Place) -> Mapping[str, Any]:
        if at.turn == self.measures() - 1:
            return {**at.totals, **super().combine(found, at)}
        varying = sum(each["varying"] for each in found) if at.turn == 0 else at.totals["varying"]
        return {**narrow(found, {"variance": [int(self.select_topk * varying)]}, at), "varying": varying}

    def selected(self, deltas: list[Tensor], at: Place) -> list[Tensor]:
        """The task vectors with all but what varies most set to zero."""
        if self.select_topk == 1:
            return deltas
        mask = largest(variance(deltas), at.totals["variance"][0], at).sign_()
        return [delta * mask for delta in deltas]

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base = w[self.base_model]
        held = indexed(self.models, w)
        deltas = self.selected([w[model] - base for _, model in held], at)
        sums = [at.totals[str(index)] for index, _ in held]
        weights = [value / (sum(sums) or 1.0) for value in sums]
        sign = positive_or_negative(sum_of(deltas))
        merged, divisor = base.new_zeros(base.shape), base.new_zeros(base.shape)
        for delta, weight in zip(deltas, weights, strict=True):
            agrees = (delta.sign() * sign).clamp_(min=0)
            merged.addcmul_(delta, agrees, value=weight)
            divisor.add_(agrees, alpha=weight)
        return divide(merged, divisor).add_(base)


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """Of the models, at each element, times their number: the order is the same."""
    mean = sum_of(deltas) / len(deltas)
    return sum_of([(delta - mean).square_() for delta in deltas])


def squares(delta: Tensor) -> float:
    """The sum of all squares; float64."""
    return float(delta.double().square().sum())
