"""The family of task arithmetic: thin out each task vector, weight them, and add up all or what agrees in sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.op import Place
from hubforge.stages._models import FromBase, indexed
from hubforge.tensors.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


CHUNK = 1 << 18  # elements added up at once: whole tensors would leave the cache, and take three times as long


class TaskVectors(FromBase):
    """The base model plus a sum of the models' task vectors Δᵢ = Wᵢ − W, each thinned out first."""

    elects: ClassVar[bool] = False  # whether only what agrees with the elected sign is added

    weights: list[Schedule] | None = Field(
        None, description="One factor per model, any sign; by default 1 each. mergekit's `weight`."
    )
    normalize: bool = Field(False, description="Whether to divide by the sum of the weights that were added up.")
    scale: float = Field(1.0, allow_inf_nan=False, description="λ, a factor of the whole change; mergekit's `lambda`.")

    def thinned(self, delta: Tensor, index: int, at: Place) -> Tensor:
        """The task vector of one model with what the method drops set to zero."""
        raise NotImplementedError

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base = w[self.base_model]
        held = indexed(self.models, w)
        deltas = [self.thinned(w[model] - base, index, at) for index, model in held]
        weights = [self.of_model(self.weights, index, at) for index, _ in held]
        merge = agreeing_sum if self.elects else weighted_sum
        return base.add(merge(deltas, weights, self.normalize), alpha=self.scale)


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ wᵢ · Δᵢ, or that over Σ wᵢ unless it is 0."""
    total = sum(weights)
    divisor = total if normalize and abs(total) > 1e-8 else 1.0
    merged = deltas[0] * (weights[0] / divisor)
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged = merged.add(delta, alpha=weight / divisor)
    return merged


def agreeing_sum(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """The sum of those wᵢ · Δᵢ whose sign is that of Σ wᵢ · Δᵢ; with `normalize`, over the sum of their wᵢ.

    Signs are elected after weighting and a zero sum elects +1, as in mergekit.
    """
    import torch

    merged = torch.empty(deltas[0].shape)
    chunks = zip(merged.view(-1).split(CHUNK), *(delta.flatten().split(CHUNK) for delta in deltas), strict=True)
    for into, *held in chunks:
        into.copy_(_agreeing(held, weights, normalize))
    return merged


def _agreeing(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """`agreeing_sum` of one chunk."""
    import torch

    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    votes = weighted[0]
    for more in weighted[1:]:
        votes = votes + more
    sign = torch.where(votes >= 0, 1.0, -1.0)
    merged, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for part, weight in zip(weighted, weights, strict=True):
        agrees = part * sign > 0
        merged += part * agrees
        divisor.add_(agrees, alpha=weight)
    if normalize:
        merged /= divisor.masked_fill_(divisor == 0, 1.0)
    return merged
