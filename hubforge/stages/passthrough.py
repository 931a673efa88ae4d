"""Layers of one or several models stacked into a model of another depth."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hubforge.errors import StepError
from hubforge.op import CHAT_TEMPLATE, ChatTemplate, Context, Kind, Metrics, ModelRef, Op
from hubforge.stages._models import patterns_of
from hubforge.tensors import dtypes
from hubforge.tensors.chat_template import most_common, template_of
from hubforge.tensors.layout import GB, lay_out
from hubforge.tensors.names import Aliases, canonical, layer_of
from hubforge.tensors.quantised import Dequantised, open_model, quantised_by, without_quantisation
from hubforge.tensors.reader import Checkpoint, TensorInfo
from hubforge.tensors.rounding import is_finite, not_finite
from hubforge.tensors.schedule import Schedule, depth_of, fits, value_at
from hubforge.tensors.side_files import check_side_files, copy_side_files, set_dtype
from hubforge.tensors.vocabulary import is_table
from hubforge.tensors.writer import Piece, Writer, piece_of

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64 << 20  # bytes held at once
_BEFORE = re.compile(  # tensors before the layers: embeddings, and the towers of a multimodal model
    r"(?:\w+\.)?(?:embed(?!_out)|wte|wpe|word_embeddings|shared)|vision|visual|audio|image|multi_modal"
)
Layers = tuple[int, int]  # [first, last)
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


class Slice(BaseModel):
    """Neighbouring layers of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: ModelRef = Field(description="The model the layers come from.")
    layers: tuple[int, int] | None = Field(
        None, description="[first, last): counted from 0, the last not included; by default all."
    )
    scale: Schedule = Field(
        1.0,
        description="A factor of the layers' tensors: `{o_proj: 0, down_proj: 0, default: 1}` lets layers pass "
        "through. A list runs from the first of these layers to the last.",
    )

    @field_validator("layers")
    @classmethod
    def _some_layers(cls, layers: tuple[int, int] | None) -> tuple[int, int] | None:
        if layers and not 0 <= layers[0] < layers[1]:
            raise ValueError(f"{list(layers)} holds no layers: the first is counted from 0, the last is not included")
        return layers


