"""Hold a LoRA out of protected subspaces while an optimiser moves its factors, and measure what gets through.

The change of a matrix is s·B·A. What touches U is decided by B alone, what touches V by A alone: so a projection of the
product becomes one of each factor, linear and idempotent, and the same whatever the gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubforge.tensors.projection import Leak, Projection, Subspace, factored_leak

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The factors of one adapted matrix: A (rank, in), B (out, rank), float32, trained in place."""

    a: Tensor
    b: Tensor


class Guard:
    """One projection of all factors. Call `begin` once, then `before_step` and `after_step` around each step."""

    def __init__(
        self,
        factors: Mapping[str, Factors],
        subspaces: Mapping[str, Subspace],
        how: Projection = "two_sided",
        strength: float = 1.0,
        watched: Mapping[str, Subspace] | None = None,
    ) -> None:
        """subspaces: by the same names as the factors; those without one are left alone. watched: only measured."""
        self.how, self.strength = how, strength
        self._held = [_Held(factors[name], subspace, how) for name, subspace in subspaces.items()]
        self._factors, self._watched = factors, subspaces if watched is None else watched
        self._before: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Bring freshly drawn factors into place: A is random, and would touch V. Not after a resume."""
        if self.how == "published":
            return
        for held in self._held:
            for part, basis in held.parts():
                _take_out(part, basis, self.strength)

    def before_step(self) -> None:
        """Project the gradients that the optimiser is about to use; for `scale`, remember where the factors are."""
        if self.how == "scale":
            self._before = [(held.factors.a.detach().clone(), held.factors.b.detach().clone()) for held in self._held]
            return
        for held in self._held:
            for gradient, basis in held.gradients():
                _take_out(gradient, basis)

    def after_step(self) -> None:
        """Project the factors: Adam's per-element steps leave a subspace that holds every gradient.

        For `scale` it is the step that is damped, since Adam undoes a damped gradient.
        """
        if self.how == "published":
            return
        if self.how == "scale":
            for held, (a, b) in zip(self._held, self._before, strict=True):
                self._damp(held, a, b)
            self._before = []
            return
        for held in self._held:
            for part, basis in held.parts():
                _take_out(part, basis)

    def _damp(self, held: _Held, a: Tensor, b: Tensor) -> None:
        factors = held.factors
        for part, before, basis in ((factors.a.detach().T, a.T, held.V), (factors.b.detach(), b, held.U)):
            part.addmm_(basis, basis.T @ (part - before), alpha=-self.strength)

    def leaks(self) -> dict[str, Leak]:
        """The leak of each watched matrix that has changed at all."""
        return leaks(self._factors, self._watched)


def leaks(factors: Mapping[str, Factors], subspaces: Mapping[str, Subspace]) -> dict[str, Leak]:
    """The leak of each matrix that has a subspace and is not zero."""
    found = {name: factored_leak(factors[name].a, factors[name].b, subspace) for name, subspace in subspaces.items()}
    return {name: one for name, one in found.items() if one is not None}


class _Held:
    """A pair of factors with the bases it is to stay clear of, and which of its rank-one parts each basis governs.

    core: PΔQ = Σ (P bᵢ)(aᵢ Q), so it vanishes when each part has one of the two factors cleared. The first half of the
    rank gives up U, the second V: together they reach every Δ without a core, up to their ranks.
    """

    def __init__(self, factors: Factors, subspace: Subspace, how: Projection) -> None:
        self.factors, self.U, self.V = factors, subspace.U, subspace.V
        rank = factors.a.shape[0]
        half = (rank + 1) // 2
        self.columns = {"right": slice(0, 0), "core": slice(0, half)}.get(how, slice(0, rank))  # of B, clear of U
        self.rows = {"left": slice(0, 0), "core": slice(half, rank)}.get(how, slice(0, rank))  # of A, clear of V

    def parts(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Views (n, m) of the factors, each with the basis (n, k) it must be clear of."""
        return self._clear(self.factors.a.detach(), self.factors.b.detach())

    def gradients(self) -> Iterable[tuple[Tensor, Tensor]]:
        a, b = self.factors.a.grad, self.factors.b.grad
        return [] if a is None or b is None else self._clear(a, b)

    def _clear(self, a: Tensor, b: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        sides = [(a[self.rows].T, self.V), (b[:, self.columns], self.U)]
        return [(part, basis) for part, basis in sides if part.numel()]


def _take_out(part: Tensor, basis: Tensor, strength: float = 1.0) -> None:
    """Remove from a view of a factor, in place, its share in the span of the basis."""
    part.addmm_(basis, basis.T @ part, alpha=-strength)
