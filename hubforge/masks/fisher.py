"""Diagonal Fisher information of a model on a set of texts."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from hubforge.errors import StepError
from hubforge.masks import _memory, _targets
from hubforge.masks._files import States, write_json
from hubforge.masks._layers import cuts
from hubforge.models import load_model, load_tokenizer, read_config, rows, texts
from hubforge.op import Context, DatasetRef, Kind, Metrics, ModelRef, Op
from hubforge.rows import content_of, no_template, some
from hubforge.tensors.chat_template import template_of
from hubforge.tensors.names import Aliases
from hubforge.tensors.reader import open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from hubforge.masks._losses import Example
    from hubforge.masks._memory import Plan

REPLIES = "replies.json"  # what the model said, until the mask is there
_TOWER = re.compile(r"(?:^|\.)(?:vision|audio|image|embed_vision|embed_audio|multi_modal)(?:_|\.)")


class Fisher(Op):
    """How much each weight matters to the model on the given texts: the mean over them of its squared gradient.

    Taken per example, so it is the diagonal of the (empirical) Fisher information and not the square of a batch's mean
    gradient. Accumulated in float32 and stored as bfloat16; in float16 much of it would be zero.
    """

    makes: ClassVar[Kind] = "mask"
    form: ClassVar[str] = "fisher"
    version: ClassVar[int] = 4
    pins: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    exact: ClassVar[bool] = False  # Sums of float32 depend on the device and its number of threads.
    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers", "safetensors")
    extra: ClassVar[str] = "masks"
    resumable: ClassVar[bool] = True
    unkeyed: ClassVar[tuple[str, ...]] = ("batch_size", "engine")  # They change no more than how float32 sums round.
    formula: ClassVar[str] = "F = 1/N · Σₙ (∂Lₙ/∂W)²,  Lₙ = cross-entropy of example n"
    source: ClassVar[str] = (
        "Kirkpatrick et al. 2017, arXiv:1612.00796; empirical against true Fisher: Kunstner et al. 2019, "
        "arXiv:1905.12558"
    )

    model: ModelRef = Field(description="The model whose weights are weighed.")
    data: DatasetRef = Field(description="The texts that should go on working: rows of prompts, conversations or text.")
    column: str | None = Field(
        None,
        description="The column that holds the text or the list of messages; by default the first there is of "
        "messages, conversations, prompt, instruction, text.",
    )
    samples: int = Field(200, ge=1, description="How many rows are taken, drawn at random; all of them if fewer.")
    max_length: int = Field(256, ge=2, description="Tokens per sample; what is longer is cut, counted and reported.")
    chat_template: bool = Field(
        True,
        description="Put prompts and conversations through the tokenizer's chat template. `text` is never changed.",
    )
    labels: Literal["text", "sampled", "response"] = Field(
        "text",
        description="Whose tokens the loss is about: the text's own (empirical Fisher); drawn from the model's "
        "predictions (the Fisher information proper); or those of the model's own greedy reply to the prompt, in the "
        "place of the answer that a row may end with.",
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest reply, in tokens; for `labels: response` only.")
    reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="Loss of a sample: the mean over its tokens, under which long samples count less, or their sum, "
        "the log-likelihood of the sample.",
    )
    estimator: Literal["sequence", "token"] = Field(
        "sequence",
        description="What is squared: the gradient of a whole sample (the Fisher), or that of each token by itself, "
        "summed over tokens: another quantity, smoother with few samples, which leaves out how tokens work together.",
    )
    targets: Annotated[str, AfterValidator(_targets.pattern)] | None = Field(
        None,
        description="Regular expression searched for in the names of the checkpoint's matrices. By default the seven "
        "linears of each decoder layer; never the dead key and value weights of layers that share an earlier layer's.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of weights and gradients: auto takes the checkpoint's (float32 for float16 ones, whose "
        "gradients underflow). Ranks of the Fisher agree to .9999 between bfloat16 and float32.",
    )
    seed: int = Field(0, ge=0, description="Draws the samples and, where they are sampled, the labels.")
    pt: bool = Field(
        False,
        description="Write fisher.pt too, the same tensors as torch.save keeps a dictionary; all are in memory then.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="How many samples go through at a time; their gradients are squared one by one all the same. By "
        "default as many as fit, up to 8, on a GPU, and one on a CPU.",
    )
    engine: Literal["auto", "device", "groups", "host", "disk"] = Field(
        "auto",
        description="Where the float32 sums are: on the device; on the device for one group of layers after the other; "
        "in the host's memory; or in files. auto takes the first of these that fits, and says so.",
    )

    def preflight(self, ctx: Context) -> None:
        """The model's config and tensors, and the first row, where they are there already."""
        if self.model in ctx.inputs:
            self._select(ctx)
        if self.data in ctx.inputs:
            content = content_of(self._rows(ctx, limit=1)[0], self.column, f"{ctx.path(self.data)} row 1")
            through = isinstance(content, list) and self.chat_template
            if through and self.model in ctx.inputs and template_of(ctx.path(self.model)) is None:
                raise no_template(str(ctx.path(self.model)))

    def run(self, ctx: Context) -> Metrics:
        import torch

        from hubforge.masks._engine import Run
        from hubforge.masks._importance import Importance, write_pt
        from hubforge.masks._losses import Losses

        folder = ctx.path(self.model)
        shapes, stored, targets = self._select(ctx)
        ctx.note("left out: " + (some([f"{n} ({count})" for n, count in targets.left_out.items()], 12) or "nothing"))
        drawn = self._draw(ctx)
        dtype = self._dtype(stored)
        plan = self._plan(ctx, dtype, shapes, targets, drawn)
        model = load_model(folder, device=ctx.device, dtype=dtype, spread=_spread(ctx.device, shapes, dtype))
        weights = _weights(model, targets.names, shapes, ctx)
        names = {own: name for name, own in weights.items()}
        examples = self._with_replies(ctx, model, drawn.examples)
        known = dict(model.named_parameters())
        run = Run(
            model,
            {own: known[own] for own in names},
            plan,
            examples,
            Losses(self.reduction, self.labels == "sampled", self.seed),
            device=ctx.device,
            estimator=self.estimator,
            folder=ctx.out,
            progress=lambda done, total, what: ctx.progress(done, total, "sample", what),
            note=ctx.note,
        )
        found = Importance(ctx.out, {name: shapes[name] for name in targets.names}, len(examples), run.identity)
        began = time.monotonic()
        try:
            run.run(lambda own, *sums: found.take(names[own], *sums), {weights[name] for name in found.done})
            ctx.sha256.update(found.complete())
        except torch.OutOfMemoryError as error:
            what = f"{ctx.device} ran out of memory with {plan.batch} samples at a time (engine: {plan.engine})"
            mend = "Set a smaller `batch_size`, or another `engine`; what is done so far is kept."
            raise StepError(what, where=ctx.where, mend=mend) from error
        finally:
            found.close()
        seconds = (time.monotonic() - began) / len(examples)
        layers = found.describe(self._described(), targets.left_out)
        if self.pt:
            write_pt(ctx.out)
        States(ctx.out / "state").drop()
        (ctx.out / REPLIES).unlink(missing_ok=True)
        return {
            "samples": len(examples),
            "truncated": drawn.truncated,
            "skipped": drawn.skipped,
            "tokens": sum(len(example.ids) - example.start for example in examples),
            "loss": run.loss / len(examples),
            "reliability": found.reliability(),
            "parameters": sum(facts["count"] for facts in found.facts.values()),
            "tensors": len(weights),
            "dtype": str(dtype).removeprefix("torch."),
            "engine": plan.engine,
            "batch_size": plan.batch,
            "seconds_per_sample": round(seconds, 4),
            "log10_histogram": found.histogram(),
            "layers": layers,
        }

    def _described(self) -> dict[str, Any]:
        return {"labels": self.labels, "reduction": self.reduction, "estimator": self.estimator}

    def _select(self, ctx: Context) -> tuple[dict[str, tuple[int, ...]], set[str], _targets.Targets]:
        """Shape of every tensor, the dtypes there are, and what is covered."""
        folder = ctx.path(self.model)
        with open_checkpoint(folder) as checkpoint:
            infos = dict(checkpoint.tensors)
        shapes = {name: info.shape for name, info in infos.items()}
        targets = _targets.select(shapes, read_config(folder), self.targets, ctx.where)
        if towers := [name for name in targets.names if _TOWER.search(name)]:
            what = f"targets match {some(towers)}, and no gradient of a text reaches a tower"
            raise StepError(what, where=ctx.where, mend="Narrow `targets`, for example with `language_model`.")
        return shapes, {info.dtype for info in infos.values()}, targets

    def _rows(self, ctx: Context, limit: int | None = None) -> list[dict[str, Any]]:
        data = ctx.artifact(self.data)
        files = [file.path for file in data.files] or None
        return rows(data.path, files=files, limit=limit, columns=[self.column] if self.column else [])

    def _draw(self, ctx: Context) -> _Drawn:
        """The samples, tokenized and cut."""
        from hubforge.masks._losses import Example

        tokenizer = load_tokenizer(ctx.path(self.model))
        every = self._rows(ctx)
        if len(every) < self.samples:
            ctx.note(f"{self.data} has {len(every)} rows; all are taken, not {self.samples}")
        # In random order throughout, so that odd and even samples are like halves.
        chosen = random.Random(self.seed).sample(range(len(every)), min(self.samples, len(every)))
        replying = self.labels == "response"
        encoded = texts(
            [every[number] for number in chosen],
            tokenizer,
            column=self.column,
            chat_template=self.chat_template,
            add_generation_prompt=replying,
            names=[f"{ctx.path(self.data)} row {number + 1}" for number in chosen],
        )
        long = sum(len(ids) > self.max_length for ids in encoded)
        if long:
            longest = max(len(ids) for ids in encoded)
            ctx.warn(
                f"{long} of {len(encoded)} samples are cut to {self.max_length} tokens (the longest has {longest})"
            )
        # A reply answers the end of a prompt; a text is read from its start.
        cut = [ids[-self.max_length :] if replying else ids[: self.max_length] for ids in encoded]
        usable = [Example(ids) for ids in cut if len(ids) >= 2]
        if not usable:
            raise StepError(f"no row of {self.data} has two tokens or more", where=ctx.where)
        if len(usable) < len(cut):
            ctx.warn(f"{len(cut) - len(usable)} of {len(cut)} samples have fewer than two tokens and are left out")
        return _Drawn(usable, long, len(cut) - len(usable))

    def _dtype(self, stored: set[str]) -> torch.dtype:
        import torch

        if self.dtype != "auto":
            return torch.float32 if self.dtype == "float32" else torch.bfloat16
        return torch.bfloat16 if "BF16" in stored else torch.float32

    def _plan(
        self,
        ctx: Context,
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, ...]],
        targets: _targets.Targets,
        drawn: _Drawn,
    ) -> Plan:
        """What will be held where; says so, and raises StepError when nothing fits."""
        config = read_config(ctx.path(self.model))
        more = self.max_new_tokens if self.labels == "response" else 0
        lengths = [len(example.ids) + more for example in drawn.examples]
        stacked = [name for name in targets.names if len(shapes[name]) > 2 or "embed" in name]
        if self.estimator == "token" and stacked:
            what = f"estimator: token, but {some(stacked)} is not the weight of a linear layer"
            raise StepError(what, where=ctx.where, mend="Narrow `targets`, or use estimator: sequence.")
        # A CPU computes one example as fast as several; off the device, several share the way there.
        several = _memory.BATCHES if ctx.device.startswith("cuda") or self.engine == "disk" else (1,)
        work = _memory.work_of(
            shapes, targets.names, config, lengths, dtype.itemsize, cuts(config), several, apart=not stacked
        )
        room = _memory.free(ctx.device, ctx.out)
        written = 2 * sum(work.sums.values()) // 4 * (2 if self.pt else 1)
        try:
            plan = _memory.choose(work, room, self.engine, self.batch_size, written)
        except StepError as error:
            raise StepError(error.what, where=ctx.where, mend=error.mend) from error
        ctx.note(_memory.said(work, room, plan, ctx.device))
        return plan

    def _with_replies(self, ctx: Context, model: PreTrainedModel, examples: list[Example]) -> list[Example]:
        """For labels: response, each prompt with what the model says to it; kept for a run that goes on."""
        from hubforge.masks._losses import Example, reply

        if self.labels != "response":
            return examples
        kept = ctx.out / REPLIES
        said: list[list[int]] = json.loads(kept.read_text()) if kept.is_file() else []
        for number in range(len(said), len(examples)):
            said.append(reply(model, examples[number].ids, self.max_new_tokens, ctx.device))
            ctx.progress(number + 1, len(examples), "reply")
        write_json(kept, said)
        return [Example([*e.ids, *new], len(e.ids)) for e, new in zip(examples, said, strict=True)]


@dataclass(frozen=True)
class _Drawn:
    examples: list[Example]
    truncated: int
    skipped: int


def _spread(device: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bool:
    """Whether the model must be sharded over all GPUs: it does not fit on one, and none was asked for by number."""
    import torch

    if device != "cuda" or torch.cuda.device_count() < 2:
        return False
    weights = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    return bool(weights > 0.7 * torch.cuda.mem_get_info(0)[0])


def _weights(
    model: nn.Module, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], ctx: Context
) -> dict[str, str]:
    """The model's own name for each tensor of the checkpoint; StepError where it has another shape or is not there."""
    known = dict(model.named_parameters())
    aliases = Aliases(known, "the loaded model")
    found = {}
    for name in names:
        own = aliases.find(name)
        if own is None or tuple(known[own].shape) != shapes[name]:
            what = "has no such weight" if own is None else f"has it as {tuple(known[own].shape)}, not {shapes[name]}"
            mend = "It is tied to another, unused, or fused with others on loading; leave it out with `targets`."
            raise StepError(f"{name}: {type(model).__name__} {what}", where=ctx.where, mend=mend)
        found[name] = own
    return found
