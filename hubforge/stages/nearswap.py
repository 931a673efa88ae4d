"""A base model pulled towards another, no element further than a fixed distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from hubforge.op import ModelRef, Place
from hubforge.stages._models import FromBase
from hubforge.tensors.schedule import Schedule, values_of

if TYPE_CHECKING:
    from torch import Tensor


class Nearswap(FromBase):
    """The base model, each element moved towards the other model's by at most `t`.

    Elements that differ by less are swapped. mergekit writes it as weights, (1 − w) · W + w · W₁ with w = t / |W₁ − W|
    cut to [0, 1], which is the same.
    """

    hides: ClassVar[bool] = True
    formula: ClassVar[str] = "W + clamp(W₁ − W, −t, t)"
    source: ClassVar[str] = "alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"

    models: list[ModelRef] = Field(min_length=1, max_length=1, description="The one other model.")
    t: Schedule = Field(description="Largest change of an element, at least 0; 0 gives the base's bytes.")

    @model_validator(mode="after")
    def _t_is_a_distance(self) -> Nearswap:
        if min(values_of(self.t)) < 0:
            raise ValueError("t is negative, but must be at least 0: it is the largest change of an element")
        return self

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base, other = w[self.base_model], w[self.models[0]]
        t = self.value(self.t, at)
        delta = other - base
        # What is swapped has the other's very bits: W + (W₁ − W) would round twice.
        return other.where(delta.abs() <= t, base + delta.clamp(-t, t))