class Passthrough(Op):
    """A model of the named layers, in their order: those of several models in turn, or some of them twice.

    What stands before the layers comes from the first slice's model, as do config and tokenizer; what stands behind
    them from the last one's. Bytes are copied unless a scale or `dtype` says otherwise, or they are 8-bit floats, which
    become plain ones. The config's number of layers is set, and its lists that have one entry for each layer follow
    the slices. (mergekit's `scale` without a filter is also of what stands around the layers.)
    """

    makes: ClassVar[Kind] = "model"
    version: ClassVar[int] = 3  # 8-bit floats are read with their scales.
    resumable: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "merge"
    formula: ClassVar[str] = "layers of W₁ [first, last), then of W₂ [first, last), ..."
    source: ClassVar[str] = "Kim et al. 2023, arXiv:2312.15166 (depth up-scaling); mergekit's passthrough"

    slices: list[Slice] = Field(min_length=1, description="The layers, from the first to the last.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Element type of the output; by default each tensor keeps its own."
    )
    chat_template: ChatTemplate | None = Field(None, description=CHAT_TEMPLATE)
    max_shard_size: float = Field(5.0, gt=0, description="Largest size of one output file, in GB (10^9 bytes).")

    def run(self, ctx: Context) -> Metrics:
        with ExitStack() as stack:
            models = {ref: stack.enter_context(open_model(ctx.path(ref))) for ref in self._models()}
            configs = {ref: check_side_files(ctx.path(ref)) for ref in models}
            for ref, model in models.items():
                if isinstance(model, Dequantised):
                    without_quantisation(configs[ref])
            depths = {ref: depth(configs[ref], ref, ctx) for ref in models}
            chosen = [part.layers or (0, depths[part.model]) for part in self.slices]
            for part, layers in zip(self.slices, chosen, strict=True):
                if layers[1] > depths[part.model]:
                    what = f"{part.model} has {depths[part.model]} layers, so there are no layers {list(layers)}"
                    raise StepError(what, where=ctx.where)
            config = self.stacked(configs, chosen, ctx)
            self._check_quantised(configs, ctx)
            self._check_shapes(models, configs, ctx)
            pieces = list(self.pieces(models, chosen, ctx))
            layout = lay_out(((p.name, p.dtype, p.info.shape) for p in pieces), int(self.max_shard_size * GB))
            ctx.out.mkdir(parents=True, exist_ok=True)
            keys = {ref: ctx.inputs[ref].key for ref in models}
            identity = json.dumps([self.version, self.model_dump(mode="json"), keys], sort_keys=True)
            places = {p.name: piece_of(layout.slots[p.name], 0, 0, p.info.rows) for p in pieces}
            writer = Writer(ctx.out, layout, list(places.values()), identity)
            stack.callback(writer.close)
            pieces.sort(key=lambda p: (places[p.name].file, places[p.name].start))
            for source in ctx.track(pieces, unit="tensors"):
                if places[source.name].key not in writer.finished:
                    source.write(writer, places[source.name])
            folder = ctx.path(self.slices[0].model)
            template = self.chat_template
            if template == "auto":
                template = most_common(template_of(ctx.path(ref)) for ref in models)
            edit = partial(set_dtype, dtype=self.dtype) if self.dtype else dict
            copy_side_files(folder, ctx.out, lambda _: edit(config), template=template)
            ctx.sha256.update(writer.complete())
        return {
            "parameters": sum(p.info.elements for p in pieces),
            "bytes": layout.nbytes,
            "tensors": len(pieces),
            "layers": sum(last - first for first, last in chosen),
        }

    def _models(self) -> list[ModelRef]:
        return list(dict.fromkeys(part.model for part in self.slices))

    def pieces(self, models: dict[ModelRef, Checkpoint], chosen: Sequence[Layers], ctx: Context) -> Iterator[Source]:
        """Every tensor of the output and where it comes from. chosen: the layers of each slice."""
        first, last = models[self.slices[0].model], models[self.slices[-1].model]
        behind = Aliases(last, str(last.path))
        for name, info in first.tensors.items():
            if layer_of(name) is None:
                before = _BEFORE.match(canonical(name)) is not None
                own = name if before else behind.find(name)
                if own is None:
                    raise StepError(f"{self.slices[-1].model} has no tensor {name}", where=ctx.where)
                if not before:
                    self._check_shape(name, info, last.info(own), ctx)
                yield self._source(name, first if before else last, info if before else last.info(own), 1.0)
        number = 0
        for part, layers in zip(self.slices, chosen, strict=True):
            held = layers_of(models[part.model])
            names = [info.name for layer in range(*layers) for info in held.get(layer, [])]
            for pattern in patterns_of(part.scale):
                if not any(fits(pattern, name) for name in names):
                    ctx.warn(f"slices: {pattern!r} fits no tensor of layers {list(layers)} of {part.model}")
            for layer in range(*layers):
                for info in held.get(layer, []):
                    scale = value_at(part.scale, info.name, depth_of(layer - layers[0], layers[1] - layers[0]))
                    name = renumbered(info.name, layer, number, like=first)
                    yield self._source(name, models[part.model], info, scale)
                number += 1

    def _check_quantised(self, configs: dict[ModelRef, dict[str, Any]], ctx: Context) -> None:
        """StepError unless the models are plain, or all quantised alike and copied as they are."""
        settings = [config.get("quantization_config") for config in configs.values()]
        alike = all(each == settings[0] for each in settings) and self.dtype is None
        if not alike and (ref := next((ref for ref in configs if quantised_by(configs[ref])), None)):
            what = f"{ref} is quantised by {quantised_by(configs[ref])}"
            mend = "Its layers can only be copied, beside others that are quantised alike; take it in plain weights."
            raise StepError(what, where=ctx.where, mend=mend)

    def _check_shapes(
        self, models: dict[ModelRef, Checkpoint], configs: dict[ModelRef, dict[str, Any]], ctx: Context
    ) -> None:
        """StepError for layers that do not fit the first model's; not looked at where its own layers differ in kind."""
        first, *others = self._models()
        if any(isinstance(value, list) for name, value in text_config(configs[first])[0].items() if "layer" in name):
            return
        here = {_in_layer(info.name): info for infos in layers_of(models[first]).values() for info in infos}
        for ref in others:
            for info in models[ref].tensors.values():
                if layer_of(info.name) is not None and (same := here.get(_in_layer(info.name))):
                    self._check_shape(same.name, same, info, ctx)

    def _check_shape(self, name: str, here: TensorInfo, there: TensorInfo, ctx: Context) -> None:
        if here.shape == there.shape:
            return
        first, last = self.slices[0].model, self.slices[-1].model
        what = f"{name} is {list(here.shape)} in {here.file}, but {list(there.shape)} in {there.file}"
        mend = "Only layers of one architecture and width fit together."
        if is_table(name) and here.shape[1:] == there.shape[1:]:
            same = f"{{op: task_arithmetic, model: {last}, models: [{first}], weights: [0], tokenizer: {first}}}"
            mend = f"The vocabularies differ: stack the layers of `{same}`, which is {last} with the tokens of {first}."
        raise StepError(what, where=ctx.where, mend=mend)

    def _source(self, name: str, checkpoint: Checkpoint, info: TensorInfo, scale: float) -> Source:
        is_float = info.dtype in dtypes.FLOATS
        if scale != 1 and not is_float:
            raise StepError(f"{info.name} in {info.file} is {info.dtype}, which cannot be scaled")
        wanted = dtypes.from_torch(self.dtype) if self.dtype and is_float else info.dtype
        return Source(name, checkpoint, info, wanted, scale)

    def stacked(
        self, configs: dict[ModelRef, dict[str, Any]], layers: Sequence[Layers], ctx: Context
    ) -> dict[str, Any]:
        """The first model's config with the number of layers, and its lists of one entry for each, as stacked."""
        config: dict[str, Any] = json.loads(json.dumps(configs[self.slices[0].model]))
        text, _ = text_config(config)
        for name in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
            if text.get(name) and (len(layers) > 1 or layers[0] != (0, text.get("num_hidden_layers"))):
                what = f"{name} is {text[name]}: layers of such a model depend on their place, and cannot be stacked"
                raise StepError(what, where=ctx.where)
        chosen = [(text_config(configs[part.model])[0], each) for part, each in zip(self.slices, layers, strict=True)]
        for part, (theirs, _) in zip(self.slices, chosen, strict=True):
            for name in ("model_type", "hidden_size"):
                if theirs.get(name) != text.get(name):
                    what = (
                        f"{name} is {text.get(name)} in {self.slices[0].model}, but {theirs.get(name)} in {part.model}"
                    )
                    raise StepError(
                        what, where=ctx.where, mend="Only layers of one architecture and width fit together."
                    )
        for name, value in text.items():
            if name in _DEPTHS:
                text[name] = sum(last - first for _, (first, last) in chosen)
            elif isinstance(value, list) and "layer" in name and len(value) == _depth_in(configs[self.slices[0].model]):
                text[name] = [entry for theirs, (first, last) in chosen for entry in theirs[name][first:last]]
        return config


