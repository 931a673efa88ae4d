"""The inner products of the models' tensors, taken in blocks: what methods on spheres need to know of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


def products(tensors: Mapping[int, Tensor]) -> Mapping[str, float]:
    """The inner product of every two, and of each with itself, by "i j" with i <= j; float64."""
    flat = {index: tensor.double().flatten() for index, tensor in tensors.items()}
    return {f"{i} {j}": float(flat[i] @ flat[j]) for i in flat for j in flat if i <= j}


def gram(totals: Mapping[str, float], indices: Sequence[int]) -> NDArray[np.float64]:
    """The matrix of those products over the whole tensor."""
    import numpy as np

    return np.array([[totals[f"{min(i, j)} {max(i, j)}"] for j in indices] for i in indices])


def combination(factors: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Σ cᵢ · Tᵢ, in the order of the list."""
    total = tensors[0] * float(factors[0])
    for factor, tensor in zip(factors[1:], tensors[1:], strict=True):
        total = total.add(tensor, alpha=float(factor))
    return total
