"""A few leading eigenvectors of a large symmetric matrix, roughly: block Lanczos in float32.

The Krylov space of a random block holds them in a few times their number of dimensions, where a tridiagonal form would
take all. What it finds is a guess, to be refined and judged by its residuals (`spectrum.py`). Residuals cannot tell of
an eigenvector that was not found, such as the twentieth of twenty with one eigenvalue, so another random block, cleared
of what was found, is asked for the largest eigenvalue that is left.
Source: Golub and Underwood 1977, doi:10.1016/B978-0-12-587260-7.50018-2; Saad 2011, doi:10.1137/1.9781611970739.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

    Multiply = Callable[[numpy.ndarray], numpy.ndarray]

STEEP = 32  # k over the effective rank from which float32 has lost the small eigenvalues
_BLOCK = 16  # vectors multiplied at once
_CONVERGED = 1e-7  # residuals, of the largest eigenvalue: what rounding in float32 leaves
_DIMENSIONS = 6  # times the number of vectors wanted: more is not tried
_LOOKS = 5  # products by which a random block comes near what is left


@dataclass(frozen=True)
class Rough:
    """Approximate leading eigenvectors, orthonormal but for rounding."""

    vectors: numpy.ndarray  # (m, wanted), float32 or float64
    beyond: float  # an upper bound, but for chance, on the eigenvalues of what they leave


def few_leading(multiply: Multiply, m: int, k: int, spare: int) -> Rough | None:
    """The k leading eigenvectors of G (m, m), of no negative eigenvalues, and `spare` less exact ones; float32.

    multiply: G·X for X (m, some), float32. None when they do not come out of `_DIMENSIONS` times as many dimensions,
    when some were missed, or when so few hold so much that float32 cannot tell the last of them.
    """
    import numpy
    from scipy.linalg import eigh

    wanted = k + spare
    most = min(_DIMENSIONS * wanted, m) // _BLOCK * _BLOCK
    Q = numpy.empty((m, most + _BLOCK), numpy.float32, order="F")
    projected = numpy.zeros((most, most), numpy.float32)
    Q[:, :_BLOCK] = numpy.linalg.qr(_random(m, 0))[0]
    check = 3 * wanted // 2
    for n in range(_BLOCK, most + 1, _BLOCK):
        basis, last = Q[:, :n], Q[:, n - _BLOCK : n]
        following = multiply(last)
        inside = basis.T @ following
        following -= basis @ inside
        again = basis.T @ following  # Once is not enough: what rounding left would grow from step to step.
        following -= basis @ again
        projected[:n, n - _BLOCK : n] = inside + again
        projected[n - _BLOCK : n, :n] = projected[:n, n - _BLOCK : n].T
        Q[:, n : n + _BLOCK], over = numpy.linalg.qr(following)
        if n >= check or n == most:
            values, turn = eigh(projected[:n, :n], check_finite=False)
            left = numpy.linalg.norm(over @ turn[n - _BLOCK :, -wanted:], axis=0)[::-1]
            if float(left[:k].max()) <= _CONVERGED * float(values[-1]):
                break
            check = n * 9 // 8
    else:
        return None
    if k >= STEEP * float(values.sum()) ** 2 / float(values @ values):
        return None
    vectors = basis @ turn[:, : -wanted - 1 : -1]
    # The later ones are less exact, and err downwards: an earlier one is taken for the next.
    place = k + 3 * spare // 4
    beyond = float(values[-1 - place]) + float(left[place]) + 16 * float(numpy.finfo(numpy.float32).eps) * values[-1]
    return Rough(vectors, float(beyond)) if _largest_left(multiply, vectors) <= beyond else None


def _largest_left(multiply: Multiply, found: numpy.ndarray) -> float:
    """About the largest eigenvalue of G on what is orthogonal to some of its eigenvectors; never too large."""
    import numpy

    block = _random(len(found), 1)
    for _ in range(_LOOKS):
        block -= found @ (found.T @ block)
        before, _ = numpy.linalg.qr(block)
        block = multiply(before)
    return float(numpy.linalg.eigvalsh(before.T @ block)[-1])


def _random(m: int, which: int) -> numpy.ndarray:
    """The same block on every machine, float32 (m, _BLOCK)."""
    from hubforge.tensors.random import uniform

    drawn: numpy.ndarray = uniform(0, ("krylov", which), 0, m * _BLOCK).numpy().reshape(m, _BLOCK) - 0.5
    return drawn
