"""Task vectors merged by SCE: select what varies, calculate weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.op import Place
from hubforge.stages._models import FromBase, indexed
from hubforge.stages.ram import sum_of
from hubforge.tensors.selection import largest

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

    def whole(self) -> bool:
        return self.select_topk < 1

    def measures(self) -> int:
        return int(not self.whole())

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        held = indexed(self.models, w)
        return {str(index): squares(w[model] - w[self.base_model]) for index, model in held}

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base = w[self.base_model]
        held = indexed(self.models, w)
        deltas = [w[model] - base for _, model in held]
        if self.whole():
            mask = varying(deltas, self.select_topk)
            deltas = [delta * mask for delta in deltas]
            sums = [squares(delta) for delta in deltas]
        else:
            sums = [at.totals[str(index)] for index, _ in held]
        weights = [value / (sum(sums) or 1.0) for value in sums]
        sign = sum_of(deltas).sign()
        sign[sign == 0] = 1.0  # as in TIES
        agrees = [(delta * sign > 0).float() for delta in deltas]
        merged = sum_of([delta * weight * voice for delta, weight, voice in zip(deltas, weights, agrees, strict=True)])
        divisor = sum_of([voice * weight for weight, voice in zip(weights, agrees, strict=True)])
        return base + merged / divisor.masked_fill_(divisor == 0, 1.0)


def varying(deltas: Sequence[Tensor], share: float) -> Tensor:
    """Where the variance over the models is among the largest: that share, rounded down, of where it is not zero."""
    mean = sum_of(deltas) / len(deltas)
    variance = sum_of([(delta - mean).square() for delta in deltas])
    return largest(variance, int(share * int(variance.count_nonzero())))


def squares(delta: Tensor) -> float:
    """The sum of all squares; float64."""
    return float(delta.double().square().sum())
