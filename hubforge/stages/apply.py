"""Fold adapters into a model, damped where the model's own weights matter most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.op import AdapterRef, Context, MaskRef, Metrics, ModelRef, Place, TensorOp
from hubforge.stages._models import layers_in
from hubforge.tensors.adapter import open_adapter
from hubforge.tensors.gate import Normalize, needs_all, normalized, require_range, require_some
from hubforge.tensors.inputs import check_inputs, tensor_shapes
from hubforge.tensors.names import Aliases
from hubforge.tensors.projection import Projection, Subspaces, protect, stored_leaks, summary
from hubforge.tensors.quantised import open_model
from hubforge.tensors.reader import open_checkpoint
from hubforge.tensors.schedule import Schedule, depth_of, value_at, values_of

if TYPE_CHECKING:
    from torch import Tensor


_ANOTHER = "The mask is of another model: make or name one of this model."


@dataclass(frozen=True)
class Known:
    """F_layer by layer; and, with `protect`, the mask and its own name for each tensor that is projected."""

    layers: Mapping[int, float]
    mask: Subspaces | None = None
    bound: Mapping[str, str] = field(default_factory=dict)
    depth: int = 1  # the number of layers


class Apply(TensorOp):
    """The model with the sum of adapters' deltas added, damped by the Fisher importance of each weight and layer.

    With `protect` the damped sum is projected out of a subspace last, since gates per element push it back in.
    Only tensors that an adapter changes are computed; all others keep their bytes. Without `importance` one adapter
    gives the bits of PEFT's `merge_and_unload` (the product in float32, added in float32, rounded once), and the right
    scale for rsLoRA too. DoRA adapters and whole modules (`modules_to_save`) are folded as the difference that they
    make to the model.
    """

    on_gpu: ClassVar[bool] = True
    formula: ClassVar[str] = "W + s · (1 − F_param) · (1 − F_layer) · Σ wᵢ · Δᵢ,  Δᵢ = scalingᵢ · Bᵢ · Aᵢ"
    source: ClassVar[str] = (
        "LoRA: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; "
        "diagonal Fisher as importance: Kirkpatrick et al. 2017, arXiv:1612.00796"
    )

    model: ModelRef = Field(description="The model the adapters are folded into.")
    adapters: list[AdapterRef] = Field(
        min_length=1, description="Adapters whose deltas are added up; for their mean, `average` them first."
    )
    weights: list[Schedule] | None = Field(
        None, description="One factor per adapter, any sign; by default 1 each. Not normalised."
    )
    scale: Schedule = Field(1.0, description="s, a factor of the whole change; 0 gives the model's own bytes.")
    importance: MaskRef | None = Field(
        None, description="A Fisher mask of the model: the more important a weight, the less it is changed."
    )
    normalize: Normalize = Field(
        "minmax",
        description="How the Fisher values of a tensor become F_param in [0, 1]: minmax; log, sqrt (minmax of the "
        "logarithm, of the root); rank (share of values below; halves the change on average); clip:P (minmax, what "
        "exceeds the P-quantile counting as 1; clip is clip:0.99). none: `importance` is a gate, which `combine` has "
        "normalised, and is taken as it is, without damping by layer.",
    )
    layer_damping: bool = Field(
        True,
        description="Whether to damp whole layers by F_layer, the minmax over layers of their Fisher sums: "
        "the most important layer is then not changed at all.",
    )

    protect: MaskRef | None = Field(
        None,
        description="A subspace mask of the model: the whole change, after damping, is projected out of it. Needs the "
        "memory of the largest tensor.",
    )
    projection: Projection = Field(
        "two_sided",
        description="With P = UUᵀ and Q = VVᵀ of the mask: two_sided (I − P)Δ(I − Q); left (I − P)Δ; right Δ(I − Q); "
        "core Δ − PΔQ; scale (I − sP)Δ(I − sQ), s = `strength`; published Δ − PΔ − ΔQ, which is no projection.",
    )
    strength: float = Field(1.0, gt=0, le=1, description="The s of `projection: scale`.")

    @model_validator(mode="after")
    def _one_weight_each(self) -> Apply:
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.adapters)} adapters")
        if self.normalize == "none" and self.layer_damping and "layer_damping" in self.model_fields_set:
            raise ValueError("`normalize: none` takes a gate as it is: put the layers into it with `combine`")
        if self.strength != 1 and self.projection != "scale":
            raise ValueError(f"strength is for `projection: scale`, not {self.projection}")
        if self.protect is None and "projection" in self.model_fields_set:
            raise ValueError(f"projection: {self.projection} without `protect`: name the subspace mask to stay out of")
        if self.importance is None and "normalize" in self.model_fields_set:
            raise ValueError(f"normalize: {self.normalize} without `importance`: name the mask that is to damp")
        return self

    def misfit(self, field: str, form: str) -> str:
        gated = self.normalize == "none"
        if field == "protect":
            return "" if form == "subspace" else "Make one with `op: subspace`."
        return {
            "fisher": "Set `normalize: minmax`, or make a gate of it with `op: combine`." if gated else "",
            "gate": "" if gated else "It is normalised already: set `normalize: none` to take it as it is.",
            "layers": "Make a gate of it with `op: combine`, and take that with `normalize: none`.",
            "subspace": "Name it as `protect`; `importance` is a Fisher mask or a gate.",
        }.get(form, "")

    def whole(self) -> bool:
        return self.protect is not None or (self.importance is not None and needs_all(self.normalize))

    @property
    def mask_stem(self) -> str:
        return "gate" if self.normalize == "none" else "fisher"

    def apart(self) -> str:
        return "its leak is measured on what is stored" if self.protect is not None else ""

    def preflight(self, ctx: Context) -> None:
        """Whether adapters and masks are of this model, where they are there already: only headers are read."""
        check_inputs(self, ctx)
        importance = self.importance if self.importance in ctx.inputs else None
        protect = self.protect if self.protect in ctx.inputs else None
        if importance is not None:
            self._layers(ctx)
        if self.model not in ctx.inputs or (importance is None and protect is None):
            return
        with open_checkpoint(ctx.path(self.model)) as base:
            shapes = {name: info.shape for name, info in base.tensors.items()}
        if importance is not None:
            with open_checkpoint(ctx.path(importance), self.mask_stem) as mask:
                _check_fits(
                    str(importance), {name: info.shape for name, info in mask.tensors.items()}, shapes, self.model
                )
        if protect is not None:
            subspaces = Subspaces(ctx.path(protect), str(protect))
            if not [name for name, shape in shapes.items() if subspaces.find(name, shape) is not None]:
                raise StepError(f"{protect} has no subspace of any tensor of {self.model}", mend=_ANOTHER)

    def prepare(self, ctx: Context) -> Known:
        layers, depth = self._layers(ctx), layers_in(tensor_shapes(ctx, self.model), self, ctx)
        if self.protect is None:
            return Known(layers, depth=depth)
        mask = Subspaces(ctx.path(self.protect), str(self.protect))
        with open_checkpoint(ctx.path(self.model)) as base:
            shapes: dict[str, tuple[int, ...]] = {}
            for ref in self.adapters:
                with open_adapter(ctx.path(ref), str(ref)) as adapter:
                    changed = [*adapter.on(base), *adapter.saved_on(base)]
                    shapes |= {name: base.info(name).shape for name in changed}
        return Known(layers, mask, mask.bind(shapes, ctx.where), depth)

    def _layers(self, ctx: Context) -> Mapping[int, float]:
        """F_layer, where layers are damped; StepError when `importance` is no mask to take it from."""
        if self.importance is None:
            return {}
        _check_kind(ctx.path(self.importance), str(self.importance), self.normalize, ctx.where)
        if not self.damps_layers():
            return {}
        importance = ctx.artifact(self.importance)
        folder = importance.path.parent if importance.path.is_file() else importance.path
        if not (folder / "layer_importance.json").is_file():
            what = f"{self.importance} has no layer_importance.json, which says how much each layer matters"
            mend = "Set `layer_damping: false`, or damp by a gate: `op: combine` of it and of its `op: layers`."
            raise StepError(what, where=ctx.where, mend=mend)
        return layer_importance(importance.read_json("layer_importance.json"), ctx.where)

    def review(self, ctx: Context) -> Metrics:
        """The leak of what was written, rounding and all."""
        if self.protect is None:
            return {}
        with open_model(ctx.path(self.model)) as base, open_checkpoint(ctx.out) as made:
            found = stored_leaks(base, made, Subspaces(ctx.path(self.protect), str(self.protect)))
        return {"leak": {"projection": self.projection, "strength": self.strength, **summary(found)}}

    def changes(self, name: str, present: frozenset[str]) -> bool:
        changed = any(values_of(self.scale)) and any(adapter in present for adapter in self.adapters)
        if changed and self.importance is not None and self.importance not in present:
            what = f"{self.importance} has no importance for {name}, which an adapter changes"
            raise StepError(what, mend="Make a mask of this very model, covering every module the adapters train.")
        return changed

    def damps_layers(self) -> bool:
        return self.layer_damping and self.normalize != "none"

    def measures(self) -> int:
        return int(self.importance is not None and self.normalize in ("minmax", "log", "sqrt"))

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        fisher = w[str(self.importance)]
        low, high = (float(value) for value in fisher.aminmax())
        # Told here: NaN would make every weight as unimportant as the next, and so damp nothing.
        require_range(low, high, self._fisher_of(at))
        if self.normalize == "log":
            fisher = fisher[fisher > 0]
            low = float(fisher.min()) if fisher.numel() else math.inf
        return {"min": low, "max": high}

    def combine(self, found: Sequence[Mapping[str, Any]], at: Place) -> Mapping[str, Any]:
        low, high = min(each["min"] for each in found), max(each["max"] for each in found)
        require_some(high, self._fisher_of(at))
        return {"min": low, "max": high}

    def _fisher_of(self, at: Place) -> str:
        return f"{at.name} of {self.importance}"

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        depth = depth_of(at.layer, at.known.depth if isinstance(at.known, Known) else 1)
        factors = [value_at(weight, at.name, depth) for weight in self.weights or [1.0] * len(self.adapters)]
        held = [(adapter, factor) for adapter, factor in zip(self.adapters, factors, strict=True) if adapter in w]
        # A factor of 1 is left out: it would be one more pass over the block.
        change, *more = (w[adapter] if factor == 1 else w[adapter] * factor for adapter, factor in held)
        for part in more:
            change = change + part
        scale = value_at(self.scale, at.name, depth)
        if self.importance is not None:
            change = change * (1 - normalized(w[self.importance], self.normalize, at.totals, self._fisher_of(at)))
            if self.damps_layers() and at.layer is not None:
                scale *= 1 - self._layer(at.layer, at)
        if self.protect is not None:
            change = self._protected(change, at)
        return (change if scale == 1 else change * scale) + w[self.model]

    def _protected(self, change: Tensor, at: Place) -> Tensor:
        known: Known = at.known
        if known.mask is None or at.name not in known.bound:
            return change  # Instruct and pretrained are equal here: there is nothing to protect.
        return protect(change, known.mask.read(known.bound[at.name]), self.projection, self.strength)

    def _layer(self, layer: int, at: Place) -> float:
        layers: Mapping[int, float] = at.known.layers
        if layer not in layers:
            what = f"{self.importance} has no importance for layer {layer} ({at.name})"
            raise StepError(what, mend="Make a mask of this very model, or set `layer_damping: false`.")
        return layers[layer]


def _check_fits(
    ref: str, mask: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]], name_of_model: str
) -> None:
    """StepError, naming the tensor, when a mask's shapes are not the model's, or it has none of its tensors."""
    names = Aliases(model, name_of_model)
    found = {name: own for name in mask if (own := names.find(name)) is not None}
    if not found:
        raise StepError(f"{ref} has no tensor of {name_of_model}", mend=_ANOTHER)
    for name, own in found.items():
        if tuple(mask[name]) != tuple(model[own]):
            what = f"{own} is {list(model[own])} in {name_of_model}, but {name} is {list(mask[name])} in {ref}"
            raise StepError(what, mend=_ANOTHER)


def _check_kind(path: Path, ref: str, normalize: str, where: str) -> None:
    """StepError when a gate would be normalised again, or a Fisher be taken for a gate."""
    if path.is_file():
        return  # Whoever names a file means it; `none` looks at the values.
    holds = {stem for stem in ("gate", "fisher") if any(path.glob(f"{stem}.safetensors*"))}
    if holds == {"gate"} and normalize != "none":
        mend = "Set `normalize: none` to take it as it is."
        raise StepError(f"{ref} is a gate, normalised already", where=where, mend=mend)
    if holds == {"fisher"} and normalize == "none":
        mend = "Set `normalize: minmax`, or make a gate of it with `op: combine`."
        raise StepError(f"{ref} is a Fisher, and `normalize: none` is for gates", where=where, mend=mend)


def layer_importance(facts: Any, where: str = "") -> dict[int, float]:
    """F_layer by layer number: the Fisher sums of `layer_importance.json`, minmax over the layers."""
    try:
        sums = {int(layer): float(entry["sum"]) for layer, entry in facts["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StepError(f"layer_importance.json has no sum for each layer ({error!r})", where=where) from error
    if not sums or not all(math.isfinite(value) for value in sums.values()):
        raise StepError("layer_importance.json has no finite sums", where=where)
    low, high = min(sums.values()), max(sums.values())
    return {layer: (value - low) / (high - low) if high > low else 0.0 for layer, value in sums.items()}
