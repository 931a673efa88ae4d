"""Fold adapters in just as far as they must go for a text to become so much likelier: how to compare them fairly."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.models import load_model, load_tokenizer
from hubforge.op import (
    CHAT_TEMPLATE,
    AdapterRef,
    ChatTemplate,
    Context,
    DatasetRef,
    Kind,
    MaskRef,
    Metrics,
    ModelRef,
    Op,
)
from hubforge.rows import rows, texts
from hubforge.stages.apply import Apply
from hubforge.tensors.engine import run_tensor_op
from hubforge.tensors.projection import Projection
from hubforge.tensors.reader import open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_BATCH = 16  # texts at once
_TRIES = 40


class ApplyToGain(Op):
    """The model with adapters folded in at the scale at which given texts become likelier by `gain`, and no further.

    An adapter under a mask learns less, and so does less harm too: only at an equal gain does what it costs tell
    something of the mask. The gain is measured on the weights as they are stored, rounding and all. Takes the memory of
    the model, and of its changed weights twice more in float32.
    """

    makes: ClassVar[Kind] = "model"
    exact: ClassVar[bool] = False  # The loss depends on the device and its number of threads, and so does the scale.
    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    extra: ClassVar[str] = "merge"
    formula: ClassVar[str] = "W + s · Δ,  the least s for which  loss(W) − loss(W + s · Δ) = gain"

    model: ModelRef = Field(description="The model the adapters are folded into.")
    adapters: list[AdapterRef] = Field(min_length=1, description="Adapters whose deltas are added up.")
    data: DatasetRef = Field(
        description="The texts: rows of prompt and answer (through the chat template, the loss is about the answer), "
        "or of `text`. Not what the adapters were trained on."
    )
    gain: float = Field(gt=0, description="By how much the mean loss per token must fall, in nats.")
    tolerance: float = Field(0.01, gt=0, le=0.5, description="How near to come, as a share of `gain`.")
    max_scale: float = Field(2.0, gt=0, description="The largest scale to try.")
    samples: int = Field(64, ge=1, description="Rows of `data` to measure on: the first so many.")
    max_length: int = Field(512, ge=2, description="Tokens of a row; what is longer is cut.")
    importance: MaskRef | None = Field(None, description="A Fisher mask that damps the change, as in `apply`.")
    protect: MaskRef | None = Field(None, description="A subspace mask to project the change out of, as in `apply`.")
    projection: Projection = Field("two_sided", description="How, as in `apply`.")
    chat_template: ChatTemplate | None = Field(
        None, description=f"{CHAT_TEMPLATE} The gain is measured with the model's own."
    )

    @model_validator(mode="after")
    def _as_apply(self) -> ApplyToGain:
        self._apply(1.0)
        return self

    def _apply(self, scale: float, **more: Any) -> Apply:
        fields = ("model", "adapters", "importance", "protect", "projection")
        given = {name: getattr(self, name) for name in fields if name in self.model_fields_set}
        return Apply(**given, scale=scale, **more)

    def misfit(self, field: str, form: str) -> str:
        if form == "gate" and field == "importance":
            return "Name the Fisher mask that it was made of: gates are for `apply`."
        return self._apply(1.0).misfit(field, form)

    def preflight(self, ctx: Context) -> None:
        self._apply(1.0).preflight(ctx)

    def run(self, ctx: Context) -> Metrics:
        full = ctx.out / "full"
        run_tensor_op(self._apply(1.0, dtype="float32"), replace(ctx, out=full, sha256={}))
        examples = self._examples(ctx)
        scale, before, after = self._search(ctx, full, examples)
        shutil.rmtree(full)
        ctx.note(f"scale {scale:.4f}: the loss falls from {before:.4f} to {after:.4f}")
        return run_tensor_op(self._apply(scale, chat_template=self.chat_template), ctx) | {
            "scale": scale,
            "loss_gain": before - after,
            "loss_before": before,
            "loss_after": after,
            "loss_texts": len(examples),
            "loss_tokens": sum(len(one.ids) - one.start for one in examples),
        }

    def _search(self, ctx: Context, full: Path, examples: Sequence[Example]) -> tuple[float, float, float]:
        """The scale, and the loss before and after."""
        import torch

        # In float32, of weights rounded as they are stored: computing in bfloat16 would add noise of its own.
        model = load_model(ctx.path(self.model), device=ctx.device, dtype=torch.float32)
        changes = _changes(model, ctx.path(self.model), full)
        tried: dict[float, float] = {}

        def loss(scale: float) -> float:
            for change in changes:
                change.set(scale)
            tried[scale] = mean_loss(model, examples)
            ctx.progress(min(len(tried), _TRIES), _TRIES, "tries", f"scale {scale:.3f}, loss {tried[scale]:.4f}")
            return tried[scale]

        before = loss(0.0)
        scale = find_scale(lambda s: before - loss(s), self.gain, self.tolerance, self.max_scale, ctx.where)
        return scale, before, tried[scale]

    def _examples(self, ctx: Context) -> list[Example]:
        data = ctx.artifact(self.data)
        found = rows(data.path, files=[file.path for file in data.files] or None, limit=self.samples)
        tokenizer = load_tokenizer(ctx.path(self.model))
        whole = texts(found, tokenizer)
        asked = [{"prompt": row["prompt"]} if row.get("prompt") else None for row in found]
        prompts = iter(texts([row for row in asked if row], tokenizer, add_generation_prompt=True))
        examples = []
        for ids, row in zip(whole, asked, strict=True):
            prompt = next(prompts) if row else ids[:1]
            # Where prompt and answer share a token, the answer begins after it.
            start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            if max(start, 1) < len(ids[: self.max_length]):
                examples.append(Example(ids[: self.max_length], max(start, 1)))
        if not examples:
            raise StepError(f"{self.data} has no text of two tokens or more", where=ctx.where)
        return sorted(examples, key=lambda one: len(one.ids))


@dataclass(frozen=True)
class Example:
    """Token ids of a text; the loss is about those from `start` on."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class _Change:
    """A weight of the loaded model, what it was, and what is added at scale 1."""

    weight: Tensor
    before: Tensor  # as it is stored
    delta: Tensor  # float32

    def set(self, scale: float) -> None:
        # Rounded to what the checkpoint stores, as the output will be.
        changed = self.before.float() + self.delta * scale
        self.weight.copy_(changed.to(self.before.dtype) if scale else self.before)


