"""Read `pytorch_model.bin` and `adapter_model.bin`: state dicts that torch pickled, with weights_only always on.

Of a file in torch's zip format (since 1.6) only the pickle is loaded, into tensors without data, which tell where each
storage lies in the file: rows are then read from there, as from safetensors. Older files are read whole.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import SourceError
from hubforge.tensors import dtypes
from hubforge.tensors.reader import FETCH_AGAIN, FETCH_ALL, Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_TIED = ("lm_head.weight", "embed_out.weight")


class PickledCheckpoint(Checkpoint):
    """State dicts on disk, but for tensors of old files, which are in memory."""

    _held: dict[str, Tensor]  # tensors of old files
    _strides: dict[str, tuple[int, ...]]  # of tensors whose elements do not follow one another in the file
    tied: frozenset[str]  # heads that are the embeddings once more, and so no tensors of their own

    @classmethod
    def open(cls, path: Path, files: list[Path]) -> PickledCheckpoint:
        tensors: dict[str, TensorInfo] = {}
        held: dict[str, Tensor] = {}
        strides: dict[str, tuple[int, ...]] = {}
        tied: set[str] = set()
        for file in files:
            state, in_file = _load(file)
            places = set()
            for name, tensor in state.items():
                if name in tensors:
                    what = f"tensor {name!r} is in {tensors[name].file.name} and again in {file.name}"
                    raise SourceError(what, where=str(path), mend=FETCH_ALL)
                try:
                    dtype = dtypes.from_torch(tensor.dtype)
                except KeyError:
                    raise SourceError(f"tensor {name!r} is {tensor.dtype}", where=str(file)) from None
                start = _start(tensor) if in_file else 0
                place = (start if in_file else tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
                if name.endswith(_TIED) and place in places:
                    tied.add(name)  # As safetensors: a head tied to the embeddings is not kept twice.
                    continue
                places.add(place)
                size = tensor.numel() * tensor.element_size()
                tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape), file, start, start + size)
                if not in_file:
                    held[name] = tensor
                elif not tensor.is_contiguous():
                    strides[name] = tensor.stride()
        checkpoint = cls(path, tensors)
        checkpoint._held, checkpoint._strides, checkpoint.tied = held, strides, frozenset(tied)
        return checkpoint

    def read_bytes(self, name: str, first: int, last: int) -> Tensor:
        import torch

        info = self.info(name)
        if name in self._held:
            tensor = self._held[name]
        elif name in self._strides:
            tensor = self._strided(info, self._strides[name])
        else:
            return super().read_bytes(name, first, last)
        rows = tensor.reshape(info.shape or (1,))[first:last]
        return rows.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    def _strided(self, info: TensorInfo, stride: tuple[int, ...]) -> Tensor:
        import torch

        dtype = dtypes.torch_dtype(info.dtype)
        assert dtype is not None
        span = 1 + sum((size - 1) * step for size, step in zip(info.shape, stride, strict=True))
        data = torch.empty(span * dtype.itemsize if info.elements else 0, dtype=torch.uint8)
        self._fill(memoryview(data.numpy()), info, info.start)
        return data.view(dtype).as_strided(info.shape, stride)

    def expect(self, name: str, first: int, last: int) -> None:
        if name not in self._held:
            super().expect(name, first, last)


def _start(tensor: Tensor) -> int:
    """The first byte of a tensor without data in the file that it was loaded from."""
    # torch.serialization: "_checkpoint_offset" is set where torch.load runs under FakeTensorMode.
    offset = int(tensor.untyped_storage()._checkpoint_offset)
    start: int = offset + tensor.storage_offset() * tensor.element_size()
    return start


def _is_whole(file: Path) -> bool:
    """Whether a zip file has its table, which is at its end."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # There is one, of what nobody writes any more: parts on several disks.
        return True


def _load(file: Path) -> tuple[Mapping[str, Tensor], bool]:
    """The state dict; and whether its tensors have no data but a place in the file."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    mend = "Save it as safetensors: only plain tensors are read from a pickle."
    with file.open("rb") as head:
        in_file = head.read(2) == b"PK"
    try:
        with FakeTensorMode() if in_file else contextlib.nullcontext():
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here, from UnpicklingError to RuntimeError
        if in_file and not _is_whole(file):
            raise SourceError("is cut short: its end is missing", where=str(file), mend=FETCH_AGAIN) from error
        first_line = str(error).strip().split("\n", 1)[0][:200]
        raise SourceError(f"cannot be loaded with weights_only: {first_line}", where=str(file), mend=mend) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in state.items()
    ):
        raise SourceError("is not a dictionary of tensors", where=str(file), mend=mend)
    return state, in_file
