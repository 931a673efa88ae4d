"""Split-half reliability: whether the Fisher of every other example ranks the weights as that of the rest does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROBES = 1 << 18  # weights at which the halves of the examples are compared


class Halves:
    """The squares of the even examples at some positions of each weight, drawn from the seed.

    sizes: elements of every weight that the mask covers, so that the positions do not depend on what is held at once.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        self._total = sum(sizes.values())
        self._order = {name: number for number, name in enumerate(sizes)}
        self._places: dict[str, Tensor] = {}
        self.even: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor, number: int) -> None:
        """Take in the gradient of one weight for one example, if that is an even one."""
        if number % 2 == 0:
            some = gradient.view(-1)[self._place(name, gradient.device)]
            self.even[name].addcmul_(some, some)

    def add_batch(self, name: str, x: Tensor, gradient: Tensor, numbers: Sequence[int]) -> None:
        """The same from inputs (batch, length, in_features) and gradients (batch, length, out_features) of a linear."""
        if even := [at for at, number in enumerate(numbers) if number % 2 == 0]:
            place = self._place(name, gradient.device)
            columns = gradient[even][:, :, place // x.shape[-1]].float()
            some = (columns * x[even][:, :, place % x.shape[-1]]).sum(1)
            self.even[name] += some.square().sum(0)

    def add_tokens(self, name: str, x: Tensor, gradient: Tensor, number: int) -> None:
        """The same from squared inputs (length, in_features) and squared gradients (length, out_features)."""
        if number % 2 == 0:
            place = self._place(name, gradient.device)
            self.even[name] += (gradient[:, place // x.shape[1]] * x[:, place % x.shape[1]]).sum(0)

    def at(self, name: str, values: Tensor) -> Tensor:
        """The values at the positions of a weight."""
        return values.view(-1)[self.place(name).to(values.device)]

    def forget(self, name: str) -> None:
        self._places.pop(name, None)
        self.even.pop(name, None)

    def place(self, name: str) -> Tensor:
        """Flat positions in a weight, in proportion to its size, at least one; all of them if they are few."""
        import torch

        size = self._sizes[name]
        if self._total <= PROBES:
            return torch.arange(size)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._order[name])
        return torch.randint(size, (max(1, PROBES * size // self._total),), generator=generator)

    def restore(self, name: str, even: Tensor, device: torch.device) -> None:
        self._place(name, device)
        self.even[name].copy_(even)

    def _place(self, name: str, device: torch.device) -> Tensor:
        import torch

        if name not in self._places:
            self._places[name] = self.place(name).to(device)
            self.even[name] = torch.zeros(len(self._places[name]), device=device)
        return self._places[name]


def reliability(even: Tensor, whole: Tensor, examples: int) -> float | None:
    """Spearman correlation of the Fisher of every other example with that of the rest; None for fewer than two.

    even, whole: sums over the even examples and over all of them, at the same positions.
    By Spearman and Brown the Fisher of all of them reproduces a little better than that: 2 r / (1 + r).
    """
    if examples < 2:
        return None
    evens = (examples + 1) // 2
    # Between tensors of very different size the halves must be means, not sums: odd numbers of examples differ.
    return spearman(even / evens, (whole - even) / (examples - evens))


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share the mean of their ranks."""
    import torch

    def ranks(values: Tensor) -> Tensor:
        _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
        middle = count.cumsum(0) - (count - 1) / 2
        return middle.double()[place] - (len(values) + 1) / 2

    first, second = ranks(a), ranks(b)
    return float((first @ second) / (first.norm() * second.norm()).clamp(min=1e-300))
