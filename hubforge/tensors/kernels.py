"""Weighted sums, their rounding and their gain in one pass over a block, compiled: tile by tile, within a core's cache.

The same bits as the torch operations they stand for (`combination.py`, `rounding.py`), several times as fast: torch
goes over a block once for each operation, and over bfloat16 once more to widen it. Numba compiles these functions when
they are first imported, which takes seconds, and keeps the machine code beside them or in the user's cache folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_TILE = 2048  # elements, 8 kB of float32: with the inputs' and the output's it stays in the first cache
_ONE, _HALF, _SHIFT, _NAN = np.uint32(1), np.uint32(0x7FFF), np.uint32(16), np.uint32(0x7FC0)
_SIGN, _UNIT = np.uint32(0x80000000), np.uint32(0x3F800000)  # the sign bit of a float32; 1.0


def _compiled(signature: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiled now for the one signature, without the GIL; cached where there is a folder for it."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # Neither the package's folder nor the user's can be written to.
            return numba.njit(signature, nogil=True, error_model="numpy", **options)(function)

    return compile_


@intrinsic  # type: ignore[untyped-decorator]
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once, as torch's `add` with `alpha` does it."""
    return types.float32(*[types.float32] * 3), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(context: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _wide(x: Any) -> Any:
    """bfloat16, as its 16 bits, in float32."""
    return _as_float(np.uint32(x) << _SHIFT)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _sign(value: Any) -> Any:
    """1 with the sign of a float32, a zero's too."""
    return _as_float((_as_bits(value) & _SIGN) | _UNIT)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _narrow(value: Any) -> Any:
    """float32 in bfloat16, to the nearest, half to even; every NaN becomes torch's."""
    bits = _as_bits(value)
    rounded = np.uint32(bits + _HALF + ((bits >> _SHIFT) & _ONE)) >> _SHIFT
    return np.uint16(_NAN if value != value else rounded)


# Loops that only sum may be summed in lanes: no byte of the output depends on it. There are two of them, for a base in
# bfloat16 and in float32: with one, and the base widened into a tile first, `combine` took 1.2 to 1.7 times as long.
@_compiled("Tuple((f4,f4))(f4[::1], u2[::1], u2[::1])", fastmath={"reassoc"})
def _gain(merged: Any, base: Any, rounded: Any) -> Any:
    square, product = np.float32(0), np.float32(0)
    for j in range(len(merged)):
        intended = merged[j] - _wide(base[j])
        square += intended * intended
        product += intended * (_wide(rounded[j]) - merged[j])
    return square, product


@_compiled("Tuple((f4,f4))(f4[::1], f4[::1], u2[::1])", fastmath={"reassoc"})
def _gain_of_wide(merged: Any, base: Any, rounded: Any) -> Any:
    square, product = np.float32(0), np.float32(0)
    for j in range(len(merged)):
        intended = merged[j] - base[j]
        square += intended * intended
        product += intended * (_wide(rounded[j]) - merged[j])
    return square, product


@_compiled("Tuple((f8,f8))(u2[:,::1], i8[::1], f4[::1], f4, b1, u2[::1])")
def combine(rows: Any, picked: Any, weights: Any, divisor: Any, relative: Any, out: Any) -> Any:
    """A `Combination` of bfloat16 rows, rounded to bfloat16; and `rounding.gain_sums` of it.

    rows: uint16 [inputs, n], the base's first. picked, weights: int64 and float32 [k], the rows in the order in which
    they are added, and their factors. relative: rows[0] + Σ weights[i] · (rows[picked[i]] − rows[0]); else Σ weights[i]
    · rows[picked[i]] / divisor. out: uint16 [n]. Where something is not finite, neither are the sums.
    """
    merged = np.empty(_TILE, np.float32)
    square, product = 0.0, 0.0
    for first in range(0, rows.shape[1], _TILE):
        n = min(_TILE, rows.shape[1] - first)
        base, rounded = rows[0, first : first + n], out[first : first + n]
        if relative:
            for j in range(n):
                merged[j] = _wide(base[j])
        else:
            added, weight = rows[picked[0], first : first + n], weights[0]
            for j in range(n):
                merged[j] = _wide(added[j]) * weight
        for i in range(0 if relative else 1, len(picked)):
            added, weight = rows[picked[i], first : first + n], weights[i]
            if relative:
                for j in range(n):
                    merged[j] = _fma(_wide(added[j]) - _wide(base[j]), weight, merged[j])
            else:
                for j in range(n):
                    merged[j] = _fma(_wide(added[j]), weight, merged[j])
        if divisor != 1:
            for j in range(n):
                merged[j] = merged[j] / divisor
        for j in range(n):
            rounded[j] = _narrow(merged[j])
        squares, errors = _gain(merged[:n], base, rounded)
        square += squares
        product += errors
    return square + product, square


@_compiled("void(f4[:,::1], f4[::1], i8, f4[::1])")
def _add_up(parts: Any, weights: Any, n: int, merged: Any) -> None:
    """Σ weights[i] · parts[i], of the first n elements."""
    for j in range(n):
        merged[j] = parts[0, j] * weights[0]
    for i in range(1, len(weights)):
        part, weight = parts[i], weights[i]
        for j in range(n):
            merged[j] = _fma(part[j], weight, merged[j])


@_compiled("void(f4[:,::1], f4[::1], b1, i8, f4[:,::1], f4[::1])")
def _elect(parts: Any, weights: Any, normalize: bool, n: int, spare: Any, merged: Any) -> None:
    """The same of those that have the sign of that sum, each rounded first; divided by the sum of their weights."""
    sign, divisor = spare[0], spare[1]
    for i in range(len(weights)):
        part, weight = parts[i], weights[i]
        for j in range(n):
            part[j] = part[j] * weight
    for j in range(n):
        sign[j] = parts[0, j]
    for i in range(1, len(weights)):
        part = parts[i]
        for j in range(n):
            sign[j] = sign[j] + part[j]
    for j in range(n):
        sign[j] = _sign(sign[j])
        merged[j] = divisor[j] = 0
    for i in range(len(weights)):
        part, weight = parts[i], weights[i]
        for j in range(n):
            agreeing = part[j] * sign[j]
            # Only what is below zero goes: NaN stays, and shows in the sums.
            merged[j] = merged[j] + (np.float32(0) if agreeing < 0 else agreeing)
            divisor[j] = divisor[j] + (weight if agreeing > 0 else np.float32(0))
    for j in range(n):
        merged[j] = merged[j] * sign[j]
    if normalize:
        for j in range(n):
            merged[j] = merged[j] / (np.float32(1) if divisor[j] == 0 else divisor[j])


@_compiled("Tuple((f8,f8))(u2[:,::1], i8[::1], b1[:,::1], f4[::1], f4[::1], b1, b1, f4, u2[::1])")
def thin(
    rows: Any, picked: Any, kept: Any, factors: Any, weights: Any, elects: bool, normalize: bool, scale: Any, out: Any
) -> Any:
    """A `Thinned` sum of bfloat16 rows, rounded to bfloat16; and `rounding.gain_sums` of it.

    rows: uint16 [inputs, n], the base's first. picked, factors, weights: int64 and float32 [k], of each part the row,
    the factor of what it keeps, and the weight. kept: bool [k, n]. out: uint16 [n].
    """
    parts, spare = np.empty((len(picked), _TILE), np.float32), np.empty((2, _TILE), np.float32)
    merged = np.empty(_TILE, np.float32)
    square, product = 0.0, 0.0
    for first in range(0, rows.shape[1], _TILE):
        n = min(_TILE, rows.shape[1] - first)
        base, rounded = rows[0, first : first + n], out[first : first + n]
        for i in range(len(picked)):
            added, chosen, part = rows[picked[i], first : first + n], kept[i, first : first + n], parts[i]
            for j in range(n):
                part[j] = (factors[i] if chosen[j] else np.float32(0)) * (_wide(added[j]) - _wide(base[j]))
        if elects:
            _elect(parts, weights, normalize, n, spare, merged)
        else:
            _add_up(parts, weights, n, merged)
        for j in range(n):
            merged[j] = _fma(merged[j], scale, _wide(base[j]))
        for j in range(n):
            rounded[j] = _narrow(merged[j])
        squares, errors = _gain(merged[:n], base, rounded)
        square += squares
        product += errors
    return square + product, square


@_compiled("Tuple((f8,f8))(f4[::1], f4[::1], u2[::1])")
def finish(base: Any, merged: Any, out: Any) -> Any:
    """float32 [n] rounded to bfloat16, as uint16 [n]; and `rounding.gain_sums` of it."""
    square, product = 0.0, 0.0
    for first in range(0, len(out), _TILE):
        last = min(first + _TILE, len(out))
        wanted, rounded = merged[first:last], out[first:last]
        for j in range(last - first):
            rounded[j] = _narrow(wanted[j])
        squares, errors = _gain_of_wide(wanted, base[first:last], rounded)
        square += squares
        product += errors
    return square + product, square


@_compiled("Tuple((f8,f8,f8))(u2[::1], u2[::1])", fastmath={"reassoc"})
def products(one: Any, other: Any) -> Any:
    """a·a, a·d and d·d of d = b − a in float64, of bfloat16 rows."""
    aa, ad, dd = 0.0, 0.0, 0.0
    for j in range(len(one)):
        a = np.float64(_wide(one[j]))
        d = np.float64(_wide(other[j])) - a
        aa += a * a
        ad += a * d
        dd += d * d
    return aa, ad, dd