def _changes(model: PreTrainedModel, base: Path, full: Path) -> list[_Change]:
    """The weights that differ between two checkpoints of one layout, and the loaded parameter of each."""
    parameters = dict(model.named_parameters())
    found = []
    with open_checkpoint(base) as before, open_checkpoint(full) as after:
        for name in before:
            one, other = before.read(name), after.read(name).float()
            delta = other - one.float()
            if bool(delta.any()):
                if name not in parameters:
                    raise StepError(f"{name} is no parameter of the loaded {type(model).__name__}")
                weight = parameters[name].data
                found.append(_Change(weight, one.to(weight.device), delta.to(weight.device)))
    return found


def mean_loss(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Cross-entropy per token over the answers of all examples, in nats; float32, summed in float64."""
    import torch
    from torch.nn.functional import cross_entropy

    total, count = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(examples), _BATCH):
            part = examples[at : at + _BATCH]
            width = max(len(one.ids) for one in part)
            # Padded on the right, which no real token sees under causal attention.
            ids = torch.zeros(len(part), width, dtype=torch.long)
            labels = torch.full((len(part), width), -100)
            for number, one in enumerate(part):
                ids[number, : len(one.ids)] = torch.tensor(one.ids)
                labels[number, one.start : len(one.ids)] = torch.tensor(one.ids[one.start :])
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float()
            targets = labels[:, 1:].to(logits.device)
            total += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").double())
            count += int((targets != -100).sum())
    return total / count


def find_scale(
    gain_at: Callable[[float], float], gain: float, tolerance: float, max_scale: float, where: str = ""
) -> float:
    """The least scale up to `max_scale` at which the gain is `gain`, within a share `tolerance` of it.

    The gain grows from 0 and falls again when the change goes too far, so the first interval of an upward scan that
    ends beyond it holds it; then regula falsi (Illinois). StepError with the most that was reached if none does.
    """
    steps = [min(max_scale, 1.0) * share for share in (0.25, 0.5, 0.75, 1.0)]
    while steps[-1] < max_scale:
        steps.append(min(max_scale, steps[-1] * 1.25))
    low, at_low, best = 0.0, -gain, (0.0, 0.0)
    for high in steps:
        got = gain_at(high)
        if abs(got - gain) <= tolerance * gain:
            return high
        if got > gain:
            at_high = got - gain
            break
        best = max(best, (got, high))
        low, at_low = high, got - gain
    else:
        what = f"the adapters gain at most {best[0]:.4f} nats per token, at scale {best[1]:.3f}, and {gain} were asked"
        raise StepError(what, where=where, mend=f"Ask for less, train longer, or raise max_scale ({max_scale}).")
    side = 0
    for _ in range(_TRIES):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        off = gain_at(middle) - gain
        if abs(off) <= tolerance * gain:
            return middle
        if off > 0:
            high, at_high = middle, off
            at_low = at_low / 2 if side == 1 else at_low
            side = 1
        else:
            low, at_low = middle, off
            at_high = at_high / 2 if side == -1 else at_high
            side = -1
    what = f"no scale between {low:.5f} and {high:.5f} gives the gain to within {tolerance:g} of it"
    raise StepError(what, where=where, mend="Widen `tolerance`: the rounding of the stored weights may be coarser.")
