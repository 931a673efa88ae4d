"""The weighted mean of adapters' deltas, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hubforge.op import AdapterRef, Context, Kind, Metrics, Op
from hubforge.tensors.adapter import open_adapter
from hubforge.tensors.adapter_writer import Merged, merge_adapters

if TYPE_CHECKING:
    from torch import Tensor


class Average(Op):
    """An adapter whose delta is the weighted mean of the adapters' deltas, whatever their ranks.

    Nothing is lost: the factors are stacked, so the rank is the sum of the ranks. A module that an adapter lacks
    counts as a delta of zero. Unlike PEFT's `linear`, which averages the factors A and B separately and so is not the
    mean of the products; up to the normalisation of the weights it is PEFT's `cat`.
    """

    makes: ClassVar[Kind] = "adapter"
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "merge"
    formula: ClassVar[str] = "Δ = Σ wᵢ · scalingᵢ · Bᵢ · Aᵢ / Σ wᵢ"
    source: ClassVar[str] = "Wortsman et al. 2022, arXiv:2203.05482 (the mean); peft add_weighted_adapter, `cat`"

    adapters: list[AdapterRef] = Field(min_length=1, description="Adapters of one base, of any rank and scaling.")
    weights: list[float] | None = Field(
        None, description="One factor per adapter; divided by their sum, which must not be 0. By default all equal."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Element type of the factors.")

    @model_validator(mode="after")
    def _one_weight_each(self) -> Average:
        if self.weights is None:
            return self
        if len(self.weights) != len(self.adapters):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.adapters)} adapters")
        if not all(math.isfinite(weight) for weight in self.weights) or math.fsum(self.weights) == 0:
            raise ValueError("weights must be finite numbers whose sum is not 0")
        return self

    def run(self, ctx: Context) -> Metrics:
        weights = shares(self.weights or [1.0] * len(self.adapters))
        with ExitStack() as stack:
            adapters = [stack.enter_context(open_adapter(ctx.path(ref), str(ref))) for ref in self.adapters]
            # Every module gets the whole rank, filled up with zeros where an adapter lacks it: many programs that
            # serve adapters cannot read one whose ranks differ.
            ranks = [max(module.rank for module in adapter.modules.values()) for adapter in adapters]

            def merge(module: Merged) -> tuple[Tensor, Tensor]:
                scaled = [
                    (adapters[i].factors(part.name), weights[i] * part.scaling) for i, part in module.parts.items()
                ]
                return stack_factors(scaled, sum(ranks))

            return merge_adapters(ctx, adapters, merge, lambda module: sum(ranks), self.dtype)


def shares(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def stack_factors(scaled: Sequence[tuple[tuple[Tensor, Tensor], float]], rank: int) -> tuple[Tensor, Tensor]:
    """Factors (A, B) of `rank` with B·A = Σ sᵢ · Bᵢ·Aᵢ, given ((Aᵢ, Bᵢ), sᵢ); A takes the scale, zeros fill up."""
    import torch

    a = torch.cat([a * scale for (a, _), scale in scaled])
    b = torch.cat([b for (_, b), _ in scaled], dim=1)
    padding = rank - a.shape[0]
    return torch.nn.functional.pad(a, (0, 0, 0, padding)), torch.nn.functional.pad(b, (0, padding))
