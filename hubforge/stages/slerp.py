"""Two models joined along the arc between them, tensor by tensor or as wholes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hubforge.combination import Combination
from hubforge.op import Context, ModelRef, Place
from hubforge.stages._models import Models, from_base
from hubforge.tensors.desk import Desk
from hubforge.tensors.inputs import Opened, is_buffer, open_inputs
from hubforge.tensors.names import natural_order
from hubforge.tensors.schedule import Schedule, values_of
from hubforge.tensors.targets import BLOCK, LIGHT

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor


_SUMMED_AT_ONCE = 1 << 16  # elements of each model in float64, 1 MB for both: in the cache of a core; it orders the sum


@dataclass(frozen=True)
class Whole:
    """The number of layers; and a·a, a·d and d·d of whole models a and a + d."""

    layers: int
    products: Mapping[str, float]


class Slerp(Models):
    """The model a share `t` of the way to another along the great arc between them, each tensor for itself.

    The angle is taken by atan2, in float64, from the difference of the two: it stays exact for models that are nearly
    the same, where an arccosine loses it. A tensor that is zero in one model, or whose angle is 0 or π, has no arc;
    it goes along the straight line instead. (mergekit does so wherever the cosine exceeds 0.9995, which is where most
    fine-tunes of one model are.) With `scope: whole` one angle, that of the models as single vectors of all
    their merged tensors, is taken for every tensor.
    """

    version: ClassVar[int] = 3  # The angle is summed up in another order.
    combines: ClassVar[bool] = True
    on_gpu: ClassVar[bool] = True
    formula: ClassVar[str] = "sin((1 − t)·θ) / sin θ · W + sin(t·θ) / sin θ · W_to,  θ = ∠(W, W_to)"
    source: ClassVar[str] = "Shoemake 1985, doi:10.1145/325334.325242"

    model: ModelRef = Field(description="The model at t = 0; config and tokenizer come from it.")
    to: ModelRef = Field(description="The model at t = 1, of the same shapes.")
    t: Schedule = Field(description="Share of the angle that is gone, in [0, 1]; 0 gives the model's bytes.")

    scope: Literal["tensor", "whole"] = Field(
        "tensor",
        description="What the angle is of: each tensor for itself, or the whole models, which are then read once more.",
    )

    @field_validator("t")
    @classmethod
    def _is_a_share(cls, t: Schedule) -> Schedule:
        for value in values_of(t):
            if not 0 <= value <= 1:
                raise ValueError(f"is {value:g}, but must lie in [0, 1]: it is the share of the angle that is gone")
        return t

    @model_validator(mode="after")
    def _whole_models_have_one_vocabulary(self) -> Slerp:
        if self.scope == "whole" and self.tokenizer is not None:
            raise ValueError("scope: whole takes the models' tensors as they are, so it takes no tokenizer")
        return self

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        return from_base(self.model, [self.to])

    def changes(self, name: str, present: frozenset[str]) -> bool:
        return super().changes(name, present) and any(t > 0 for t in values_of(self.t))

    def apart(self) -> str:
        return "its angle is that of whole models" if self.scope == "whole" else super().apart()

    def prepare(self, ctx: Context) -> Any:
        layers = super().prepare(ctx)
        return Whole(layers, self._products_of_all(ctx)) if self.scope == "whole" else layers

    def _products_of_all(self, ctx: Context) -> dict[str, float]:
        """The products of the models as single vectors; summed in the order of the tensors and their rows."""
        import torch

        with ExitStack() as stack:
            desk = Desk()
            inputs = open_inputs(self, ctx, Opened(stack, desk), {})
            blocks = [
                (name, first, min(first + step, info.rows))
                for name, info in inputs.base.tensors.items()
                if self.changes(name, inputs.present(name)) and not is_buffer(name, inputs)
                for step in [max(1, BLOCK * LIGHT * info.rows // max(info.elements, 1))]
                for first in range(0, info.rows, step)
            ]
            blocks.sort(key=lambda block: (natural_order(block[0]), block[1]))

            def found(block: tuple[str, int, int]) -> dict[str, float]:
                desk.start()
                return products(*(inputs.by_ref[ref].rows(*block) for ref in (str(self.model), str(self.to))))

            before = torch.get_num_threads()
            # One intra-op thread each, as in the engine: more would change the order of sums.
            with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
                each = list(pool.map(found, blocks))
            torch.set_num_threads(before)
        return {name: math.fsum(one[name] for one in each) for name in ("aa", "ad", "dd")}

    def value(self, schedule: Any, at: Place) -> float:
        return super().value(schedule, replace(at, known=at.known.layers) if isinstance(at.known, Whole) else at)

    def measures(self) -> int:
        return int(self.scope == "tensor")

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        return products(w[self.model], w[self.to])

    def measure_packed(self, w: Mapping[str, ndarray], at: Place) -> Mapping[str, float]:
        from hubforge.tensors import kernels

        return dict(zip(("aa", "ad", "dd"), kernels.products(w[self.model], w[self.to]), strict=True))

    def combination(self, present: frozenset[str], at: Place) -> Combination:
        known = at.known.products if isinstance(at.known, Whole) else at.totals
        t = self.value(self.t, at)
        if known["dd"] == 0 or t in (0, 1):  # An infinite bound times 0 would be NaN.
            return Combination({str(self.to if t == 1 else self.model): 1.0})
        kept, taken = shares(angle(**known), t)
        return Combination({str(self.model): kept, str(self.to): taken})


def products(a: Tensor, b: Tensor) -> dict[str, float]:
    """What `angle` needs: a·a, a·d and d·d of d = b − a, in float64: float32's sums would differ between processors."""
    import torch

    one, other = a.flatten(), b.flatten()
    step = min(_SUMMED_AT_ONCE, max(one.numel(), 1))
    both = torch.empty((2, step), dtype=torch.float64, device=a.device)  # a and d
    gram = torch.zeros((2, 2), dtype=torch.float64, device=a.device)
    for first in range(0, one.numel(), step):
        held = both[:, : min(step, one.numel() - first)]
        held[0].copy_(one[first : first + step])
        held[1].copy_(other[first : first + step]).sub_(held[0])
        gram.addmm_(held, held.T)
    (aa, ad), (_, dd) = gram.tolist()
    return {"aa": aa, "ad": ad, "dd": dd}


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
