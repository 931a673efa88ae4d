"""The family of task arithmetic: thin out each task vector, weight them, and add up all or what agrees in sign."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hubforge.op import Place
from hubforge.stages._models import FromBase, indexed
from hubforge.tensors.schedule import PerModel, Schedule, values_of
from hubforge.tensors.selection import TURNS, narrow, survey

if TYPE_CHECKING:
    from torch import Tensor


_FACTOR = "factor of "  # and a model's place in the list: what its task vector is scaled by


class TaskVectors(FromBase):
    """The base model plus a sum of the models' task vectors Δᵢ = Wᵢ − W, each thinned out first."""

    elects: ClassVar[bool] = False  # whether only what agrees with the elected sign is added

    weights: list[Schedule] | None = Field(
        None, description="One factor per model, any sign; by default 1 each. mergekit's `weight`."
    )
    normalize: bool = Field(False, description="Whether to divide by the sum of the weights that were added up.")
    scale: Schedule = Field(1.0, description="λ, a factor of the whole change; mergekit's `lambda`.")

    def thinned(self, delta: Tensor, index: int, at: Place) -> Tensor:
        """The task vector of one model with what the method drops set to zero; `delta` itself, or a new tensor."""
        raise NotImplementedError

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        import torch

        base = w[self.base_model]
        held = indexed(self.models, w)
        deltas = (self.thinned(w[model] - base, index, at) for index, model in held)
        weights = [self.of_model(self.weights, index, at) for index, _ in held]
        merged = (agreeing_sum if self.elects else weighted_sum)(deltas, weights, self.normalize)
        return torch.add(base, merged, alpha=self.value(self.scale, at), out=merged)


class ByMagnitude(TaskVectors):
    """Task vectors of which some of the largest elements are chosen: at a threshold that is measured first."""

    density: PerModel
    rescale: bool = Field(
        False,
        description="Whether what is kept of a task vector is scaled so that its magnitudes sum up to those of the "
        "whole, which takes a pass more; mergekit's `rescale`.",
    )

    def counts(self, index: int, at: Place) -> list[int]:
        """How many of the largest elements of a model's task vector to choose, for each choice that is made."""
        raise NotImplementedError

    def chosen(self, delta: Tensor, index: int, at: Place) -> Tensor:
        """The task vector of one model with what is not chosen set to zero; `delta` itself where all of it is."""
        raise NotImplementedError

    def thinned(self, delta: Tensor, index: int, at: Place) -> Tensor:
        chosen, factor = self.chosen(delta, index, at), at.totals.get(f"{_FACTOR}{index}")
        return chosen if factor is None else chosen.mul_(factor)

    def measures(self) -> int:
        return TURNS + int(self.rescale) if any(density < 1 for density in values_of(self.density)) else 0

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, Any]:
        def delta(model: str) -> Tensor:
            return w[model] - w[self.base_model]

        thin = {index: model for index, model in indexed(self.models, w) if self.of_model(self.density, index, at) < 1}
        if at.turn == TURNS:
            wholes = {index: delta(model) for index, model in thin.items()}
            return {str(index): (_size(whole), _size(self.chosen(whole, index, at))) for index, whole in wholes.items()}
        return survey({str(index): partial(delta, model) for index, model in thin.items()}, at)

    def combine(self, found: Sequence[Mapping[str, Any]], at: Place) -> Mapping[str, Any]:
        if at.turn == TURNS:
            sizes = {
                name: [sum(size) for size in zip(*(each[name] for each in found), strict=True)] for name in found[0]
            }
            # As in mergekit: what is as good as zero stays.
            factors = {name: whole / kept for name, (whole, kept) in sizes.items() if min(whole, kept) >= 1e-7}
            return {**at.totals, **{f"{_FACTOR}{name}": factor for name, factor in factors.items()}}
        return narrow(found, {name: self.counts(int(name), at) for name in found[0] if name.isdecimal()}, at)


def _size(tensor: Tensor) -> float:
    """The sum of the magnitudes."""
    import torch

    return float(torch.sum(tensor.abs(), dtype=torch.float64))


def elements(at: Place) -> int:
    """Of the whole tensor."""
    return math.prod(at.shape)


def first_element(at: Place) -> int:
    """Of the rows at hand, counted over the whole tensor."""
    return at.first * math.prod(at.shape[1:])


def weighted_sum(deltas: Iterable[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ wᵢ · Δᵢ, or that over Σ wᵢ unless it is 0. A new tensor."""
    pairs = zip(deltas, shares(weights, normalize), strict=True)
    delta, share = next(pairs)
    merged = delta * share
    for delta, share in pairs:
        merged.add_(delta, alpha=share)
    return merged


def shares(weights: Sequence[float], normalize: bool) -> list[float]:
    """The weights, or those over their sum unless it is 0."""
    total = sum(weights)
    divisor = total if normalize and abs(total) > 1e-8 else 1.0
    return [weight / divisor for weight in weights]


def agreeing_sum(deltas: Iterable[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """The sum of those wᵢ · Δᵢ whose sign is that of Σ wᵢ · Δᵢ; with `normalize`, over the sum of their wᵢ. Uses up Δᵢ.

    Signs are elected after weighting and a zero sum elects +1, as in mergekit. What agrees is what stays positive when
    multiplied by the elected sign: torch takes ten times as long to choose by booleans.
    """
    import torch

    weighted = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    votes = weighted[0] + weighted[1] if len(weighted) > 1 else weighted[0]
    for more in weighted[2:]:
        votes += more
    sign = positive_or_negative(votes)
    merged, divisor, agreeing = torch.zeros_like(sign), torch.zeros_like(sign), torch.empty_like(sign)
    for part, weight in zip(weighted, weights, strict=True):
        merged.add_(torch.mul(part, sign, out=agreeing).clamp_(min=0))
        if normalize:
            divisor.add_(agreeing.sign_(), alpha=weight)
    merged.mul_(sign)
    return divide(merged, divisor) if normalize else merged


def positive_or_negative(votes: Tensor) -> Tensor:
    """The sign of each element, +1 or -1: +1 of a zero, but of -0, which is the sum of zeros alone, -1."""
    import torch

    return torch.copysign(torch.ones((), device=votes.device), votes)


def divide(merged: Tensor, divisor: Tensor) -> Tensor:
    """merged / divisor, in place; what would be divided by zero stays."""
    if divisor.device.type != "cpu":
        return merged.div_(divisor.masked_fill_(divisor == 0, 1.0))
    by = divisor.numpy()
    by += by == 0  # In a tenth of the time that torch takes on a CPU.
    return merged.div_(divisor)
