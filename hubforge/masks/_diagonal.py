"""The diagonal Fisher of a model: the squared gradient of each example's loss, summed over examples, per weight.

The gradient of a batch's mean loss, squared, is something else altogether: squares must be taken per example. So one
example goes through at a time, and a hook squares each gradient the moment it is there and frees it: beyond weights
and activations there are the accumulators and one parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hubforge.tensors.reader import Checkpoint

PROBES = 1 << 18  # weights at which the halves of the examples are compared


@dataclass(frozen=True)
class Example:
    """The token ids of one example. The loss is over those from `start` on: 1 or more; nothing predicts the first."""

    ids: list[int]
    start: int = 1


def example_loss(
    model: PreTrainedModel, example: Example, reduction: str, generator: torch.Generator | None = None
) -> Tensor:
    """Cross-entropy of one example, in float32 or better: mean or sum over its tokens.

    generator: draw each label from what the model predicts there, given the true tokens before it, instead of taking
    the text's own. That makes it the Fisher information proper; with the text's labels it is the empirical Fisher.
    """
    import torch
    from torch.nn.functional import cross_entropy

    ids = torch.tensor([example.ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, example.start - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = ids[0, example.start :]
    if generator is not None:
        chances = logits.detach().softmax(-1).to(generator.device)
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
    return cross_entropy(logits, labels, reduction=reduction)


def reply(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What the model says to the prompt, greedily: new token ids, the closing one included."""
    import torch
    from transformers import GenerationConfig

    known: Any = model.generation_config
    ends = getattr(known, "eos_token_id", None) or model.config.get_text_config().eos_token_id
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
    )
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    new: list[int] = said[0, len(prompt) :].tolist()
    return new


class Diagonal:
    """Accumulates squared gradients while it is entered; every other weight is frozen, so its gradient is never made.

    parameters: by the names to report them under. device: of the accumulators, `sums` (float32, shaped as the weights).
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], device: str, seed: int = 0) -> None:
        import torch

        model.requires_grad_(False)
        self.examples = 0
        self.parameters = parameters
        self.sums = {
            name: torch.zeros(weight.shape, dtype=torch.float32, device=device) for name, weight in parameters.items()
        }
        self._probes = _probes({name: weight.numel() for name, weight in parameters.items()}, seed, device)
        self.even = {name: torch.zeros(len(at), device=device) for name, at in self._probes.items()}
        self._hooks: list[Any] = []

    def __enter__(self) -> Diagonal:
        for name, weight in self.parameters.items():
            weight.requires_grad_(True)
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._hook(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str) -> Any:
        sums, probes, even = self.sums[name], self._probes[name], self.even[name]

        def square(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.to(sums.device, sums.dtype)
            weight.grad = None
            sums.addcmul_(gradient, gradient)
            if self.examples % 2 == 0:
                some = gradient.view(-1)[probes]
                even.addcmul_(some, some)

        return square

    def add(self, loss: Tensor) -> None:
        """Take in one example."""
        if loss.requires_grad:  # If not, the loss depends on none of them, and `check` will say so.
            loss.backward()
        self.examples += 1

    def state(self) -> dict[str, Tensor]:
        """Everything accumulated, to go on from."""
        return self.sums | {f"{name}.even": half for name, half in self.even.items()}

    def restore(self, saved: Checkpoint, examples: int) -> bool:
        """Go on from a saved state; False, changing nothing, when it is not one of these parameters."""
        mine = self.state()
        if {name: tuple(t.shape) for name, t in mine.items()} != {n: saved.info(n).shape for n in saved}:
            return False
        for name, tensor in mine.items():
            tensor.copy_(saved.read(name))
        self.examples = examples
        return True

    def check(self) -> None:
        """StepError naming a tensor whose Fisher is not finite, or zero throughout."""
        for name, sums in self.sums.items():
            total = float(sums.sum())
            if total != total or total == float("inf"):
                mend = "The gradients overflowed or the weights are damaged; try `dtype: float32`."
                raise StepError(f"the Fisher of {name} is not finite after {self.examples} samples", mend=mend)
            if total == 0:
                mend = "No output of the model depends on it, or its gradients underflow; leave it out with `targets`."
                raise StepError(f"the Fisher of {name} is zero after {self.examples} samples", mend=mend)

    def reliability(self) -> float | None:
        """Spearman correlation, over up to 2^18 weights, of the Fisher of every other example with that of the rest.

        None for fewer than two examples. By Spearman and Brown the Fisher of all of them reproduces a little better
        than that: 2 r / (1 + r).
        """
        import torch

        if self.examples < 2:
            return None
        even = torch.cat([half.cpu() for half in self.even.values()])
        whole = torch.cat([self.sums[name].view(-1)[at].cpu() for name, at in self._probes.items()])
        evens = (self.examples + 1) // 2
        # Between tensors of very different size the halves must be means, not sums: odd numbers of examples differ.
        return spearman(even / evens, (whole - even) / (self.examples - evens))


def _probes(sizes: Mapping[str, int], seed: int, device: str) -> dict[str, Tensor]:
    """Flat positions in each tensor, in proportion to its size, at least one each; all of them if they are few."""
    import torch

    total = sum(sizes.values())
    if total <= PROBES:
        return {name: torch.arange(size, device=device) for name, size in sizes.items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(size, (max(1, PROBES * size // total),), generator=generator).to(device)
        for name, size in sizes.items()
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share the mean of their ranks."""
    import torch

    def ranks(values: Tensor) -> Tensor:
        _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
        middle = count.cumsum(0) - (count - 1) / 2
        return middle.double()[place] - (len(values) + 1) / 2

    first, second = ranks(a), ranks(b)
    return float((first @ second) / (first.norm() * second.norm()).clamp(min=1e-300))
