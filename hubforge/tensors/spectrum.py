"""The leading singular vectors of one matrix, by the eigenvectors of its Gram matrix on the smaller side.

The spectra of fine-tuning deltas decay slowly, and there randomized methods of a few products return another subspace
while the captured energy still reads .999. So eigenvectors are found in float32, a few by block Lanczos (`krylov.py`),
many by LAPACK, and refined in float64 (Rayleigh-Ritz, with some vectors to spare), unless the spectrum is too steep for
that. They count only when a bound on the angle says so; else LAPACK finds them in float64, of the Gram matrix summed in
float64, since it squares the condition number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from hubforge.errors import StepError
from hubforge.tensors.krylov import STEEP, Rough, few_leading

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

_BLOCK = 1 << 22  # elements turned into float64 at once
_SQUARED = 1 << 16  # elements squared at once, within the cache
_RESIDUAL = 1e-9  # of the largest eigenvalue: LAPACK in float64 leaves 1e-13 or so
_ANGLE = 1e-4  # the bound up to which refined vectors count as found
_FEW = 20  # times the vectors wanted: in a matrix at least as large they are sought alone
_ROUNDS = 2  # of refinement; each multiplies the error by λ of the first vector left out over λ of the last wanted
_NOISE = 3e-5  # how far float32 products may turn the weakest direction of the far side


@dataclass(frozen=True)
class Leading:
    """W ≈ U diag(S) Vᵀ: U (out, k) and V (in, k) with orthonormal columns, S (k,) falling; float32."""

    U: Tensor
    S: Tensor
    V: Tensor
    energy: float  # ‖W‖², in the squared Frobenius norm
    residual: float  # ‖G·E − E·Λ‖ / λ₁ of the Gram matrix G and its eigenvectors E: how exact the solver was
    angle_bound: float  # of the sine of the largest angle to the true subspace; 1 where it says nothing
    solver: Literal["krylov", "refined", "exact"] = "exact"

    @property
    def rank(self) -> int:
        return len(self.S)

    @property
    def captured(self) -> float:
        """Share of the energy that lies in the subspace, in [0, 1]."""
        return min(1.0, float((self.S.double() ** 2).sum()) / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Pairs:
    """The leading eigenpairs of a Gram matrix, float64."""

    values: numpy.ndarray  # (k,), falling
    vectors: numpy.ndarray  # (m, k)
    residual: float  # ‖G·E − E·Λ‖
    angle: float  # bound on the sine of the largest angle, at most 1
    solver: Literal["krylov", "refined", "exact"]


def leading(W: Tensor, rank: int, energy: float | None = None) -> Leading:
    """The leading singular triples of a float32 matrix: at most `rank`, and no more than its numerical rank.

    energy: stop at the smallest number of them that holds this share of the energy. Rank 0 for a matrix of zeros.
    Where the gap at k is lost in rounding the bound on the angle is 1, and which vectors span "the top k" is then a
    matter of chance. Takes the Gram matrix in float64 twice, and W's projection: 2 m² + 2 n k numbers for m the smaller
    side of W, n the larger.
    Source: Davis and Kahan 1970; Yu, Wang and Samworth 2015, arXiv:1405.0680, theorem 2.
    """
    import torch

    wide = W if W.shape[0] <= W.shape[1] else W.T  # (m, n), m <= n
    found, total = eigenpairs(wide, rank, energy)
    if found is None:
        return Leading(W.new_zeros(W.shape[0], 0), W.new_zeros(0), W.new_zeros(W.shape[1], 0), total, 0.0, 0.0)
    near, S, far = _both_sides(wide, torch.from_numpy(found.vectors), math.sqrt(total))
    U, V = (near, far) if wide is W else (far, near)
    return Leading(U, S, V, total, found.residual / float(found.values[0]), found.angle, found.solver)


def eigenpairs(wide: Tensor, rank: int, energy: float | None = None) -> tuple[Pairs | None, float]:
    """The leading eigenpairs of W·Wᵀ, and its trace, for W with no more rows than columns; None for a W of zeros."""
    m = wide.shape[0]
    total = _energy(wide)
    if not math.isfinite(total):
        raise StepError("the difference is not finite")
    if total == 0:
        return None, total
    k = min(rank, m)
    spare = max(16, k // 4)
    if _FEW * (k + spare) <= m:
        unit = 1 / math.sqrt(total)  # In float32 what is very large or small would be lost when it is squared.
        rough = few_leading(lambda X: _through(wide, X * unit) * unit, m, k, spare)
        if rough and (found := _refined(rough, partial(_through, wide), m, k, energy, total)):
            return replace(found, solver="krylov"), total
    G = _gram(wide)
    found = None
    if 2 * (k + spare) < m and k < STEEP * _effective_rank(G, total):
        found = _refined(_many_leading(G, total, k + spare), partial(_times, G), m, k, energy, total)
    return found or _exact(G, k, energy, total), total


def _energy(W: Tensor) -> float:
    """‖W‖², summed in float64: what little is lost by keeping few directions is told from it."""
    flat = (W if W.is_contiguous() else W.T).reshape(-1)
    return sum(float(some.dot(some)) for some in (part.double() for part in flat.split(_SQUARED)))


def _effective_rank(G: numpy.ndarray, total: float) -> float:
    """tr(G)² / ‖G‖²: the number of equal eigenvalues that would have these two. G is read by its lower triangle."""
    import numpy

    squares = 2 * float(numpy.vdot(G, G)) - float(G.diagonal() @ G.diagonal())  # The upper triangle holds zeros.
    return total**2 / squares


def _many_leading(G: numpy.ndarray, total: float, wanted: int) -> Rough:
    """So many leading eigenvectors of G / total in float32, by LAPACK, which goes over all of G's."""
    import numpy
    from scipy.linalg import eigh

    m = len(G)
    values, vectors = eigh(
        numpy.multiply(G, 1 / total, out=numpy.empty(G.shape, numpy.float32, "F"), casting="same_kind"),
        lower=True,
        subset_by_index=[m - wanted - 1, m - 1],
        driver="evr",
        overwrite_a=True,
        check_finite=False,
    )
    beyond = float(values[0]) + 16 * float(numpy.finfo(numpy.float32).eps) * float(values[-1])
    return Rough(vectors[:, 1:], beyond)


