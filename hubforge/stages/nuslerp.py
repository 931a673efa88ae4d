"""Two models joined along the arc between them, or between what they changed in a base: by tensor, row or column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hubforge.errors import StepError
from hubforge.op import ModelRef, Place
from hubforge.stages._models import Merge, from_base
from hubforge.stages.slerp import angle, products, shares
from hubforge.tensors.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


class Nuslerp(Merge):
    """The point of the arc between two models that their weights tell, or of the arc between their task vectors.

    As `slerp`, the angle is taken by atan2 in float64; where there is no arc it goes along the straight line.
    """

    version: ClassVar[int] = 2  # As of `slerp`.
    formula: ClassVar[str] = "(W₀ +) slerp(T₁, T₂, t),  t = w₂ / (w₁ + w₂),  Tᵢ = Wᵢ (− W₀)"
    source: ClassVar[str] = "Shoemake 1985, doi:10.1145/325334.325242; mergekit 0.1.5, merge_methods/nuslerp.py"

    base_model: ModelRef | None = Field(
        None, description="What task vectors start from; by default zero, and config and tokenizer are the first's."
    )
    models: list[ModelRef] = Field(min_length=2, max_length=2, description="The two models.")
    weights: list[Schedule] | None = Field(None, description="One factor per model, not divided; by default equal.")
    along: Literal["tensor", "rows", "columns"] = Field(
        "tensor",
        description="What has an angle of its own: a tensor (mergekit's nuslerp_flatten), a row, or a column "
        "(nuslerp_row_wise, whose name says the reverse).",
    )

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        return from_base(self.base_model, self.models)

    def measures(self) -> int:
        return 0 if self.along == "rows" else 1

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, Any]:
        if len(ends := self.ends(w)) < 2:
            return {}
        one, two = ends
        if self.dimension(one) is None:
            return products(one, two)
        return {name: sums.cpu() for name, sums in products_along(one, two, 0).items()}

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        ends = self.ends(w)
        if len(ends) < 2:  # `missing: base`
            return w[next(model for model in self.models if model in w)]
        one, two = ends
        t, dim = self.share(at), self.dimension(one)
        if dim is None:
            kept, taken = shares(angle(**(at.totals or products(one, two))), t)
            merged = (one * kept).add_(two, alpha=taken)
        else:
            merged = slerp_along(one, two, t, at.totals or products_along(one, two, dim))
        return merged if self.base_model is None else merged.add_(w[self.base_model])

    def ends(self, w: Mapping[str, Tensor]) -> list[Tensor]:
        """T₁ and T₂, as far as there are such tensors."""
        held = [w[model] for model in self.models if model in w]
        return held if self.base_model is None else [tensor - w[self.base_model] for tensor in held]

    def dimension(self, end: Tensor) -> int | None:
        """The dimension along which angles are taken; None for the whole tensor, as for every vector."""
        if self.along == "tensor" or end.dim() < 2:
            return None
        return -1 if self.along == "rows" else 0

    def share(self, at: Place) -> float:
        """t of this tensor."""
        one, two = (self.of_model(self.weights, index, at) for index in range(2))
        if one + two == 0:
            raise StepError(f"the weights for {at.name} sum to 0", mend="Give weights whose sum is not 0.")
        return two / (one + two)


def products_along(a: Tensor, b: Tensor, dim: int) -> dict[str, Tensor]:
    """`slerp.products` of each of the vectors that lie along a dimension, which becomes of length 1; float64."""
    x = a.double()
    d = b.double().sub_(x)
    return {name: (u * v).sum(dim, keepdim=True) for name, u, v in (("aa", x, x), ("ad", x, d), ("dd", d, d))}


def slerp_along(a: Tensor, b: Tensor, t: float, known: Mapping[str, Tensor]) -> Tensor:
    """Slerp of vectors for each of which `products_along` is known; angles in float64."""
    import torch

    aa, ad, dd = (known[name].to(a.device) for name in ("aa", "ad", "dd"))
    theta = torch.atan2((aa * dd - ad * ad).clamp(min=0).sqrt(), aa + ad)
    sine = theta.sin()
    straight = ~(sine > 1e-6)
    sine = sine.masked_fill(straight, 1.0)
    kept = torch.where(straight, 1 - t, ((1 - t) * theta).sin() / sine)
    taken = torch.where(straight, t, (t * theta).sin() / sine)
    return (a * kept.float()).add_(b * taken.float())
