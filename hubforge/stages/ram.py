"""Task vectors added where only one model changed the base, and averaged where several did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.op import Place
from hubforge.stages._models import FromBase

if TYPE_CHECKING:
    from torch import Tensor


class Ram(FromBase):
    """The base model plus, at each element, the mean of the changes of those models that changed it at all.

    Made for models trained by reinforcement learning, whose changes are sparse: what one alone learned is kept whole.
    """

    formula: ClassVar[str] = "W + Σ {Δᵢ} / |{Δᵢ}| over the i with |Δᵢ| > ε,  Δᵢ = Wᵢ − W"
    source: ClassVar[str] = "Reinforced Agent Merging 2026, arXiv:2601.13572"

    epsilon: float = Field(1e-5, ge=0, description="ε, the change of an element that still counts as none.")

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base = w[self.base_model]
        deltas = changed([w[model] - base for model in self.models if model in w], self.epsilon)
        return base + sum_of(deltas) / counts(deltas).clamp(min=1)


def changed(deltas: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """The task vectors with what counts as no change set to zero."""
    return [delta * (delta.abs() > epsilon) for delta in deltas]


def counts(deltas: Sequence[Tensor]) -> Tensor:
    """How many of the models changed each element, float32."""
    return sum_of([(delta != 0).float() for delta in deltas])


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in the order of the list."""
    total = tensors[0]
    for more in tensors[1:]:
        total = total + more
    return total
