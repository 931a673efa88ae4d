"""The element types of safetensors files: their sizes, and what torch calls them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_NAMES = {torch_name: name for name, torch_name in _TORCH.items()}
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})  # what a merge computes on
SMALL_FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})  # need scales: see `quantised.py`
COUNTERS = frozenset({"BOOL", "I16", "I32", "I64", "U16", "U32", "U64"})  # of buffers such as position_ids


@cache
def torch_dtype(name: str) -> torch.dtype | None:
    """torch's type for a safetensors dtype name; None for the packed 4- and 6-bit ones."""
    import torch

    return getattr(torch, _TORCH[name]) if name in _TORCH else None


def from_torch(dtype: torch.dtype | str) -> str:
    """The safetensors name of a torch dtype ("bfloat16" -> "BF16")."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def torch_name(name: str) -> str:
    """How configs and cards write a safetensors dtype: "BF16" -> "bfloat16"."""
    return _TORCH.get(name, name)


def nbytes(dtype: str, elements: int) -> int:
    """Bytes that many elements take; -1 when packed elements do not fill whole bytes."""
    bits = BITS[dtype] * elements
    return bits // 8 if bits % 8 == 0 else -1
