"""Read `pytorch_model.bin` and `adapter_model.bin`: state dicts that torch pickled, with weights_only always on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import SourceError
from hubforge.tensors import dtypes
from hubforge.tensors.reader import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


_TIED = ("lm_head.weight", "embed_out.weight")


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride())


class PickledCheckpoint(Checkpoint):
    """A state dict kept as torch left it: mapped from the file where the file's format permits, else in memory."""

    _state: dict[str, Tensor]

    @classmethod
    def open(cls, path: Path, files: list[Path]) -> PickledCheckpoint:
        state: dict[str, Tensor] = {}
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, tensor in _load(file).items():
                if name in tensors:
                    what = f"tensor {name!r} is in {tensors[name].file.name} and again in {file.name}"
                    raise SourceError(what, where=str(path))
                try:
                    dtype = dtypes.from_torch(tensor.dtype)
                except KeyError:
                    raise SourceError(f"tensor {name!r} is {tensor.dtype}", where=str(file)) from None
                if name.endswith(_TIED) and any(_same_memory(tensor, other) for other in state.values()):
                    continue  # As safetensors: a head tied to the embeddings is not kept twice.
                size = tensor.numel() * tensor.element_size()
                tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape), file, 0, size)
                state[name] = tensor
        checkpoint = cls(path, tensors)
        checkpoint._state = state
        return checkpoint

    def read_bytes(self, name: str, first: int, last: int) -> Tensor:
        import torch

        info = self.info(name)
        tensor = self._state[name].reshape(info.shape or (1,))[first:last]
        return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    def expect(self, name: str, first: int, last: int) -> None:
        pass


def _load(file: Path) -> dict[str, Any]:
    import torch

    mend = "Save it as safetensors: only plain tensors are read from a pickle."
    try:
        # Files older than torch 1.6 cannot be mapped; they are read whole.
        with file.open("rb") as head:
            mapped = head.read(2) == b"PK"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen kinds here, from UnpicklingError to RuntimeError
        first_line = str(error).strip().split("\n", 1)[0][:200]
        raise SourceError(f"cannot be loaded with weights_only: {first_line}", where=str(file), mend=mend) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in state.items()
    ):
        raise SourceError("is not a dictionary of tensors", where=str(file), mend=mend)
    return state