@dataclass(frozen=True)
class Source:
    """One tensor of the output: from which checkpoint, as which dtype, times what."""

    name: str
    checkpoint: Checkpoint
    info: TensorInfo
    dtype: str
    scale: float

    def write(self, writer: Writer, piece: Piece) -> None:
        rows = max(1, BLOCK * self.info.rows // max(self.info.nbytes, 1))
        offset = 0
        for first in range(0, self.info.rows, rows):
            view = memoryview(self.read(first, min(first + rows, self.info.rows)).numpy())
            writer.write(piece, offset, view)
            offset += len(view)
        writer.finish(piece)

    def read(self, first: int, last: int) -> Tensor:
        """The bytes of some rows, as they go to the output."""
        import torch

        if self.scale == 1 and self.dtype == self.info.dtype:
            return self.checkpoint.read_bytes(self.info.name, first, last)
        values = self.checkpoint.read_rows(self.info.name, first, last).float()
        rows = (values * self.scale).to(dtypes.torch_dtype(self.dtype))
        if not_finite(rows.float(), values):
            if not is_finite(values):
                what = f"{self.info.name} ({self.info.file}) holds NaN or infinity"
                raise StepError(what, mend="That model is damaged: make or fetch it again.")
            what = f"{self.name} does not fit into {dtypes.torch_name(self.dtype)}: some values become infinite"
            raise StepError(what, mend="Lower the scale, or set dtype: bfloat16 or float32.")
        return rows.reshape(-1).view(torch.uint8)


def layers_of(checkpoint: Checkpoint) -> dict[int, list[TensorInfo]]:
    """The tensors of each decoder layer."""
    found: dict[int, list[TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        if (layer := layer_of(name)) is not None:
            found.setdefault(layer, []).append(info)
    return found


def _in_layer(name: str) -> str:
    """A tensor's name within its layer, whichever that is."""
    return canonical(name).replace(f".{layer_of(name)}.", ".", 1)


def renumbered(name: str, layer: int, number: int, like: Sequence[str] | Checkpoint) -> str:
    """The tensor's name as of layer `number`, under the wrappers (`model.`) that names in `like` have."""
    inner = canonical(name).replace(f".{layer}.", f".{number}.", 1)
    wrapper = next((other.removesuffix(canonical(other)) for other in like if layer_of(other) is not None), "")
    return wrapper + inner


def text_config(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The part of a config that tells the number of layers, and by what name."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for name in _DEPTHS:
                if isinstance(part.get(name), int):
                    return part, name
    return config, ""


def _depth_in(config: dict[str, Any]) -> int:
    part, name = text_config(config)
    return int(part[name])


def depth(config: dict[str, Any], ref: str, ctx: Context) -> int:
    """The number of layers of a model; StepError when its config does not tell."""
    if not text_config(config)[1]:
        raise StepError(f"the config of {ref} tells no number of layers ({', '.join(_DEPTHS)})", where=ctx.where)
    return _depth_in(config)
