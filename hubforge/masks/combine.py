"""Masks put together into a gate: importance in [0, 1] of each weight, ready to damp a merge, and to be looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.masks._files import TensorWriter, settle, size, write_json
from hubforge.masks._gates import BINS, GATE, Part
from hubforge.op import Context, Kind, MaskRef, Metrics, Op
from hubforge.tensors import dtypes
from hubforge.tensors.gate import Normalize, Spread, require_some
from hubforge.tensors.layout import lay_out
from hubforge.tensors.names import layer_of

if TYPE_CHECKING:
    from torch import Tensor

Facts = dict[str, Any]  # of one tensor: JSON


class Combine(Op):
    """A gate: the importance in [0, 1] of each weight, made of one or more masks; 1 means that it is not changed.

    Fisher masks are normalised first, each by itself; gates and `layers` are taken as they are. One tensor of each mask
    is held at a time. Under `scope: global` a pass over the whole mask comes first: it counts the values by their
    bfloat16 bits, which gives exact ranks and quantiles of any number of them in 256 kB.
    `apply` takes the gate with `importance: ..., normalize: none`.
    """

    makes: ClassVar[Kind] = "mask"
    form: ClassVar[str] = "gate"
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "masks"
    resumable: ClassVar[bool] = True
    formula: ClassVar[str] = "gate = Π Fᵢ, max Fᵢ, Σ Fᵢ / n, or 1 − Π (1 − Fᵢ);  Fᵢ ∈ [0, 1], normalised"
    source: ClassVar[str] = "`apply` damps by (1 − F_param) · (1 − F_layer): `either` is the gate of that product"

    masks: list[MaskRef] = Field(min_length=1, description="Fisher masks, gates and `layers`, of one model.")
    how: Literal["product", "max", "mean", "either"] = Field(
        "product",
        description="product: important in all of them; max: in the one where it matters most; mean; either: "
        "1 − Π (1 − Fᵢ), which damps by each in turn, as `apply` does with weights and layers.",
    )
    normalize: Normalize = Field(
        "minmax",
        description="How a Fisher's values become importance in [0, 1]: minmax; log, sqrt (minmax of the logarithm, of "
        "the root); rank (share of values below); clip:P (minmax, what exceeds the P-quantile counting as 1).",
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor",
        description="Over what values are normalised: those of each tensor, or those of the whole mask. On the heavy "
        "tail of a Fisher, minmax over the whole mask damps next to nothing.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of the gate as stored. bfloat16 rounds importance by up to 0.002."
    )

    @model_validator(mode="after")
    def _each_once(self) -> Combine:
        if len(set(self.masks)) < len(self.masks):
            raise ValueError("masks names one of them twice")
        return self

    def misfit(self, field: str, form: str) -> str:
        return "A subspace has no importance of each weight; `protect:` takes it." if form == "subspace" else ""

    def preflight(self, ctx: Context) -> None:
        """Whether the masks are of one model, where all are there already: only headers are read."""
        if all(ref in ctx.inputs for ref in self.masks):
            with ExitStack() as stack:
                self._parts(ctx, stack)

    def run(self, ctx: Context) -> Metrics:
        with ExitStack() as stack:
            parts, first, owns = self._parts(ctx, stack)
            if self.scope == "global":
                self._survey(ctx, parts)
            facts = self._write(ctx, parts, first, owns)
        layers, total = _by_layer(facts)
        write_json(
            ctx.out / "gate.json",
            {
                "how": self.how,
                "normalize": self.normalize,
                "scope": self.scope,
                "masks": list(self.masks),
                "layers": {str(layer): entry for layer, entry in layers.items()},
                "total": total,
                # How many weights have importance in [i/20, (i+1)/20), by i; 1 counts into the last.
                "histogram": _histogram(facts),
            },
        )
        return {
            "tensors": len(facts),
            "parameters": total["count"],
            "gate": {"mean": total["mean"], "open": _share(facts, 0), "shut": _share(facts, BINS - 1)},
            "histogram": _histogram(facts),
            "layers": [{"layer": layer, "gate": entry["mean"]} for layer, entry in layers.items()],
        }

    def _parts(self, ctx: Context, stack: ExitStack) -> tuple[list[Part], Part, dict[str, list[str]]]:
        """The masks; the one that says which tensors there are; and the name of each of these in every mask."""
        parts = [Part(str(ref), ctx.path(ref), self.normalize, stack) for ref in self.masks]
        # The first that has tensors of its own says which; `layers` alone know the shapes of theirs.
        first = next((part for part in parts if part.by_layer is None), parts[0])
        return (
            parts,
            first,
            {name: [part.own(name, shape, ctx.where) for part in parts] for name, shape in first.shapes.items()},
        )

    def _survey(self, ctx: Context, parts: list[Part]) -> None:
        """Count all values of each Fisher, for `scope: global`."""
        for part in parts:
            if not part.is_fisher:
                continue
            whole = Spread()
            for name in ctx.track(part.shapes, unit="tensor", what=f"counting {part.ref}"):
                whole.add(part.raw(name), f"{name} of {part.ref}")
            require_some(whole.high, part.ref)
            if not whole.exact and (self.normalize == "rank" or self.normalize.startswith("clip")):
                ctx.warn(f"{part.ref} is wider than bfloat16: its ranks and quantiles are those of rounded values")
            part.whole = whole

    def _write(self, ctx: Context, parts: list[Part], first: Part, owns: Mapping[str, list[str]]) -> dict[str, Facts]:
        """Write the gate, one tensor at a time, going on from where a killed run stopped; what is known of each."""
        dtype = "BF16" if self.dtype == "bfloat16" else "F32"
        layout = lay_out([(name, dtype, tuple(shape)) for name, shape in first.shapes.items()], stem=GATE)
        ctx.note(f"gate of {len(owns)} tensors, one at a time; {size(layout.nbytes)} written")
        described = json.dumps([self.model_dump(mode="json"), [ctx.artifact(ref).key for ref in self.masks]])
        writer = TensorWriter(ctx.out / "work", layout, described)
        facts: dict[str, Facts] = {}
        try:
            for name in ctx.track(layout.slots, unit="tensor"):
                if name not in writer.done:
                    gate = self._gate(parts, owns[name], ctx.where)
                    writer.put(name, gate.to(dtypes.torch_dtype(dtype)), _facts(gate))
                    facts[name] = _facts(gate)
                else:
                    facts[name] = writer.done[name]
            ctx.sha256.update(writer.complete())
        except BaseException:
            writer.close()
            raise
        settle(ctx.out / "work", ctx.out)
        return facts

    def _gate(self, parts: list[Part], owns: list[str], where: str) -> Tensor:
        try:
            gate = parts[0].importance(owns[0])
            if self.how == "either":
                gate = 1 - gate
            for part, own in zip(parts[1:], owns[1:], strict=True):
                more = part.importance(own)
                if self.how == "product":
                    gate = gate * more
                elif self.how == "max":
                    gate = gate.maximum(more)
                elif self.how == "mean":
                    gate = gate + more
                else:
                    gate = gate * (1 - more)
        except StepError as error:
            named = error.what if owns[0] in error.what else f"{owns[0]}: {error.what}"
            raise StepError(named, where=where, mend=error.mend) from error
        if self.how == "mean":
            return gate / len(parts)
        return 1 - gate if self.how == "either" else gate


def _facts(gate: Tensor) -> Facts:
    import torch

    bins = torch.histc(gate, bins=BINS, min=0, max=1).long()
    return {"sum": float(gate.sum(dtype=torch.float64)), "count": gate.numel(), "histogram": bins.tolist()}


def _by_layer(facts: Mapping[str, Facts]) -> tuple[dict[int, Facts], Facts]:
    """Sum, mean and count in each decoder layer, and in all."""
    layers: dict[int, Facts] = {}
    total = {"sum": 0.0, "count": 0}
    for name, entry in facts.items():
        layer = layer_of(name)
        into = [total] if layer is None else [total, layers.setdefault(layer, {"sum": 0.0, "count": 0})]
        for sums in into:
            sums["sum"] += entry["sum"]
            sums["count"] += entry["count"]
    for sums in (total, *layers.values()):
        sums["mean"] = sums["sum"] / max(sums["count"], 1)
    return dict(sorted(layers.items())), total


def _histogram(facts: Mapping[str, Facts]) -> list[int]:
    return [sum(column) for column in zip(*(entry["histogram"] for entry in facts.values()), strict=True)]


def _share(facts: Mapping[str, Facts], bin_: int) -> float:
    histogram = _histogram(facts)
    return histogram[bin_] / max(sum(histogram), 1)
