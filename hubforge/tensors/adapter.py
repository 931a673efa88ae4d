"""Read PEFT LoRA adapters: which base tensor each module changes, its factors, and the delta scaling * B @ A.

DoRA and whole modules saved beside the factors change the base by what only the base tells, so they can be applied to
it but not merged with others; biases, convolutions and fused experts are refused. Each by name, so that nothing is lost
in silence. The base's own embeddings, which PEFT saves beside factors of them, are in no merge: the base has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hubforge.errors import SourceError
from hubforge.tensors import dtypes
from hubforge.tensors.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from hubforge.tensors.names import Aliases
from hubforge.tensors.quantised import config_beside
from hubforge.tensors.reader import Checkpoint, TensorInfo, open_checkpoint
from hubforge.tensors.rounding import is_finite
from hubforge.tensors.vocabulary import is_table

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
# In Transformers 5, the models with layers whose weights are (in_features, out_features), and what these are called.
_WITH_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
_PREFIX = "base_model.model."
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_BASE = re.compile(r"(?P<module>.+?)\.base_layer\.weight")
_KEY = re.compile(r"(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.default)?(?:\.weight)?")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: A is (rank, in_features), B is (out_features, rank)."""

    name: str  # as the adapter calls it, without `base_model.model.`: "model.layers.0.self_attn.q_proj"
    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool  # the base stores (in_features, out_features): Conv1D layers and embeddings
    embedding: bool
    magnitude: TensorInfo | None = None  # DoRA's, (out_features,)
    base: TensorInfo | None = None  # the weights it was trained on, where the file has them: PEFT saves embeddings so

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the delta, as the base stores it."""
        out_features, in_features = self.b.shape[0], self.a.shape[1]
        return (in_features, out_features) if self.transposed else (out_features, in_features)


class Adapter:
    """A LoRA adapter on disk: its config, and its modules by the name the adapter gives them."""

    def __init__(self, name: str, config: AdapterConfig, checkpoint: Checkpoint) -> None:
        self.name, self.config, self.checkpoint = name, config, checkpoint

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.checkpoint.close()

    @property
    def where(self) -> str:
        return str(self.checkpoint.path)

    @cached_property
    def modules(self) -> Mapping[str, LoraModule]:
        """Every module, checked: both factors there, two-dimensional, of the rank that the config gives."""
        factors: dict[str, dict[str, TensorInfo]] = {}
        embeddings, magnitudes, bases = set(), dict[str, TensorInfo](), dict[str, TensorInfo]()
        for key, info in self.checkpoint.tensors.items():
            if key in self.saved:
                continue
            if self.config.use_dora and (dora := _MAGNITUDE.fullmatch(key)):
                magnitudes[dora["module"].removeprefix(_PREFIX)] = info
                continue
            if base := _BASE.fullmatch(key):
                bases[base["module"].removeprefix(_PREFIX)] = info
                continue
            found = _KEY.fullmatch(key)
            if not found:
                mend = "Only lora_A and lora_B, DoRA's magnitudes and modules_to_save are known: no biases."
                raise SourceError(f"tensor {key!r} is no LoRA factor", where=self.where, mend=mend)
            module = found["module"].removeprefix(_PREFIX)
            if found["embedding"]:
                embeddings.add(module)
            factors.setdefault(module, {})[found["factor"]] = info
        if not factors and not self.saved:
            raise SourceError("the adapter has no tensors", where=self.where)
        if lacking := sorted(bases.keys() - factors.keys()):
            raise SourceError(f"has the base's weights of {lacking[0]}, but no LoRA factors", where=self.where)
        modules = {module: self._module(module, parts, module in embeddings) for module, parts in factors.items()}
        modules = {name: self._with_base(module, bases.get(name)) for name, module in modules.items()}
        return {name: self._with_magnitude(module, magnitudes) for name, module in modules.items()}

    def _with_base(self, module: LoraModule, info: TensorInfo | None) -> LoraModule:
        if info is not None and (info.shape != module.shape or info.dtype not in dtypes.FLOATS):
            what = f"{info.name!r} is {info.dtype} {list(info.shape)}, but its delta is {list(module.shape)}"
            raise SourceError(what, where=self.where)
        return replace(module, base=info)

    def _with_magnitude(self, module: LoraModule, magnitudes: Mapping[str, TensorInfo]) -> LoraModule:
        if not self.config.use_dora:
            return module
        info = magnitudes.get(module.name)
        if info is None or math.prod(info.shape) != module.b.shape[0] or info.dtype not in dtypes.FLOATS:
            what = f"use_dora is set, but {module.name} has no magnitude for each of its {module.b.shape[0]} outputs"
            raise SourceError(what, where=self.where)
        return replace(module, magnitude=info)

    @cached_property
    def saved(self) -> Mapping[str, str]:
        """The tensors that take the base's places whole, `modules_to_save`'s: name in the base by key in the file.

        And embeddings and heads, which PEFT saves by itself where tokens were added to the model.
        """
        found = {}
        for key in self.checkpoint.tensors:
            name = key.removeprefix(_PREFIX)
            parts = name.split(".")
            # As PEFT takes the names: of "norm", any module whose name ends so.
            listed = any(f"{module}." in name for module in self.config.modules_to_save) and "lora_" not in key
            if listed or is_table(name):
                # Some versions of PEFT keep its wrapper in the name.
                inner = parts.index("modules_to_save") if "modules_to_save" in parts else None
                found[key] = ".".join(parts[:inner] + parts[inner + 2 :]) if inner is not None else name
        return found

    def require_plain(self) -> None:
        """SourceError unless all that the adapter does is add scaling * B @ A."""
        if self.config.use_dora or self.saved:
            whole = next(iter(self.saved), "")
            kind = "a DoRA adapter" if self.config.use_dora else f"one with whole modules ({whole})"
            mend = "`op: apply` folds it into its base; merge the models that come of it."
            what = f"is {kind}: what it adds depends on the base, so it cannot be merged with others"
            raise SourceError(what, where=self.where, mend=mend)

    def _module(self, module: str, parts: Mapping[str, TensorInfo], embedding: bool) -> LoraModule:
        if set(parts) != {"A", "B"}:
            missing = "B" if "A" in parts else "A"
            raise SourceError(f"{module} has no lora_{missing}", where=self.where)
        a, b = parts["A"], parts["B"]
        for info in (a, b):
            if len(info.shape) != 2:
                what = f"{info.name!r} has shape {list(info.shape)}; only matrices are supported, not convolutions"
                raise SourceError(what, where=self.where)
            if info.dtype not in dtypes.FLOATS:
                raise SourceError(f"{info.name!r} is {info.dtype}, not a float", where=self.where)
        rank = self.config.rank_of(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            what = f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG} gives rank {rank}"
            raise SourceError(what, where=self.where)
        transposed = embedding or self.config.fan_in_fan_out
        return LoraModule(module, a, b, self.config.scaling_of(module), transposed, embedding)

    def factors(self, module: str, *, nan: bool = False) -> tuple[Tensor, Tensor]:
        """(A, B) of a module, float32, not scaled; SourceError where they are not finite, unless `nan` is allowed."""
        found = self.modules[module]
        a, b = (self.checkpoint.read(info.name).float() for info in (found.a, found.b))
        for info, factor in ((found.a, a), (found.b, b)):
            if not nan and not is_finite(factor):
                mend = "The adapter is damaged: make or fetch it again."
                raise SourceError(f"{info.name} holds NaN or infinity", where=self.where, mend=mend)
        return a, b

    def on(self, base: Checkpoint) -> dict[str, LoraModule]:
        """The module that changes each tensor of `base`, by the base's tensor name.

        Names are matched across `model.` and `model.language_model.`. SourceError for a module that the base lacks,
        and for a delta of another shape.
        """
        aliases, is_conv1d = Aliases(base, str(base.path)), config_beside(base.path).get("model_type") in _WITH_CONV1D
        found: dict[str, LoraModule] = {}
        for module in self.modules.values():
            tensor = aliases.find(f"{module.name}.weight")
            if tensor is None:
                raise self._not_in(base, module)
            info = base.info(tensor)
            module = _as_stored(module, info, is_conv1d)
            self._check_shape(f"the delta of {module.name}", module.shape, info)
            found[tensor] = module
        return found

    def saved_on(self, base: Checkpoint) -> dict[str, str]:
        """The key of the tensor that takes the place of each tensor of `base`, by the base's tensor name.

        A head that the base ties to its embeddings is none of its tensors: SourceError, as for any it lacks, unless it
        holds the embeddings' bytes once more.
        """
        aliases = Aliases(base, str(base.path))
        found = {}
        for key, name in self.saved.items():
            tensor = aliases.find(name)
            if tensor is None and self._repeats_another_table(key):
                continue
            if tensor is None:
                what = f"replaces {name}, which {base.path} lacks"
                raise SourceError(what, where=self.where, mend=self._trained_on())
            self._check_shape(name, self.checkpoint.info(key).shape, base.info(tensor))
            found[tensor] = key
        return found

    def _repeats_another_table(self, key: str) -> bool:
        """Whether a head has the bytes of the embeddings beside it: PEFT saves tied ones twice."""
        others = [other for other in self.saved if other != key and is_table(self.saved[other])]
        return is_table(self.saved[key]) and any(self.checkpoint.same_bytes(key, other) for other in others)

    def _check_shape(self, what: str, shape: tuple[int, ...], info: TensorInfo) -> None:
        if info.shape != shape:
            what = f"{what} is {list(shape)}, but {info.name} in {info.file} is {list(info.shape)}"
            raise SourceError(what, where=self.where, mend=self._trained_on())

    def _not_in(self, base: Checkpoint, module: LoraModule) -> SourceError:
        what = f"changes {module.name}, but {base.path} has no tensor {module.name}.weight"
        if module.name.rpartition(".")[2] in ("lm_head", "embed_out"):
            mend = "Its output head is tied to the embeddings, so it cannot change alone; train without lm_head."
        else:
            mend = self._trained_on()
        return SourceError(what, where=self.where, mend=mend)

    def _trained_on(self) -> str:
        base = self.config.base_model
        return f"It was trained on {base}; is that this model?" if base else "Was it trained on another model?"


def _as_stored(module: LoraModule, info: TensorInfo, is_conv1d: bool) -> LoraModule:
    """The module, transposed or not as the base stores it.

    PEFT goes by each layer's class; `fan_in_fan_out` in the config is only that of the layer it came to last. The shape
    tells, or of a square matrix the name, in a model that has layers of that class.
    """
    outputs, inputs = module.b.shape[0], module.a.shape[1]
    if module.embedding or info.shape not in ((outputs, inputs), (inputs, outputs)):
        return module
    transposed = info.shape == (inputs, outputs)
    if inputs == outputs:
        transposed = module.name.rpartition(".")[2] in _CONV1D if is_conv1d else module.transposed
    return replace(module, transposed=transposed)


def delta(module: LoraModule, a: Tensor, b: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Rows [first, last) of scaling * B @ A, float32, as the base stores them.

    a, b: the factors, float32. The product is scaled afterwards, as PEFT does, so that a merge has PEFT's bits.
    """
    product: Tensor = (b @ a[:, first:last]).T if module.transposed else b[first:last] @ a
    return product if module.scaling == 1 else product.mul_(module.scaling)


