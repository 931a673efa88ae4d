"""Hooks that square each example's gradient the moment it arises, add it up, and free it.

Two ways, which give the same sums. *Weights*: a post-accumulate hook on every weight; any weight, one example at a
time. *Linears*: from the input X and the gradient G of each linear's output, the gradient of example b is G_bᵀ X_b; a
batch goes through at once, its squares are taken one by one, and the sum leaves the device once per batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from hubforge.errors import StepError
from hubforge.masks._fused import add_squares

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hubforge.masks._accumulators import Accumulators
    from hubforge.masks._halves import Halves
    from hubforge.masks._losses import Batch

Estimator = Literal["sequence", "token"]


class Squares:
    """While entered, every backward of `batch` adds its examples' squared gradients to `sums`.

    weights: by the names they have in `sums`. linears: None, or the module each weight belongs to.
    Whatever lies below the lowest of them is not differentiated: its weights must be frozen.
    """

    batch: Batch

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        linears: Mapping[str, nn.Linear] | None,
        sums: Accumulators,
        halves: Halves,
        estimator: Estimator = "sequence",
    ) -> None:
        self._weights, self._linears, self._sums, self._halves = weights, linears, sums, halves
        self._take = self._tokens if estimator == "token" else self._sequences
        self._hooks: list[Any] = []
        self.seen: set[str] = set()  # the weights that a gradient has reached
        self._waiting: set[str] = set()  # linears that have gone forward since `expect`

    def __enter__(self) -> Squares:
        for name, weight in self._weights.items():
            if self._linears is None:
                weight.requires_grad_(True)
                self._hooks.append(weight.register_post_accumulate_grad_hook(self._on_weight(name)))
            else:
                self._hooks.append(self._linears[name].register_forward_hook(self._on_linear(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for weight in self._weights.values():
            weight.requires_grad_(False)
            weight.grad = None

    def expect(self, batch: Batch) -> None:
        """The next forward and backward are of these examples."""
        self.batch = batch
        self._waiting.clear()

    def unreached(self) -> list[str]:
        return [name for name in self._weights if name not in self.seen]

    def _on_weight(self, name: str) -> Any:
        def square(weight: Tensor) -> None:
            gradient = weight.grad
            assert gradient is not None
            weight.grad = None
            self.seen.add(name)
            into = self._sums.open(name, gradient.device)
            into.addcmul_(gradient, gradient)
            self._sums.close(name, into)
            self._halves.add(name, gradient, self.batch.numbers[0])

        return square

    def _on_linear(self, name: str) -> Any:
        import torch

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if name in self._waiting:
                what = f"{name} is used more than once in a forward pass, so its gradients cannot be told apart"
                raise StepError(what, mend="Set `batch_size: 1`.")
            self._waiting.add(name)
            x = inputs[0].detach()
            if not output.requires_grad:  # The lowest one: here differentiation ends.
                output.requires_grad_(True)
            output.register_hook(lambda gradient: self._on_output(name, x, gradient))

        return keep_input

    def _on_output(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """x: (batch, length, in_features). gradient: (batch, length, out_features)."""
        count = len(self.batch.examples)
        if x.dim() != 3 or len(x) != count:
            if x.numel() != count * self.batch.length * x.shape[-1]:
                what = f"{name} does not see the examples of a batch one after the other"
                raise StepError(what, mend="Set `batch_size: 1`.")
            x, gradient = (t.reshape(count, -1, t.shape[-1]) for t in (x, gradient))
        self.seen.add(name)
        into = self._sums.open(name, gradient.device)
        self._take(name, x, gradient, into)
        self._sums.close(name, into)

    def _sequences(self, name: str, x: Tensor, gradient: Tensor, into: Tensor) -> None:
        if add_squares(into, gradient, x):
            self._halves.add_batch(name, x, gradient, self.batch.numbers)
            return
        for at, number in enumerate(self.batch.numbers):
            length = min(len(self.batch.examples[at].ids), x.shape[1])
            one = gradient[at, :length].T @ x[at, :length]
            into.addcmul_(one, one)
            self._halves.add(name, one, number)

    def _tokens(self, name: str, x: Tensor, gradient: Tensor, into: Tensor) -> None:
        x, gradient = (t.to(into.dtype).square() for t in (x, gradient))
        into.addmm_(gradient.flatten(0, 1).T, x.flatten(0, 1))
        for at, number in enumerate(self.batch.numbers):
            self._halves.add_tokens(name, x[at], gradient[at], number)


def linears_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear] | None:
    """The linear layer of each weight, by the model's own names for the weights; None when one belongs to no linear."""
    from torch import nn

    found = {}
    for name in names:
        owner, _, part = name.rpartition(".")
        module = model.get_submodule(owner)
        if part != "weight" or type(module) is not nn.Linear:
            return None
        found[name] = module
    return found
