"""The squared gradients of a batch of examples, summed, in one GPU kernel: no gradient is ever written to memory.

A tile of G_bᵀ X_b is made in registers, squared, added up over the examples b, and added to the sums once. Needs
Triton, which comes with torch for CUDA; where it is not there, or cannot compile, plain torch does the same.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

tl: Any = None  # triton.language, once the kernel is made: Triton looks names up where a kernel was defined
_TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64}


def add_squares(sums: Tensor, gradient: Tensor, x: Tensor) -> bool:
    """Add sum_b (gradient[b]ᵀ x[b])² to sums; False, having done nothing, where there is no kernel for it.

    sums: (out, in), float32, contiguous. gradient: (batch, length, out), x: (batch, length, in), bfloat16 or float16 on
    a GPU, zero wherever an example is filled up. Products are summed in float32 and never rounded to 16 bits.
    """
    import torch

    if not sums.is_cuda or x.dtype != gradient.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    kernel = _kernel()
    if kernel is None or not sums.is_contiguous():
        return False
    launch(kernel, sums, gradient, x)
    return True


def launch(kernel: Any, sums: Tensor, gradient: Tensor, x: Tensor) -> None:
    gradient, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (gradient, x))
    batch, length, rows = gradient.shape
    columns = x.shape[-1]
    tiles = -(-rows // _TILE["ROWS"]) * -(-columns // _TILE["COLUMNS"])
    kernel[(tiles,)](
        gradient, x, sums, batch, length, rows, columns,
        gradient.stride(0), gradient.stride(1), x.stride(0), x.stride(1),
        **_TILE, num_warps=8, num_stages=3,
    )  # fmt: skip


@cache
def _kernel() -> Any:
    """The compiled kernel, tried once on a small case; None where Triton is missing or fails."""
    import torch

    try:
        kernel = make_kernel()
        g = torch.ones(2, 3, 5, dtype=torch.bfloat16, device="cuda")
        sums = torch.zeros(5, 4, device="cuda")
        launch(kernel, sums, g, g[..., :4].contiguous())
        return kernel if bool((sums == 18).all()) else None
    except Exception:  # No compiler, no Triton, a GPU it does not know: torch computes the same.
        return None


def make_kernel() -> Any:
    import importlib

    triton: Any = importlib.import_module("triton")
    globals()["tl"] = importlib.import_module("triton.language")
    return triton.jit(_squares)


def _squares(  # type: ignore[no-untyped-def]
    gradient, x, sums, batch, length, rows, columns, gradient_batch, gradient_token, x_batch, x_token,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    across = tl.cdiv(rows, ROWS)
    # Eight tiles high, then one to the side: what neighbours read stays in the cache.
    wide = tl.cdiv(columns, COLUMNS)
    band = tile // (8 * wide)
    high = tl.minimum(across - band * 8, 8)
    row = band * 8 + (tile % (8 * wide)) % high
    column = (tile % (8 * wide)) // high
    r = row * ROWS + tl.arange(0, ROWS)
    c = column * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    g_at, x_at = gradient, x
    for _ in range(batch):
        one = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, length, DEPTH):
            token = first + t
            g = tl.load(
                g_at + token[:, None] * gradient_token + r[None, :],
                mask=(token[:, None] < length) & (r[None, :] < rows),
                other=0.0,
            )
            v = tl.load(
                x_at + token[:, None] * x_token + c[None, :],
                mask=(token[:, None] < length) & (c[None, :] < columns),
                other=0.0,
            )
            one = tl.dot(tl.trans(g), v, one)
        total += one * one
        g_at += gradient_batch
        x_at += x_batch
    place = sums + r[:, None].to(tl.int64) * columns + c[None, :]
    inside = (r[:, None] < rows) & (c[None, :] < columns)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
