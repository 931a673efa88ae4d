"""Models averaged on the sphere: the point whose squared distances to all of them, along arcs, are least in sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hubforge.op import Place
from hubforge.stages._gram import combination, gram, products
from hubforge.stages._models import Merge, indexed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class Karcher(Merge):
    """The Karcher (Riemannian) mean of the models' directions, tensor by tensor, at the mean of their lengths.

    Found by repeatedly averaging in the tangent plane of the last guess. All of it happens in the space the models
    span, so the inner products of the models, in float64, are all that is read before the sum is written.
    """

    formula: ClassVar[str] = "mean |Wᵢ| · argminₓ Σ ∠(x, Wᵢ)²,  |x| = 1"
    source: ClassVar[str] = "Karcher 1977, doi:10.1002/cpa.3160300502; merging: arXiv:2603.04972"

    max_iter: int = Field(10, ge=1, description="Most steps to take.")
    tol: float = Field(
        1e-5, gt=0, description="Radians: a smaller step is the last; lengths below it have no direction."
    )

    def measures(self) -> int:
        return 1

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, float]:
        return products({index: w[model] for index, model in indexed(self.models, w)})

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        held = indexed(self.models, w)
        factors = mean_on_sphere(gram(at.totals, [index for index, _ in held]), self.max_iter, self.tol)
        return combination(factors, [w[model] for _, model in held])


def mean_on_sphere(inner: NDArray[np.float64], max_iter: int = 10, tol: float = 1e-5) -> list[float]:
    """The factors by which vectors make up the Karcher mean of their directions times the mean of their lengths.

    inner: their inner products, (n, n). The first guess is the direction of the mean, or the first vector's.
    """
    import numpy as np

    norms = np.sqrt(inner.diagonal())
    has_direction = norms > tol
    if not has_direction.any():
        return [0.0] * len(norms)
    units = np.diag(has_direction / np.where(has_direction, norms, 1.0))[has_direction]  # a row: one unit vector
    mean = units.mean(0)
    if math.sqrt(max(mean @ inner @ mean, 0.0)) < tol:
        mean = units[0]
    mean = mean / math.sqrt(mean @ inner @ mean)
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            across = unit - (mean @ inner @ unit) * mean
            sine = math.sqrt(max(across @ inner @ across, 0.0))
            angle = math.atan2(sine, mean @ inner @ unit)
            if angle > tol and sine > 0:
                tangent += angle / sine * across / len(units)
        step = math.sqrt(max(tangent @ inner @ tangent, 0.0))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / math.sqrt(mean @ inner @ mean)
    return [float(factor) for factor in norms.mean() * mean]
