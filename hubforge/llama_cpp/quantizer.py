"""An unquantized GGUF -> a quantized one, by llama.cpp's own code in a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hubforge.llama_cpp.header import TENSOR_TYPES, read_header
from hubforge.llama_cpp.process import run_module, written_whole
from hubforge.processes import cpu_threads

# Our name: llama.cpp's number of it (enum llama_ftype in llama.h). The IQ1 to IQ3_XXS types need an importance matrix.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ4_XS": 30,
    "BF16": 32,
}
_STEP = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")
_K_BLOCK = 256


@dataclass(frozen=True)
class Quantization:
    library: str
    """What quantized it: "cyllama 0.2.18 (llama.cpp b9190)"."""
    fallbacks: tuple[str, ...]
    """Tensors whose rows are no multiple of 256 and so got another type than their neighbours, with that type."""


def quantize(
    source: Path,
    target: Path,
    type_: str,
    *,
    threads: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Quantization:
    """Quantize the GGUF `source` to `target`, which appears whole or not at all.

    Raises SourceError when `source` is no whole GGUF, StepError when llama.cpp fails or dies of it.
    """
    read_header(source)

    def read(line: str) -> None:
        if step := _STEP.match(line):
            progress(int(step[1]) / int(step[2]))

    with written_whole(target) as unfinished:
        asked = {
            "source": str(source),
            "target": str(unfinished),
            "ftype": FILE_TYPES[type_],
            "threads": threads or cpu_threads(),
        }
        library = run_module(
            "hubforge.llama_cpp.quantize_driver",
            [json.dumps(asked)],
            what=f"llama.cpp's quantizer, making {type_},",
            where=str(source),
            on_line=read,
        )
        fallbacks = _fallbacks(unfinished, type_)
    return Quantization(library.strip(), fallbacks)


def _fallbacks(path: Path, type_: str) -> tuple[str, ...]:
    """Quantized tensors in blocks of less than 256 where the type asked for has blocks of 256."""
    if "_K" not in type_ and type_ not in ("IQ3_S", "IQ3_M", "IQ4_XS"):
        return ()
    blocks = {name: block for name, block, _ in TENSOR_TYPES.values()}
    return tuple(
        f"{tensor.name} ({tensor.type})"
        for tensor in read_header(path).tensors
        if len(tensor.shape) > 1 and tensor.shape[0] % _K_BLOCK and blocks[tensor.type] < _K_BLOCK
        if tensor.type != "F32"  # What is left in float32, as routers are, was never to be quantized.
    )
