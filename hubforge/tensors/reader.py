"""Read checkpoints one tensor, or one block of rows, at a time: safetensors single or sharded, and pickled state dicts.

Headers come from strangers. Every length, offset, name and shape in one is checked before it is used, and no tensor is
read through a memory map, so a file that changes underneath gives an error, not a crash.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import SourceError
from hubforge.tensors import dtypes

if TYPE_CHECKING:
    from torch import Tensor

    from hubforge.tensors.desk import Desk
    from hubforge.tensors.pickled import PickledCheckpoint

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_COMPARED_AT_ONCE = 16 << 20  # bytes
_READ = 1 << 30  # bytes asked of the kernel at once; Linux returns at most 2 GiB


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, end) of `file`, counted from the file's first byte."""

    name: str
    dtype: str  # as safetensors writes it: BF16, F32, ...
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


def read_json(path: Path, limit: int = MAX_HEADER) -> Any:
    """The JSON in a file from elsewhere; SourceError when it is missing, too large, not UTF-8, or not strict JSON."""
    try:
        if path.stat().st_size > limit:
            raise SourceError(f"{path.stat().st_size} bytes of JSON, more than {limit}", where=str(path))
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error


def parse_json(data: bytes, path: Path) -> Any:
    """The value of strict JSON: no duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(f"{_quote(twice)} is defined twice", where=str(path))
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not valid JSON ({error})", where=str(path), mend=FETCH_AGAIN) from error


FETCH_AGAIN = "The file is damaged or incomplete: fetch it again."
FETCH_ALL = "Index and shards are of two checkpoints, or damaged: fetch the whole repository again."


def _quote(name: str) -> str:
    """A name from a file, short and printable."""
    return repr(name if len(name) <= 200 else name[:200] + "...")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises SourceError, naming file and tensor, unless the tensors' bytes follow one another without gap or overlap
    from the end of the header to the end of the file, and each has as many bytes as its shape and dtype ask for.
    Source: the format's description at https://github.com/huggingface/safetensors#format.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise SourceError(f"{size} bytes, too short for a safetensors file", where=where, mend=FETCH_AGAIN)
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise SourceError(f"header of {length} bytes, more than {MAX_HEADER}", where=where, mend=FETCH_AGAIN)
            if 8 + length > size:
                what = f"header of {length} bytes, but the file has {size}"
                raise SourceError(what, where=where, mend=FETCH_AGAIN)
            header = file.read(length)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=where) from error
    if len(header) < length or not header.startswith(b"{"):
        raise SourceError("the header is not a JSON object", where=where, mend=FETCH_AGAIN)
    entries = parse_json(header, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError("__metadata__ is not a map of strings", where=where)
    tensors = [_tensor(name, entry, path, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            kind = (
                "overlaps the tensor before it" if tensor.start < end else f"leaves {tensor.start - end} bytes unused"
            )
            raise SourceError(f"tensor {_quote(tensor.name)} {kind}", where=where, mend=FETCH_AGAIN)
        end = tensor.end
    if end != size:
        what = f"the tensors end at byte {end}, but the file has {size}"
        last = f" (the last is {_quote(tensors[-1].name)})" if tensors else ""
        raise SourceError(what + last, where=where, mend=FETCH_AGAIN)
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    def bad(what: str) -> SourceError:
        return SourceError(f"tensor {_quote(name)}: {what}", where=str(path), mend=FETCH_AGAIN)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise bad(f"unknown dtype {_quote(str(dtype))}")
    # `type(...) is int`: in Python a bool is an int too.
    if not isinstance(shape, list) or len(shape) > 64 or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape):
        raise bad(f"shape {_quote(str(shape))} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise bad(f"data_offsets {_quote(str(offsets))} are not two numbers")
    start, end = offsets
    if not 0 <= start <= end:
        raise bad(f"data_offsets {start}, {end} are out of order")
    needed = dtypes.nbytes(dtype, math.prod(shape))
    if needed != end - start:
        raise bad(f"{dtype} of shape {shape} takes {needed} bytes, but data_offsets give {end - start}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, data_start + end)


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """The weight map of a sharded checkpoint: tensor name -> shard file name, each a plain name in the same folder."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("has no weight_map", where=str(path), mend=FETCH_AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard, suffix):
            what = f"tensor {_quote(name)} is said to be in {_quote(str(shard))}, which is no {suffix} file name"
            raise SourceError(what, where=str(path), mend="A shard must lie in the index's own folder.")
        if not (path.parent / shard).is_file():
            raise SourceError(f"shard {shard} is missing", where=str(path), mend="Fetch the whole repository again.")
    return weight_map


