"""Adapters merged in any of PEFT's ways, under PEFT's names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.op import AdapterRef, Context, Kind, Metrics, Op
from hubforge.tensors.adapter import Adapter, delta, open_adapter
from hubforge.tensors.adapter_config import CONFIG
from hubforge.tensors.adapter_writer import Merged, align, merge_adapters
from hubforge.tensors.low_rank import LowRank, reduce_matrix, reduce_product, summary, write_ranks
from hubforge.tensors.peft_merge import Method, SignMethod, combine, generator_for, signed_roots
from hubforge.tensors.writer import write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Combination = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
_SUMS = ("linear", "cat", "svd")  # whose result is meant to be Σ wᵢ·Δᵢ


class MergeAdapters(Op):
    """One adapter from several, of any ranks and scalings, combined in any of PEFT's ways, under PEFT's names.

    `cat` is the weighted sum of the deltas, its rank the sum of the ranks; `svd` and `linear` are its best
    approximation of rank `svd_rank`, by exact reduction of the stacked factors. `ties`, `dare_ties`, `dare_linear` and
    `magnitude_prune` work on the factors A and B separately, each scaled by √|weight · scaling|, A with its sign, so
    what they give is no sum of deltas, and all adapters must have one rank; with `_svd` they work on the deltas, whose
    result is then brought to `svd_rank`, the deltas of one module held at a time per thread. How much was kept is in
    `ranks.json`, matrix by matrix.

    Three deviations from PEFT 0.21, which `compatible: peft` takes back. Its `linear` sums the factors, whose product
    holds B of one adapter times A of another. And it applies rsLoRA's scaling to the merged factors once more, which
    hold it already, so that they come out √rank too large. And it merges a single adapter as `linear` whatever was
    asked. DARE draws from torch's generator as PEFT does, but seeded for each module by its name, where PEFT goes on
    through the base model's modules: the same numbers only from the same state of the generator.
    """

    makes: ClassVar[Kind] = "adapter"
    version: ClassVar[int] = 3  # Another eigensolver where few directions are kept.
    pins: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    exact: ClassVar[bool] = False  # LAPACK's last bits depend on the processor; the ways without svd are exact.
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy", "scipy")
    extra: ClassVar[str] = "merge"
    formula: ClassVar[str] = "Δ ≈ Σ wᵢ · prune(scalingᵢ · Bᵢ · Aᵢ)"
    source: ClassVar[str] = (
        "peft LoraModel.add_weighted_adapter; TIES: Yadav et al. 2023, arXiv:2306.01708; "
        "DARE: Yu et al. 2023, arXiv:2311.03099; svd: Eckart and Young 1936"
    )

    adapters: list[AdapterRef] = Field(min_length=1, description="Adapters of one base.")
    combination_type: Combination = Field(
        "svd", description="PEFT's name of the way; `svd` and `cat` are the true weighted sum."
    )
    weights: list[float] | None = Field(
        None, description="One factor per adapter, any sign; by default 1 each. Not normalised."
    )
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of values that pruning keeps, in (0, 1]; for every way but linear, cat, svd.",
    )
    majority_sign_method: SignMethod = Field(
        "total",
        description="ties, dare_ties: how signs are elected, by the sum of values or by their number (frequency).",
    )
    svd_rank: int | None = Field(
        None, ge=1, description="Rank of what is brought to a rank; by default the largest of the adapters'."
    )
    compatible: Literal["peft", "none"] = Field(
        "none", description="peft: do as PEFT 0.21 does where it is wrong, to have what it makes; none: be right."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Element type of the factors.")
    seed: int = Field(0, description="Of what DARE drops.")

    @model_validator(mode="after")
    def _fields_fit(self) -> MergeAdapters:
        way = self.combination_type
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.adapters)} adapters")
        if not all(math.isfinite(weight) for weight in self.weights or []):
            raise ValueError("weights must be finite numbers")
        if self.density is None and way not in _SUMS:
            raise ValueError(f"{way} prunes, so it needs density, the share of values that it keeps")
        if self.density is not None and way in _SUMS:
            raise ValueError(f"{way} prunes nothing, so it takes no density")
        if self.majority_sign_method != "total" and "ties" not in way:
            raise ValueError(f"{way} elects no signs, so it takes no majority_sign_method")
        if self.svd_rank is not None and not (way.endswith("svd") or self._way() == "svd"):
            raise ValueError(f"{way} reduces no rank, so it takes no svd_rank")
        return self

    def _way(self) -> Combination:
        """What is done, by PEFT's name for it."""
        if self.compatible == "none":
            return "svd" if self.combination_type == "linear" else self.combination_type
        return "linear" if len(self.adapters) == 1 else self.combination_type

    def preflight(self, ctx: Context) -> None:
        """Configs, shapes and ranks, where all adapters are there already: only headers are read."""
        if all(ref in ctx.inputs for ref in self.adapters):
            with ExitStack() as stack:
                adapters = [stack.enter_context(open_adapter(ctx.path(ref), str(ref))) for ref in self.adapters]
                for module in align(adapters, ctx.where):
                    if self._way() != "cat" and not self._way().endswith("svd"):
                        _one_rank(module, adapters, self._way(), ctx)

    def run(self, ctx: Context) -> Metrics:
        with ExitStack() as stack:
            adapters = [stack.enter_context(open_adapter(ctx.path(ref), str(ref))) for ref in self.adapters]
            way = self._way()
            if way == "cat":
                metrics = self._stack(ctx, adapters)
            elif way.endswith("svd"):
                metrics = self._reduce(ctx, adapters, way)
            else:
                metrics = self._factors(ctx, adapters, cast(Method, way))
            if self.compatible == "peft" and adapters[0].config.use_rslora:
                _set_rslora(ctx)
                ctx.warn("compatible: peft: rsLoRA's scaling is applied twice, as PEFT does")
        return metrics

    def _weights(self, module: Merged) -> list[float]:
        return [self.weights[i] if self.weights else 1.0 for i in module.parts]

    def _stack(self, ctx: Context, adapters: Sequence[Adapter]) -> Metrics:
        # Every module gets the whole rank, as in PEFT, filled up with zeros where an adapter lacks it.
        total = sum(_widths(adapters))

        def merge(module: Merged) -> tuple[Tensor, Tensor]:
            import torch

            a, b = self._stacked(adapters, module)
            missing = total - a.shape[0]
            return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))

        return merge_adapters(ctx, adapters, merge, lambda module: total, self.dtype)

    def _stacked(self, adapters: Sequence[Adapter], module: Merged) -> tuple[Tensor, Tensor]:
        """(A, B) with B·A = Σ wᵢ·Δᵢ: the factors side by side, A taking the weights."""
        import torch

        factors = [adapters[i].factors(part.name) for i, part in module.parts.items()]
        scales = zip(self._weights(module), module.parts.values(), strict=True)
        # Multiplied one after the other, for PEFT's bits.
        a = [a * weight * part.scaling for (a, _), (weight, part) in zip(factors, scales, strict=True)]
        return torch.cat(a), torch.cat([b for _, b in factors], dim=1)

    def _reduce(self, ctx: Context, adapters: Sequence[Adapter], way: Combination) -> Metrics:
        widths = _widths(adapters)
        limit = self.svd_rank or max(widths)
        if way == "svd":
            limit = min(limit, sum(widths))
        facts: dict[str, dict[str, float]] = {}

        def rank(module: Merged) -> int:
            return min(limit, *module.first.shape)

        def merge(module: Merged) -> tuple[Tensor, Tensor]:
            try:
                found = self._reduced(ctx, adapters, module, way, rank(module))
            except StepError as error:
                mend = "An adapter is damaged: fetch it again."
                raise StepError(f"{module.name}: {error.what}", where=ctx.where, mend=mend) from error
            facts[module.name] = found.facts()
            return found.padded(rank(module))

        metrics = merge_adapters(ctx, adapters, merge, rank, self.dtype)
        write_ranks(ctx.out, facts)
        return metrics | {"energy": summary(facts)}

    def _reduced(
        self, ctx: Context, adapters: Sequence[Adapter], module: Merged, way: Combination, rank: int
    ) -> LowRank:
        if way == "svd":
            return reduce_product(*self._stacked(adapters, module), rank)
        deltas = [delta(part, *adapters[i].factors(part.name)) for i, part in module.parts.items()]
        drawn = generator_for(ctx.seed, module.name)
        merged = self._combine(cast(Method, way.removesuffix("_svd")), deltas, self._weights(module), drawn)
        return reduce_matrix(merged.T if module.first.transposed else merged, rank)

    def _factors(self, ctx: Context, adapters: Sequence[Adapter], way: Method) -> Metrics:
        def merge(module: Merged) -> tuple[Tensor, Tensor]:
            factors = [adapters[i].factors(part.name) for i, part in module.parts.items()]
            scales = zip(self._weights(module), module.parts.values(), strict=True)
            signed, roots = signed_roots([weight * part.scaling for weight, part in scales])
            drawn = generator_for(ctx.seed, module.name)
            a = self._combine(way, [a for a, _ in factors], signed, drawn)
            b = self._combine(way, [b for _, b in factors], roots, drawn)
            return a, b

        return merge_adapters(ctx, adapters, merge, lambda module: _one_rank(module, adapters, way, ctx), self.dtype)

    def _combine(
        self, way: Method, tensors: Sequence[Tensor], weights: Sequence[float], drawn: torch.Generator
    ) -> Tensor:
        return combine(way, tensors, weights, self.density or 1.0, self.majority_sign_method, drawn)


def _widths(adapters: Sequence[Adapter]) -> list[int]:
    return [max(module.rank for module in adapter.modules.values()) for adapter in adapters]


def _one_rank(module: Merged, adapters: Sequence[Adapter], way: str, ctx: Context) -> int:
    ranks = {adapters[i].name: part.rank for i, part in module.parts.items()}
    if len(set(ranks.values())) > 1:
        found = ", ".join(f"{rank} in {name}" for name, rank in ranks.items())
        mend = "`svd`, `cat` and the ways ending in _svd merge any ranks; `op: resize_rank` gives an adapter another."
        raise StepError(f"{way} needs one rank, but that of {module.name} is {found}", where=ctx.where, mend=mend)
    return module.first.rank


def _set_rslora(ctx: Context) -> None:
    config = json.loads((ctx.out / CONFIG).read_text(encoding="utf-8")) | {"use_rslora": True}
    write_whole(ctx.out / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8"))