def _refined(
    rough: Rough, multiply: Callable[[numpy.ndarray], numpy.ndarray], m: int, k: int, energy: float | None, total: float
) -> Pairs | None:
    """Rough eigenvectors of G, k and some to spare, refined in float64; None unless the bound on the angle is small.

    multiply: G·Q in float64. With X the Ritz vectors kept, Y the others at hand and Z all that is left, G is block
    diagonal but for the residuals R₁ = ZᵀGX and R₂ = ZᵀGY. To first order in R₁ the true subspace leans from X towards
    Z by ‖R₁‖ / (θ_k − c), c the largest eigenvalue of ZᵀGZ, and by way of Z towards Y by ‖R₂‖ / (θ_k − θ_k+1) times
    that. Davis and Kahan's bound knows only the small gap, θ_k − θ_k+1. c is `rough.beyond`, of G / total.
    """
    import numpy

    basis = rough.vectors.astype(numpy.float64)
    for _ in range(_ROUNDS):
        Q, _ = numpy.linalg.qr(basis)
        basis = multiply(Q)
        values, turn = numpy.linalg.eigh(Q.T @ basis)
        values, turn = values[::-1], turn[:, ::-1]
        kept = _enough(values[:k], energy, total, m)
        X = Q @ turn[:, :kept]
        first = float(numpy.linalg.norm(basis @ turn[:, :kept] - X * values[:kept]))
        # All of Y's residual and X's: ‖GQ‖² = ‖QᵀGQ‖² + ‖R‖².
        others = math.sqrt(max(float(numpy.vdot(basis, basis)) - float(values @ values), 0.0))
        first += float(numpy.finfo(numpy.float64).eps) * total
        outside, inside = float(values[kept - 1]) - rough.beyond * total, float(values[kept - 1] - values[kept])
        if outside > 0 and inside > 0 and (angle := first / outside * (1 + others / inside)) <= _ANGLE:
            return Pairs(values[:kept], X, first, angle, "refined")
    return None


def _times(G: numpy.ndarray, Q: numpy.ndarray) -> numpy.ndarray:
    """G·Q, float64; G is read by its lower triangle."""
    import numpy
    from scipy.linalg.blas import dsymm

    product: numpy.ndarray = dsymm(1.0, G, numpy.asfortranarray(Q), lower=1)
    return product


