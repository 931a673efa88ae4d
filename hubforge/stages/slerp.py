"""Two models joined along the arc between them, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from hubforge.op import ModelRef, Place
from hubforge.stages._models import Models, from_base
from hubforge.tensors.schedule import Schedule, values_of

if TYPE_CHECKING:
    from torch import Tensor


class Slerp(Models):
    """The model a share `t` of the way to another along the great arc between them, each tensor for itself.

    The angle is taken by atan2, in float64, from the difference of the two: it stays exact for models that are nearly
    the same, where an arccosine loses it. A tensor that is zero in one model, or whose angle is 0 or π, has no arc;
    it goes along the straight line instead.
    """

    version: ClassVar[int] = 2  # The second product is added without being rounded.
    formula: ClassVar[str] = "sin((1 − t)·θ) / sin θ · W + sin(t·θ) / sin θ · W_to,  θ = ∠(W, W_to)"
    source: ClassVar[str] = "Shoemake 1985, doi:10.1145/325334.325242"

    model: ModelRef = Field(description="The model at t = 0; config and tokenizer come from it.")
    to: ModelRef = Field(description="The model at t = 1, of the same shapes.")
    t: Schedule = Field(description="Share of the angle that is gone, in [0, 1]; 0 gives the model's bytes.")

    @field_validator("t")
    @classmethod
    def _is_a_share(cls, t: Schedule) -> Schedule:
        for value in values_of(t):
            if not 0 <= value <= 1:
                raise ValueError(f"is {value:g}, but must lie in [0, 1]: it is the share of the angle that is gone")
        return t

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        return from_base(self.model, [self.to])

    def changes(self, name: str, present: frozenset[str]) -> bool:
        return super().changes(name, present) and any(t > 0 for t in values_of(self.t))

    def measures(self) -> int:
        return 1

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        return products(w[self.model], w[self.to])

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        if at.totals["dd"] == 0:
            return w[self.model]
        t = self.value(self.t, at)
        if t in (0, 1):  # An infinite bound times 0 would be NaN.
            return w[self.to if t else self.model]
        kept, taken = shares(angle(**at.totals), t)
        return (w[self.model] * kept).add_(w[self.to], alpha=taken)


def products(a: Tensor, b: Tensor) -> dict[str, float]:
    """What `angle` needs: a·a, a·d and d·d of d = b − a, in float64."""
    x = a.double().flatten()
    d = b.double().flatten().sub_(x)
    return {"aa": float(x @ x), "ad": float(x @ d), "dd": float(d @ d)}


def angle(aa: float, ad: float, dd: float) -> float:
    """The angle between a and a + d, in [0, π], from the products a·a, a·d and d·d; 0 if either vector is zero.

    atan2(|a × (a + d)|, a · (a + d)), where |a × (a + d)|² = |a|²|d|² − (a · d)² (Lagrange's identity).
    """
    cross = math.sqrt(max(aa * dd - ad * ad, 0.0))
    return math.atan2(cross, aa + ad)


def shares(theta: float, t: float) -> tuple[float, float]:
    """How much of each end makes up the point `t` of the way along an arc of angle theta."""
    if not math.sin(theta) > 1e-6:  # no arc, or one so short that the line is it within float32
        return 1 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
