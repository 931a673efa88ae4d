"""The leading singular vectors of one matrix, exactly: by the eigenvectors of its Gram matrix on the smaller side.

Exact, since the spectra of fine-tuning deltas decay slowly, and there randomized methods return another subspace while
the captured energy still reads .999. In float64, since a Gram matrix squares the condition number: in float32 the
subspace of a 1/i spectrum is off by an angle of .03 at k = 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubforge.errors import StepError

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

_BLOCK = 1 << 22  # elements turned into float64 at once
_WELL_CONDITIONED = 1e3  # S[0] / S[-1] up to which Y / S is orthonormal to 1e-10 as it stands
_RESIDUAL = 1e-9  # of the largest eigenvalue: LAPACK leaves 1e-13 or so


@dataclass(frozen=True)
class Leading:
    """W ≈ U diag(S) Vᵀ: U (out, k) and V (in, k) with orthonormal columns, S (k,) falling; float32."""

    U: Tensor
    S: Tensor
    V: Tensor
    energy: float  # ‖W‖², in the squared Frobenius norm
    residual: float  # ‖G·E − E·Λ‖ / λ₁ of the Gram matrix G and its eigenvectors E: how exact the solver was
    angle_bound: float  # of the sine of the largest angle to the true subspace; 1 where it says nothing

    @property
    def rank(self) -> int:
        return len(self.S)

    @property
    def captured(self) -> float:
        """Share of the energy that lies in the subspace, in [0, 1]."""
        return min(1.0, float((self.S.double() ** 2).sum()) / self.energy) if self.energy else 0.0


def leading(W: Tensor, rank: int, energy: float | None = None) -> Leading:
    """The leading singular triples of a float32 matrix: at most `rank`, and no more than its numerical rank.

    energy: stop at the smallest number of them that holds this share of the energy. Rank 0 for a matrix of zeros.
    The bound on the angle is that of Davis and Kahan: residual over the gap to the next eigenvalue. Where the gap is
    lost in rounding it exceeds 1, and which vectors span "the top k" is then a matter of chance. Takes a float64 copy
    of the Gram matrix twice, and of W's projection: 2 m² + 2 n k numbers for m the smaller side of W, n the larger.
    Source: Davis and Kahan 1970; Yu, Wang and Samworth 2015, arXiv:1405.0680, theorem 2.
    """
    import numpy
    import torch
    from scipy.linalg import eigh

    wide = W if W.shape[0] <= W.shape[1] else W.T  # (m, n), m <= n
    m = wide.shape[0]
    G = _gram(wide)
    total = float(numpy.trace(G))
    if not math.isfinite(total):
        raise StepError("the difference is not finite")
    none = Leading(W.new_zeros(W.shape[0], 0), W.new_zeros(0), W.new_zeros(W.shape[1], 0), total, 0.0, 0.0)
    if total == 0:
        return none
    k = min(rank, m)
    lowest = max(m - k - 1, 0)  # One more than asked for, to see the gap.
    values, vectors = eigh(G, lower=True, subset_by_index=[lowest, m - 1], driver="evr", check_finite=False)
    next_value = float(max(values[0], 0.0)) if m > k else 0.0
    order = numpy.argsort(values)[::-1][:k]
    values, vectors = values[order], vectors[:, order]
    kept = int((values > values[0] * m * numpy.finfo(numpy.float64).eps).sum())
    if kept < k:
        next_value = float(max(values[kept], 0.0))
    if energy is not None:
        enough = int(numpy.searchsorted(numpy.cumsum(values[:kept]), energy * total * (1 - 1e-12))) + 1
        if enough < kept:
            next_value, kept = float(values[enough]), enough
    values, vectors = values[:kept], numpy.ascontiguousarray(vectors[:, :kept])
    residual = _residual(G, values, vectors)
    if residual > _RESIDUAL * values[0]:
        raise StepError(f"the eigensolver did not converge: residual {residual / values[0]:.1e} of the largest value")
    # Rounding in the Gram matrix itself counts as residual too.
    uncertain = residual + float(numpy.finfo(numpy.float64).eps) * total
    gap = float(values[-1]) - next_value
    E = torch.from_numpy(vectors)  # (m, k)
    near, S, far = _both_sides(wide, E)
    U, V = (near, far) if wide is W else (far, near)
    angle = 0.0 if kept == m else min(1.0, uncertain / gap) if gap > 0 else 1.0
    return Leading(U, S, V, total, residual / float(values[0]), angle)


def _gram(wide: Tensor) -> numpy.ndarray:
    """The lower triangle of W Wᵀ, float64, summed over blocks of columns."""
    import numpy
    from scipy.linalg.blas import dsyrk

    m, n = wide.shape
    G = numpy.zeros((m, m), order="F")
    step = max(1, _BLOCK // m)
    for first in range(0, n, step):
        block = wide[:, first : first + step].double().numpy()
        # BLAS wants columns: a block whose rows are contiguous goes in as its transpose, uncopied.
        a, transposed = (block, 0) if block.flags.f_contiguous else (block.T, 1)
        G = dsyrk(1.0, a, beta=1.0, c=G, trans=transposed, lower=1, overwrite_c=1)
    return G


def _residual(G: numpy.ndarray, values: numpy.ndarray, vectors: numpy.ndarray) -> float:
    """‖G·E − E·Λ‖ in the Frobenius norm; G is read by its lower triangle."""
    import numpy
    from scipy.linalg.blas import dsymm

    product = dsymm(1.0, G, numpy.asfortranarray(vectors), lower=1)
    return float(numpy.linalg.norm(product - vectors * values))


def _both_sides(wide: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors of both sides from those of the shorter, rotated to be orthonormal to rounding; float32."""
    import torch

    n, k = wide.shape[1], E.shape[1]
    Y = torch.empty(n, k, dtype=torch.float64)
    step = max(1, _BLOCK // wide.shape[0])
    for first in range(0, n, step):
        Y[first : first + step] = wide[:, first : first + step].T.double() @ E
    S = Y.norm(dim=0)
    if S[0] < _WELL_CONDITIONED * S[-1]:
        return E.float(), S.float(), (Y / S).float()
    # The far sides of small singular values have lost their right angles: restore them. R is all but diagonal, so
    # this rotates hardly at all.
    Q, R = torch.linalg.qr(Y)
    left, S, right = torch.linalg.svd(R)
    return (E @ right.T).float().contiguous(), S.float(), (Q @ left).float().contiguous()
