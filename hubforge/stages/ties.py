"""Adapters merged by TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.op import AdapterRef, Context, Kind, Metrics, Op
from hubforge.tensors.adapter import Adapter, open_adapter
from hubforge.tensors.adapter_writer import Merged, align, merge_adapters
from hubforge.tensors.peft_merge import SignMethod, combine, signed_roots

if TYPE_CHECKING:
    from torch import Tensor


class Ties(Op):
    """An adapter of the same rank, each factor merged by TIES: trimmed, signs elected, the agreeing values averaged.

    The numbers are those of PEFT's `add_weighted_adapter(combination_type="ties")`: it works on A and B separately,
    not on their products as the paper does on weights. Each takes the square root of |weight · scaling|, and A its
    sign. One difference: PEFT 0.21 applies rsLoRA's scaling to the merged factors once more, which already hold it.
    """

    makes: ClassVar[Kind] = "adapter"
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "merge"
    formula: ClassVar[str] = "γ = sign Σ trim(τᵢ);  τ = mean of wᵢ · trim(τᵢ) over the i with sign trim(τᵢ) = γ"
    source: ClassVar[str] = "Yadav et al. 2023, arXiv:2306.01708; peft.utils.merge_utils.ties"

    adapters: list[AdapterRef] = Field(min_length=2, description="Adapters of one base and one rank.")
    weights: list[float] | None = Field(
        None, description="One factor per adapter, any sign; by default 1 each. Not normalised."
    )
    density: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Share of each factor that is kept, the largest by magnitude, in (0, 1]; paper: 0.2.",
    )
    majority_sign_method: SignMethod = Field(
        "total", description="How signs are elected: by the sum of values (total) or by their number (frequency)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Element type of the factors.")

    @model_validator(mode="before")
    @classmethod
    def _not_of_models(cls, fields: object) -> object:
        if isinstance(fields, dict) and "models" in fields:
            raise ValueError("`op: ties` merges adapters; `op: ties_models` merges models")
        return fields

    @model_validator(mode="after")
    def _one_weight_each(self) -> Ties:
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.adapters)} adapters")
        if not all(math.isfinite(weight) for weight in self.weights or []):
            raise ValueError("weights must be finite numbers")
        return self

    def run(self, ctx: Context) -> Metrics:
        weights = self.weights or [1.0] * len(self.adapters)
        with ExitStack() as stack:
            adapters = [stack.enter_context(open_adapter(ctx.path(ref), str(ref))) for ref in self.adapters]
            _require_one_rank(adapters, ctx)

            def merge(module: Merged) -> tuple[Tensor, Tensor]:
                factors = [adapters[i].factors(part.name) for i, part in module.parts.items()]
                signed, roots = signed_roots([weights[i] * part.scaling for i, part in module.parts.items()])
                how = self.density, self.majority_sign_method
                return (
                    combine("ties", [a for a, _ in factors], signed, *how),
                    combine("ties", [b for _, b in factors], roots, *how),
                )

            return merge_adapters(ctx, adapters, merge, lambda module: module.first.rank, self.dtype)


def _require_one_rank(adapters: Sequence[Adapter], ctx: Context) -> None:
    for module in align(adapters, ctx.where):
        ranks = {adapters[i].name: part.rank for i, part in module.parts.items()}
        if len(set(ranks.values())) > 1:
            found = ", ".join(f"{rank} in {name}" for name, rank in ranks.items())
            what = f"ties needs adapters of one rank, but that of {module.name} is {found}"
            raise StepError(what, where=ctx.where, mend="`op: average` merges adapters of any ranks.")
