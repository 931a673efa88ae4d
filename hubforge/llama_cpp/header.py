"""What a GGUF file says of itself: metadata and tensors, read with every bound checked.

Format: docs/gguf.md of ggml, versions 2 and 3, little-endian. The header of a stranger's file is not to be believed:
a length is compared with what the file still holds before a byte of it is read or allocated.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubforge.errors import SourceError

MAGIC = b"GGUF"
# type id: (name, elements in a block, bytes of a block). From ggml.h and GGML_QUANT_SIZES of gguf-py.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_KEEP = 64  # longer arrays, such as the vocabulary, are passed over


@dataclass(frozen=True)
class LongArray:
    """Stands for an array that was passed over."""

    length: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. shape as GGUF has it: the length of a row first. offset and size in bytes, from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Header:
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    size: int
    """Bytes of the whole file."""

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the tensors alone, as llama.cpp counts it; 0 where there are none."""
        return 8 * sum(tensor.size for tensor in self.tensors) / (self.parameters or 1)

    def count_types(self) -> dict[str, int]:
        """How many tensors there are of each type, the commonest first."""
        names = [tensor.type for tensor in self.tensors]
        return {name: names.count(name) for name in sorted(set(names), key=lambda one: (-names.count(one), one))}


class _Cursor:
    """Reads forward through the file, and never past its end."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def fail(self, what: str) -> SourceError:
        return SourceError(what, where=self.where, mend="The file is damaged or not whole. Fetch or make it again.")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.data[self.at - count : self.at]

    def need(self, count: int, what: str) -> None:
        if count > len(self.data) - self.at:
            raise self.fail(f"its header ends within {what}: {count} bytes wanted, {len(self.data) - self.at} left")

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        return self.take(self.number("Q", what), what).decode("utf-8", errors="replace")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            value = self.number(_SCALARS[kind], what)
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what)
        raise self.fail(f"{what} has the unknown value type {kind}")

    def _array(self, what: str) -> Any:
        kind, length = self.number("I", what), self.number("Q", what)
        if kind == _ARRAY:
            raise self.fail(f"{what} is an array of arrays, which llama.cpp does not read")
        if kind == _STRING:
            self.need(8 * length, what)  # Each string takes at least the 8 bytes of its length.
            if length <= _KEEP:
                return [self.string(what) for _ in range(length)]
            for _ in range(length):
                self.take(self.number("Q", what), what)
            return LongArray(length)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has the unknown value type {kind}")
        size = struct.calcsize(f"<{_SCALARS[kind]}")
        self.need(size * length, what)
        if length <= _KEEP:
            return [self.value(kind, what) for _ in range(length)]
        self.at += size * length
        return LongArray(length)


def read_header(path: Path) -> Header:
    """Metadata and tensors of the GGUF at `path`. SourceError when it is not one, is cut short, or lies."""
    where = str(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise SourceError("it does not start with GGUF, so it is not a GGUF file", where=where)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(data, where))
    except OSError as error:
        raise SourceError(f"it cannot be read: {error.strerror or error}", where=where) from error


def _read(cursor: _Cursor) -> Header:
    cursor.take(4, "its magic")
    version = cursor.number("I", "its version")
    if version not in (2, 3):
        raise SourceError(f"GGUF version {version} is not one that hubforge reads (2, 3)", where=cursor.where)
    tensor_count = cursor.number("Q", "its tensor count")
    metadata_count = cursor.number("Q", "its metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"its metadata has {key!r} twice")
        metadata[key] = cursor.value(cursor.number("I", key), key)
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    names: set[str] = set()
    for _ in range(tensor_count):
        name = cursor.string("a tensor name")
        if name in names:
            raise cursor.fail(f"it has the tensor {name!r} twice")
        names.add(name)
        dimensions = cursor.number("I", name)
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise cursor.fail(f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q", name) for _ in range(dimensions))
        found.append((name, shape, cursor.number("I", name), cursor.number("Q", name)))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise cursor.fail(f"its alignment is {alignment!r}, but must be a multiple of 8")
    start = -(-cursor.at // alignment) * alignment
    size = len(cursor.data)
    tensors = tuple(_tensor(cursor, name, shape, kind, start + at) for name, shape, kind, at in found)
    return Header(version, metadata, tensors, size)


def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
    """That tensor, whose bytes must all lie in the file."""
    if kind not in TENSOR_TYPES:
        raise cursor.fail(f"the tensor {name!r} has the unknown type {kind}")
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    tensor = TensorInfo(name, shape, type_name, offset, 0)
    if shape[0] % block:
        raise cursor.fail(f"the rows of {name!r} are {shape[0]} long, which {type_name} cannot be")
    tensor = TensorInfo(name, shape, type_name, offset, tensor.elements // block * block_bytes)
    if tensor.offset + tensor.size > len(cursor.data):
        raise cursor.fail(
            f"the tensor {name!r} ends at byte {tensor.offset + tensor.size}, but the file at {len(cursor.data)}"
        )
    return tensor