def _is_plain(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not any(bad in name for bad in ("/", "\\", "\0", ":")) and name[0] != "."


class Checkpoint:
    """The tensors of a folder or file, by name, in the order of their bytes; read without holding more than asked for.

    Safe to read from several threads. Close it, or use it as a context manager.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise SourceError(f"has no tensor {_quote(name)}", where=str(self.path)) from None

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its own dtype."""
        return self.read_rows(name, 0, self.info(name).rows)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) along the first dimension, in the tensor's own dtype; a scalar has one row."""
        info = self.info(name)
        dtype = dtypes.torch_dtype(info.dtype)
        if dtype is None:
            raise SourceError(f"tensor {_quote(name)} is {info.dtype}, which torch cannot hold", where=str(info.file))
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        return self.read_bytes(name, first, last).view(dtype).view(shape)

    def read_bytes(self, name: str, first: int, last: int) -> Tensor:
        """The bytes of rows [first, last), as uint8."""
        import torch

        data = torch.empty((last - first) * self.row_bytes(name), dtype=torch.uint8)
        self.read_into(name, first, last, memoryview(data.numpy()))
        return data

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors are equal byte for byte, and of one shape and dtype; a part is in memory at a time."""
        import torch

        info, like = self.info(one), self.info(other)
        if (info.shape, info.dtype) != (like.shape, like.dtype):
            return False
        step = max(1, _COMPARED_AT_ONCE * info.rows // max(info.nbytes, 1))
        ranges = ((first, min(first + step, info.rows)) for first in range(0, info.rows, step))
        return all(torch.equal(self.read_bytes(one, *rows), self.read_bytes(other, *rows)) for rows in ranges)

    def read_into(self, name: str, first: int, last: int, data: memoryview) -> None:
        """Put the bytes of rows [first, last) into a buffer of their size."""
        info = self.info(name)
        self._fill(data, info, info.start + first * self.row_bytes(name))

    def row_bytes(self, name: str) -> int:
        """Bytes of one row; of a scalar, of it."""
        info = self.info(name)
        return info.nbytes // max(info.rows, 1)

    def rows_on(self, desk: Desk, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last), float32 on the desk's device."""
        return desk.read(self, name, first, last)

    def expect(self, name: str, first: int, last: int) -> None:
        """Ask the kernel to have rows [first, last) in memory soon."""
        info, row = self.info(name), self.row_bytes(name)
        if hasattr(os, "posix_fadvise") and row and last > first:
            start, length = info.start + first * row, (last - first) * row
            os.posix_fadvise(self._descriptor(info.file), start, length, os.POSIX_FADV_WILLNEED)

    def _fill(self, buffer: memoryview, info: TensorInfo, offset: int) -> None:
        descriptor = self._descriptor(info.file)
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[done : done + _READ]], offset + done)
            except OSError as error:
                what = f"tensor {_quote(info.name)} cannot be read: {error.strerror}"
                raise SourceError(what, where=str(info.file)) from error
            if got == 0:
                what = f"tensor {_quote(info.name)} ends {len(buffer) - done} bytes early"
                raise SourceError(what, where=str(info.file), mend=FETCH_AGAIN)
            done += got

    def _descriptor(self, file: Path) -> int:
        if file in self._files:
            return self._files[file]
        with self._lock:
            if file not in self._files:
                try:
                    self._files[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    raise SourceError(f"cannot be read: {error.strerror}", where=str(file)) from error
            return self._files[file]


def open_checkpoint(path: Path, stem: str = "model") -> Checkpoint:
    """The checkpoint in a folder, or the one file given.

    Looked for in a folder, in this order: <stem>.safetensors, its index, <stem>.pt, any other single index, any other
    single safetensors file, pytorch_model.bin and its index, any other single .pt file. All but safetensors is read
    with weights_only. Raises SourceError when there is none.
    stem: "fisher" for a mask, which a published folder holds beside others.
    """
    if path.is_file():
        pickled = path.suffix in (".bin", ".pt", ".pth")
        return _open_pickled(path, [path]) if pickled else Checkpoint(path, read_header(path))
    if not path.is_dir():
        raise SourceError("no such folder or file", where=str(path))
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if single.is_file():
        return Checkpoint(path, read_header(single))
    if index.is_file():
        return _open_sharded(path, index)
    if (path / f"{stem}.pt").is_file():
        return _open_pickled(path, [path / f"{stem}.pt"])
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _open_sharded(path, indices[0])
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return Checkpoint(path, read_header(files[0]))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise SourceError(f"has several safetensors files ({names}) and no index", where=str(path))
    if (path / "pytorch_model.bin").is_file():
        return _open_pickled(path, [path / "pytorch_model.bin"])
    index = path / "pytorch_model.bin.index.json"
    if index.is_file():
        weight_map = read_index(index, ".bin")
        found = _open_pickled(path, [path / shard for shard in sorted(set(weight_map.values()))])
        _check_all_listed({n: shard for n, shard in weight_map.items() if n not in found.tied}, found.tensors, index)
        return found
    pickles = sorted(path.glob("*.pt"))
    if len(pickles) == 1:
        return _open_pickled(path, pickles)
    raise SourceError("has no weights", where=str(path), mend="Expected model.safetensors, or shards with their index.")


def _open_sharded(folder: Path, index: Path) -> Checkpoint:
    weight_map = read_index(index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                what = f"tensor {_quote(name)} is in {tensors[name].file.name} and again in {shard}"
                raise SourceError(what, where=str(index), mend=FETCH_ALL)
            tensors[name] = info
    _check_all_listed(weight_map, tensors, index)
    return Checkpoint(folder, tensors)


def _check_all_listed(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], index: Path) -> None:
    """SourceError unless each tensor is in the shard that the index says, and each tensor and shard is in the index."""
    for name, info in tensors.items():
        if name not in weight_map:
            what = f"{info.file.name} holds tensor {_quote(name)}, which is not listed"
            raise SourceError(what, where=str(index), mend=FETCH_ALL)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise SourceError(f"tensor {_quote(name)} is not in {shard}", where=str(index), mend=FETCH_ALL)
    named = set(weight_map.values())
    sets = {re.sub(r"\d+(-of-\d+\.)", r"*\1", shard) for shard in named if "-of-" in shard}
    for file in sorted(file.name for pattern in sets for file in index.parent.glob(pattern)):
        if file not in named:
            raise SourceError(f"lists nothing of {file}", where=str(index), mend=FETCH_ALL)


def _open_pickled(path: Path, files: list[Path]) -> PickledCheckpoint:
    from hubforge.tensors.pickled import PickledCheckpoint

    return PickledCheckpoint.open(path, files)
