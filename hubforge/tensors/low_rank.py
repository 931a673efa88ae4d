"""The best approximation of a matrix by another of lower rank, exactly, and what it leaves out.

By Eckart and Young (1936) it is U · diag(S) · Vᵀ of the leading singular triples. A product of factors is solved
through their QR decompositions in float64, at the cost of the factors alone; any other matrix by the eigenvectors that
`spectrum.py` finds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError
from hubforge.tensors.names import natural_order
from hubforge.tensors.spectrum import eigenpairs
from hubforge.tensors.writer import write_whole

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 22  # elements turned into float64 at once
RANKS = "ranks.json"  # beside an adapter that was brought to a lower rank: the facts of each matrix


@dataclass(frozen=True)
class LowRank:
    """W ≈ B · A with A = Vᵀ (rank, in), its rows orthonormal, and B = U · diag(S) (out, rank); float32."""

    a: Tensor
    b: Tensor
    S: Tensor  # (rank,), float64, falling: the singular values that were kept
    energy: float  # ‖W‖², in the squared Frobenius norm

    @property
    def rank(self) -> int:
        return len(self.S)

    @property
    def kept(self) -> float:
        """Share of the energy that was kept, in [0, 1]; 1 for a matrix of zeros."""
        return min(1.0, float((self.S**2).sum()) / self.energy) if self.energy else 1.0

    @property
    def error(self) -> float:
        """‖W − B·A‖ / ‖W‖, in [0, 1]. Below 1e-7 it is rounding."""
        return math.sqrt(max(0.0, 1 - self.kept))

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A, B), filled up with zeros to `rank`."""
        import torch

        missing = rank - self.rank
        return torch.nn.functional.pad(self.a, (0, 0, 0, missing)), torch.nn.functional.pad(self.b, (0, missing))

    def facts(self) -> dict[str, float]:
        """JSON: rank, norm of the whole matrix, share of the energy kept, relative error."""
        return {"rank": self.rank, "norm": math.sqrt(self.energy), "kept": self.kept, "error": self.error}


def reduce_product(a: Tensor, b: Tensor, rank: int) -> LowRank:
    """B @ A brought to `rank`, without forming the product: A (r, in) and B (out, r) of any r.

    Aᵀ = Qa·Ra and B = Qb·Rb, so B·A = Qb · (Rb·Raᵀ) · Qaᵀ, whose core is r × r; the orthogonal factors are applied to
    the leading vectors of its SVD alone and never formed. StepError for factors that are not finite.
    """
    import torch

    qa, ta = torch.geqrf(a.T.double())
    qb, tb = torch.geqrf(b.double())
    core = qb[: b.shape[1]].triu() @ qa[: a.shape[0]].triu().T
    if not bool(torch.isfinite(core).all()):
        raise StepError("the factors hold NaN or infinity")
    left, S, right = torch.linalg.svd(core, full_matrices=False)
    energy = float((S**2).sum())
    left, S, right = left[:, :rank], S[:rank], right[:rank]
    return LowRank(_rotate(qa, ta, right.T).T.float(), _rotate(qb, tb, left * S).float(), S, energy)


def _rotate(reflectors: Tensor, tau: Tensor, columns: Tensor) -> Tensor:
    """Q · columns, for the Q of geqrf's reflectors; the columns may be shorter and are filled up with zeros."""
    import torch

    missing = reflectors.shape[0] - columns.shape[0]
    return torch.ormqr(reflectors, tau, torch.nn.functional.pad(columns, (0, 0, 0, missing)))


def reduce_matrix(W: Tensor, rank: int, energy: float | None = None) -> LowRank:
    """A float32 matrix brought to `rank`, or less where its numerical rank is less.

    energy: stop at the smallest rank that keeps this share. What is kept is measured on W in float64, not read off the
    eigenvalues. Holds two float64 copies of the Gram matrix (that of the smaller side) and one of the factors.
    StepError for NaN.
    """
    import torch

    wide = W if W.shape[0] <= W.shape[1] else W.T  # (m, n), m <= n
    found, total = eigenpairs(wide, rank, energy)
    E = torch.from_numpy(found.vectors) if found else torch.zeros(len(wide), 0, dtype=torch.float64)  # (m, rank)
    projected = torch.empty(E.shape[1], wide.shape[1], dtype=torch.float64)
    step = max(1, _BLOCK // max(len(wide), 1))
    for first in range(0, wide.shape[1], step):
        projected[:, first : first + step] = E.T @ wide[:, first : first + step].double()
    S = projected.norm(dim=1)
    if wide is W:
        return LowRank((projected / S[:, None]).float(), (E * S).float(), S, total)
    return LowRank(E.T.float().contiguous(), projected.T.float().contiguous(), S, total)


def summary(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of all matrices: the share of energy kept, the matrix that kept least, and the relative error of the whole."""
    norms = sum(fact["norm"] ** 2 for fact in facts.values())
    lost = sum(fact["norm"] ** 2 * (1 - fact["kept"]) for fact in facts.values())
    least = min(facts, key=lambda name: (facts[name]["kept"], name))
    return {
        "kept": 1 - lost / norms if norms else 1.0,
        "error": math.sqrt(lost / norms) if norms else 0.0,
        "least": [least, facts[least]["kept"]],
    }


def write_ranks(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the facts of each matrix, by the module's name in natural order."""
    ordered = {name: facts[name] for name in sorted(facts, key=natural_order)}
    write_whole(folder / RANKS, (json.dumps(ordered, indent=1) + "\n").encode("utf-8"))