def _through(wide: Tensor, Q: numpy.ndarray) -> numpy.ndarray:
    """W·(Wᵀ·Q) in the dtype of Q, over blocks of columns of W: more exact than by way of the Gram matrix."""
    import torch

    left = torch.from_numpy(Q).T.contiguous()  # As rows: MKL multiplies few of them twice as fast as few columns.
    product = torch.zeros_like(left)
    step = max(1, _BLOCK // 4 // wide.shape[0])
    for first in range(0, wide.shape[1], step):
        some = wide[:, first : first + step].to(left.dtype)
        product.addmm_(left @ some, some.T)
    found: numpy.ndarray = product.T.numpy()
    return found


def _exact(G: numpy.ndarray, k: int, energy: float | None, total: float) -> Pairs:
    """Eigenvectors in float64, and Davis and Kahan's bound: residual over the gap to the next eigenvalue."""
    import numpy
    from scipy.linalg import eigh

    m = len(G)
    lowest = max(m - k - 1, 0)  # One more than asked for, to see the gap.
    values, vectors = eigh(G, lower=True, subset_by_index=[lowest, m - 1], driver="evr", check_finite=False)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = _enough(values[:k], energy, total, m)
    following = float(max(values[kept], 0.0)) if kept < m else 0.0
    values, vectors = values[:kept], vectors[:, :kept].copy()
    residual = float(numpy.linalg.norm(_times(G, vectors) - vectors * values))
    if residual > _RESIDUAL * values[0]:
        raise StepError(f"the eigensolver did not converge: residual {residual / values[0]:.1e} of the largest value")
    # Rounding in the Gram matrix itself counts as residual too.
    uncertain, gap = residual + float(numpy.finfo(numpy.float64).eps) * total, float(values[-1]) - following
    angle = 0.0 if kept == m else min(1.0, uncertain / gap) if gap > 0 else 1.0
    return Pairs(values, vectors, residual, angle, "exact")


def _enough(values: numpy.ndarray, energy: float | None, total: float, m: int) -> int:
    """How many of these eigenvalues, falling, count: those above rounding, and no more than hold the energy."""
    import numpy

    kept = int((values > values[0] * m * numpy.finfo(numpy.float64).eps).sum())
    if energy is not None:
        kept = min(kept, int(numpy.searchsorted(numpy.cumsum(values[:kept]), energy * total * (1 - 1e-12))) + 1)
    return kept


def _gram(wide: Tensor) -> numpy.ndarray:
    """The lower triangle of W Wᵀ, float64, summed over blocks of columns; zeros above it."""
    import numpy
    import torch
    from scipy.linalg.blas import dsyrk

    m, n = wide.shape
    G = numpy.zeros((m, m), order="F")
    step = max(1, _BLOCK // m)
    # One buffer throughout: fresh pages for each block cost a tenth of the whole. BLAS wants columns, and a block
    # whose rows are contiguous goes in as its transpose, uncopied.
    by_rows = wide.is_contiguous()
    buffer = torch.empty(m * min(step, n), dtype=torch.float64)
    for first in range(0, n, step):
        some = wide[:, first : first + step]
        block = buffer[: some.numel()].view(some.shape if by_rows else some.shape[::-1])
        block.copy_(some if by_rows else some.T)
        G = dsyrk(1.0, block.numpy().T, beta=1.0, c=G, trans=int(by_rows), lower=1, overwrite_c=1)
    return G


def _both_sides(wide: Tensor, E: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors of both sides from those of the shorter, rotated to be orthonormal to rounding; float32."""
    import torch

    n, k = wide.shape[1], E.shape[1]
    weakest = float((wide.T @ E[:, -1].float()).norm())
    if torch.finfo(torch.float32).eps / 2 * norm < _NOISE * weakest:
        Y = wide.T @ E.float()
        S = Y.double().norm(dim=0).float()
        return E.float(), S, Y / S
    Y = torch.empty(n, k, dtype=torch.float64)
    step = max(1, _BLOCK // wide.shape[0])
    for first in range(0, n, step):
        Y[first : first + step] = wide[:, first : first + step].T.double() @ E
    # The far sides of small singular values have lost their right angles: restore them. R is all but diagonal, so
    # this rotates hardly at all.
    Q, R = torch.linalg.qr(Y)
    left, S, right = torch.linalg.svd(R)
    return (E @ right.T).float().contiguous(), S.float(), (Q @ left).float().contiguous()
