"""The loss of each example of a batch: whose gradient, squared per example, makes the Fisher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Example:
    """The token ids of one example. The loss is over those from `start` on: 1 or more; nothing predicts the first."""

    ids: list[int]
    start: int = 1


@dataclass(frozen=True)
class Batch:
    """Some of the examples, and which: their places in the order they were drawn in."""

    examples: tuple[Example, ...]
    numbers: tuple[int, ...]

    @property
    def length(self) -> int:
        return max(len(example.ids) for example in self.examples)

    def ids(self, device: torch.device | str) -> Tensor:
        """(batch, length), int64, filled up on the right.

        No attention mask goes with it: under causal attention no token sees what comes after it, and what comes after
        an example has no loss. An example's own last token fills it up, so no model takes it for an image.
        """
        import torch

        rows = [[*e.ids, *[e.ids[-1]] * (self.length - len(e.ids))] for e in self.examples]
        return torch.tensor(rows, device=device)


def batches(examples: Sequence[Example], size: int) -> list[Batch]:
    """The examples in batches of like length, longest first; in the order they came when one goes at a time."""
    order = list(range(len(examples)))
    if size > 1:
        order.sort(key=lambda number: -len(examples[number].ids))
    chosen = [order[first : first + size] for first in range(0, len(order), size)]
    return [Batch(tuple(examples[number] for number in some), tuple(some)) for some in chosen]


@dataclass(frozen=True)
class Losses:
    """How the loss of an example is taken.

    sampled: draw each label from what the model predicts there, given the true tokens before it, instead of taking the
    text's own. That makes it the Fisher information proper; with the text's labels it is the empirical Fisher.
    """

    reduction: Literal["mean", "sum"] = "mean"
    sampled: bool = False
    seed: int = 0

    def of(self, model: PreTrainedModel, batch: Batch, device: torch.device | str) -> Tensor:
        """Cross-entropy of each example, (batch,), float32 or better: mean or sum over its tokens."""
        import torch

        logits = model(input_ids=batch.ids(device), use_cache=False).logits
        pairs = zip(batch.examples, batch.numbers, strict=True)
        return torch.stack([self._one(logits[at], example, number) for at, (example, number) in enumerate(pairs)])

    def _one(self, logits: Tensor, example: Example, number: int) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy

        logits = logits[example.start - 1 : len(example.ids) - 1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.sampled:
            # A generator per example, so that neither batches nor a resumed run draw other labels.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            chances = logits.detach().softmax(-1).cpu()
            labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
        else:
            labels = torch.tensor(example.ids[example.start :], device=logits.device)
        return cross_entropy(logits, labels, reduction=self.reduction)


def reply(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, device: torch.device | str) -> list[int]:
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
    ids = torch.tensor([prompt], device=device)
    with torch.no_grad():
        said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    new: list[int] = said[0, len(prompt) :].tolist()
    return new