def dora_delta(base: Tensor, change: Tensor, magnitude: Tensor, norm: Tensor | None = None) -> Tensor:
    """What a DoRA adds to rows of the base's weights: m · (W + Δ) / ‖W + Δ‖ − W; float32.

    The norms are those of each output's weights: by row. norm: by column instead, over all rows, of a module that is
    stored transposed; an embedding has one for each of its dimensions, over the whole vocabulary, as in PEFT.
    Source: Liu et al. 2024, arXiv:2402.09353; peft.tuners.lora.dora.
    """
    import torch

    whole = base + change
    if norm is not None:
        return whole.mul_(magnitude / norm).sub_(base)
    norm = torch.linalg.vector_norm(whole, dim=1)
    return whole.mul_((magnitude / norm)[:, None]).sub_(base)


def open_adapter(path: Path, name: str = "") -> Adapter:
    """The LoRA adapter in a folder. Raises SourceError for what is none, or holds what is not supported."""
    if not path.is_dir():
        raise SourceError("no such adapter folder", where=str(path))
    config = read_adapter_config(path / CONFIG)
    weights = path / WEIGHTS
    if not weights.is_file():
        weights = path / "adapter_model.bin"
    if not weights.is_file():
        raise SourceError(f"the adapter has no {WEIGHTS}", where=str(path))
    return Adapter(name or path.name, config, open_checkpoint(weights))
