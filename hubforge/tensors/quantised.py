"""Weights in 8-bit floats, read with their scales: what a merge sees are the values they stand for.

Known are the layouts that Transformers loads: DeepSeek's blocks (`weight_scale_inv`, usually 128 x 128), and one scale
for a tensor, for each row, or for each block (`weight_scale`: compressed-tensors, Fbgemm). Despite its name
`weight_scale_inv` is multiplied, as by all who read it. Other quantisation is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import SourceError
from hubforge.tensors import dtypes
from hubforge.tensors.reader import Checkpoint, TensorInfo, open_checkpoint, read_json

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIXES = ("_scale_inv", "_scale")  # of the weight's own name
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale")
_BLOCK = 128  # DeepSeek's, where the config does not tell
_MEND = "Take a checkpoint in bfloat16, float16 or float32, or one in 8-bit floats with its scales."


def open_model(path: Path) -> Checkpoint:
    """The checkpoint of a model's folder, or the one file given, with 8-bit floats as the values they stand for."""
    checkpoint = open_checkpoint(path)
    try:
        return dequantised(checkpoint, config_beside(path))
    except BaseException:
        checkpoint.close()
        raise


def config_beside(path: Path) -> dict[str, Any]:
    """config.json of a model's folder; {} where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(file) if file.is_file() else {}
    return config if isinstance(config, dict) else {}


def quantised_by(config: Mapping[str, Any]) -> str:
    """The `quant_method` that a config names, in itself or in its text_config; "" for plain weights."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(found, Mapping):
            return str(found.get("quant_method") or "a method that it does not name")
    return ""


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the same model in plain weights."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    return config


def dequantised(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint itself when it holds no 8-bit floats; else a view of it without scales.

    SourceError, naming the tensor, for an 8-bit float without a scale, or with one whose shape does not fit.
    """
    small = [info for info in checkpoint.tensors.values() if info.dtype in dtypes.SMALL_FLOATS]
    if not small:
        return checkpoint
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    plain = dtypes.from_torch(dtype) if dtype in ("bfloat16", "float16", "float32") else "BF16"
    tensors, scales, used = dict(checkpoint.tensors), {}, set()
    for info in small:
        name = next((info.name + suffix for suffix in _SUFFIXES if info.name + suffix in checkpoint), None)
        if name is None:
            what = f"tensor {info.name!r} is {info.dtype} and has no {info.name.rpartition('.')[2]}_scale"
            what += f"; its model is quantised by {method}" if (method := quantised_by(config)) else ""
            raise SourceError(what, where=str(info.file), mend=_MEND)
        used.add(name)
        scales[info.name] = _scales(info, checkpoint.info(name), config)
        size = dtypes.nbytes(plain, info.elements)
        tensors[info.name] = replace(info, dtype=plain, end=info.start + size)
    kept = {n: t for n, t in tensors.items() if n not in used and not n.endswith(_OF_ACTIVATIONS)}
    return Dequantised(checkpoint, kept, scales)


@dataclass(frozen=True)
class Scales:
    """The scales of one tensor, and how many of its elements share one, in each dimension."""

    info: TensorInfo
    shape: tuple[int, ...]  # as many dimensions as the weight
    blocks: tuple[int, ...]


def _scales(weight: TensorInfo, scale: TensorInfo, config: Mapping[str, Any]) -> Scales:
    shape = scale.shape + (1,) * (len(weight.shape) - len(scale.shape))
    fits = scale.dtype in dtypes.FLOATS or scale.dtype == "F8_E8M0"
    blocks: list[int] = []
    if fits and len(shape) == len(weight.shape):
        given = _block_size(config)
        for place, (size, count) in enumerate(zip(weight.shape, shape, strict=True)):
            from_end = len(weight.shape) - place
            wanted = [given[-from_end]] if from_end <= len(given) else []
            divisible = [size // count] if count and size % count == 0 else []
            found = [size] if count == 1 else [b for b in [*wanted, *divisible, _BLOCK] if -(-size // b) == count]
            blocks += found[:1]
    if len(blocks) != len(weight.shape):
        what = (
            f"tensor {scale.name!r} is {scale.dtype} {list(scale.shape)}, which does not fit "
            f"{weight.name!r} {list(weight.shape)}"
        )
        raise SourceError(what, where=str(scale.file), mend=_MEND)
    return Scales(scale, shape, tuple(blocks))


def _block_size(config: Mapping[str, Any]) -> list[int]:
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        size = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
        if isinstance(size, list) and all(type(n) is int and n > 0 for n in size):
            return size
    return []


class Dequantised(Checkpoint):
    """A checkpoint whose 8-bit floats are read as value times scale, in float32 by rows, rounded in bytes."""

    def __init__(self, inner: Checkpoint, tensors: Mapping[str, TensorInfo], scales: Mapping[str, Scales]) -> None:
        super().__init__(inner.path, tensors)
        self._inner, self._scales = inner, scales

    def close(self) -> None:
        self._inner.close()

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        rows = self._inner.read_rows(name, first, last)
        if name not in self._scales:
            return rows
        scales = self._scales[name]
        step = scales.blocks[0] if scales.blocks else 1
        if scales.info.elements == 1 or not scales.blocks:
            return rows.float() * self._inner.read(scales.info.name).float().reshape(())
        low, high = first // step, -(-last // step)
        scale = self._inner.read(scales.info.name).float().reshape(scales.shape)[low:high]
        for dimension, block in enumerate(scales.blocks):
            if scale.shape[dimension] > 1 or dimension == 0:
                scale = scale.repeat_interleave(block, dimension)
        skip = first - low * step
        scale = scale[skip : skip + last - first]
        for dimension in range(1, scale.dim()):  # The last block may be cut off by the tensor's edge.
            scale = scale.narrow(dimension, 0, min(scale.shape[dimension], rows.shape[dimension]))
        return rows.float() * scale

    def read_bytes(self, name: str, first: int, last: int) -> Tensor:
        import torch

        if name not in self._scales:
            return self._inner.read_bytes(name, first, last)
        rows = self.read_rows(name, first, last).to(dtypes.torch_dtype(self.info(name).dtype))
        return rows.contiguous().reshape(-1).view(torch.uint8)

    def expect(self, name: str, first: int, last: int) -> None:
        self._inner.expect(name, first, last)
