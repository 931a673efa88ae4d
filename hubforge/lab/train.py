"""Training on a CPU, small enough to read: rows of token ids in, a fitted model out, the same from the same seed."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED = -100  # the label that cross-entropy skips
Report = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One training text: its token ids, and from which position on they count as labels."""

    ids: list[int]
    learn_from: int = 1


def pack(documents: Sequence[list[int]], length: int) -> list[Row]:
    """The documents end to end, cut into rows of `length` tokens; the last, short one is dropped."""
    stream = [token for ids in documents for token in ids]
    return [Row(stream[at : at + length]) for at in range(0, len(stream) - length + 1, length)]


def batches(rows: Sequence[Row], tokens: int, random: Random, pool: int = 512) -> list[list[Row]]:
    """Rows in random order, at most `tokens` a batch with their padding.

    Rows of like length go together, but only within a pool: lengths tell kinds of example apart, and a batch of one
    kind alone is a poor sample of all.
    """
    shuffled = random.sample(list(rows), len(rows))
    made: list[list[Row]] = []
    for start in range(0, len(shuffled), pool):
        made.append([])
        for row in sorted(shuffled[start : start + pool], key=lambda row: len(row.ids)):
            if made[-1] and (len(made[-1]) + 1) * len(row.ids) > tokens:
                made.append([])
            made[-1].append(row)
    random.shuffle(made)
    return made


def collate(batch: Sequence[Row], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (rows, longest row), padded on the right.

    There is no attention mask: under causal attention no real token sees the padding to its right.
    """
    import torch

    width = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    for number, row in enumerate(batch):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        labels[number, row.learn_from : len(row.ids)] = torch.tensor(row.ids[row.learn_from :])
    return ids, labels


def loss_of(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token over all labels; logits are made only where there is a label."""
    from torch.nn.functional import cross_entropy

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (rows, width, hidden)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return cross_entropy(model.lm_head(hidden[:, :-1][counted]), targets[counted])


def fit(
    model: nn.Module,
    causal: Any,
    rows: Sequence[Row],
    *,
    what: str,
    seed: int,
    learning_rate: float,
    batch_tokens: int,
    pad: int,
    report: Report | None = None,
) -> dict[str, float | int]:
    """Train the parameters of `model` that require gradients with AdamW, warm-up and cosine decay; the run's facts.

    causal: the LlamaForCausalLM inside `model` (`model` itself, or what PEFT has wrapped).
    """
    import torch

    plan = batches(rows, batch_tokens, Random(seed))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warm_up = max(1, len(plan) // 20)
    model.train()
    begun = spoken = time.monotonic()
    recent: deque[float] = deque(maxlen=50)
    tokens = 0
    for step, batch in enumerate(plan, 1):
        rate = min(step / warm_up, 0.02 + 0.98 * (1 + math.cos(math.pi * step / len(plan))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        ids, labels = collate(batch, pad)
        loss = loss_of(causal, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(row.ids) for row in batch)
        recent.append(loss.item())
        now = time.monotonic()
        if report and (now - spoken > 5 or step == len(plan)):
            spoken = now
            left = (now - begun) / step * (len(plan) - step)
            report(f"{what}: step {step}/{len(plan)}, loss {mean(recent):.3f}, {left:.0f} s left")
    model.eval()
    return {"samples": len(rows), "tokens": tokens, "steps": len(plan), "final_loss": round(mean(recent), 4)}
