"""Diagonal Fisher information of a model on a set of texts."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from hubforge.errors import StepError
from hubforge.masks import _targets
from hubforge.masks._files import States, size, write_json, write_tensors
from hubforge.models import load_model, load_tokenizer, read_config, rows, texts
from hubforge.op import Context, DatasetRef, Kind, Metrics, ModelRef, Op
from hubforge.rows import some
from hubforge.tensors.names import Aliases, layer_of
from hubforge.tensors.reader import open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hubforge.masks._diagonal import Diagonal, Example

SAVE_EVERY = 60.0  # seconds between saved states, or more, so that
SAVE_SHARE = 0.05  # saving takes no more than this share of the time
_TOWER = re.compile(r"(?:^|\.)(?:vision|audio|image|embed_vision|embed_audio|multi_modal)(?:_|\.)")


class Fisher(Op):
    """How much each weight matters to the model on the given texts: the mean over them of its squared gradient.

    Taken per example, one at a time, so it is the diagonal of the (empirical) Fisher information and not the square of
    a batch's mean gradient. Accumulated in float32 and stored as bfloat16; in float16 much of it would be zero.
    """

    makes: ClassVar[Kind] = "mask"
    pins: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    exact: ClassVar[bool] = False  # Sums of float32 depend on the device and its number of threads.
    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers", "safetensors")
    extra: ClassVar[str] = "masks"
    resumable: ClassVar[bool] = True
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
        "predictions (the Fisher information proper); or those of the model's own greedy reply to the prompt.",
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest reply, in tokens; for `labels: response` only.")
    reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="Loss of a sample: the mean over its tokens, under which long samples count less, or their sum, "
        "the log-likelihood of the sample.",
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

    def preflight(self, ctx: Context) -> None:
        """The model's config, and the first row, where they are there already."""
        if self.model in ctx.inputs:
            read_config(ctx.path(self.model))
        if self.data in ctx.inputs:
            self._rows(ctx, limit=1)

    def run(self, ctx: Context) -> Metrics:
        from hubforge.masks._diagonal import Diagonal

        folder = ctx.path(self.model)
        with open_checkpoint(folder) as checkpoint:
            infos = dict(checkpoint.tensors)
        shapes = {name: info.shape for name, info in infos.items()}
        targets = _targets.select(shapes, read_config(folder), self.targets, ctx.where)
        if towers := [name for name in targets.names if _TOWER.search(name)]:
            what = f"targets match {some(towers)}, and no gradient of a text reaches a tower"
            raise StepError(what, where=ctx.where, mend="Narrow `targets`, for example with `language_model`.")
        drawn = self._draw(ctx)
        dtype = self._dtype({info.dtype for info in infos.values()})
        device = self._plan(ctx, dtype, {name: math.prod(shape) for name, shape in shapes.items()}, targets)
        model = load_model(folder, device=ctx.device, dtype=dtype)
        parameters = _parameters(model, targets.names, shapes, ctx)
        diagonal = Diagonal(model, parameters, device, self.seed)
        tally, seconds = self._accumulate(ctx, model, drawn.examples, diagonal)
        layers = _write(ctx, diagonal, targets.left_out, self._described())
        return {
            "samples": diagonal.examples,
            "truncated": drawn.truncated,
            "skipped": drawn.skipped,
            "tokens": tally["tokens"],
            "loss": tally["loss"] / diagonal.examples,
            "reliability": diagonal.reliability(),
            "parameters": sum(weight.numel() for weight in parameters.values()),
            "tensors": len(parameters),
            "dtype": str(dtype).removeprefix("torch."),
            "seconds_per_sample": seconds,
            "layers": layers,
        }

    def _described(self) -> dict[str, Any]:
        return {"labels": self.labels, "reduction": self.reduction, "estimator": "sequence"}

    def _rows(self, ctx: Context, limit: int | None = None) -> list[dict[str, Any]]:
        data = ctx.artifact(self.data)
        files = [file.path for file in data.files] or None
        return rows(data.path, files=files, limit=limit, columns=[self.column] if self.column else [])

    def _draw(self, ctx: Context) -> _Drawn:
        """The samples, tokenized and cut."""
        from hubforge.masks._diagonal import Example

        tokenizer = load_tokenizer(ctx.path(self.model))
        every = self._rows(ctx)
        if len(every) < self.samples:
            ctx.note(f"{self.data} has {len(every)} rows; all are taken, not {self.samples}")
        # In random order throughout, so that odd and even samples are like halves.
        chosen = random.Random(self.seed).sample(every, min(self.samples, len(every)))
        replying = self.labels == "response"
        encoded = texts(
            chosen, tokenizer, column=self.column, chat_template=self.chat_template, add_generation_prompt=replying
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

    def _plan(self, ctx: Context, dtype: torch.dtype, sizes: Mapping[str, int], targets: _targets.Targets) -> str:
        """The device of the accumulators; says what will be held where, and raises StepError when it cannot be."""
        covered = sum(sizes[name] for name in targets.names)
        weights, sums = sum(sizes.values()) * dtype.itemsize, 4 * covered
        largest = 4 * max(sizes[name] for name in targets.names)
        device = ctx.device if ctx.device.startswith("cuda") else "cpu"  # Apple's GPU has no float64 to sum in.
        if device != "cpu" and weights + sums + 2 * largest > 0.9 * _free(device):
            device = "cpu"
        needed = sums + (weights + 2 * largest if device == ctx.device else 0)
        ctx.note(
            f"Fisher of {len(targets.names)} tensors, {size(covered, '')} weights: {size(weights)} of weights on "
            f"{ctx.device}, {size(sums)} of float32 sums on {device}, {size(2 * covered)} to be written; activations "
            "of one sample come on top"
        )
        free = _free(device)
        if needed > free:
            what = f"{size(needed)} are needed on {device}, and {size(free)} are free"
            raise StepError(what, where=ctx.where, mend="Cover fewer layers with `targets`, or take a larger machine.")
        return device

    def _accumulate(
        self, ctx: Context, model: PreTrainedModel, examples: list[Example], diagonal: Diagonal
    ) -> tuple[dict[str, float], float]:
        """Take in every example, going on from what a killed run saved; what was added up, and seconds per sample."""
        import torch

        states, tally = States(ctx.out / "state"), {"tokens": 0, "loss": 0.0}
        if saved := states.newest():
            facts, tensors = saved
            with tensors:
                if diagonal.restore(tensors, facts["examples"]):
                    tally = facts["tally"]
                    ctx.note(f"resumed after {diagonal.examples} of {len(examples)} samples")
        began = last = time.monotonic()
        first, pause = diagonal.examples, SAVE_EVERY
        with diagonal:
            for number in range(first, len(examples)):
                example = self._with_reply(model, examples[number])
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
                loss = _loss(model, example, self.reduction, generator if self.labels == "sampled" else None, number)
                diagonal.add(loss)
                tally["tokens"] += len(example.ids) - example.start
                tally["loss"] += loss.item()
                if time.monotonic() - last >= pause:
                    diagonal.check()
                    saving = time.monotonic()
                    states.save(diagonal.examples, {"examples": diagonal.examples, "tally": tally}, diagonal.state())
                    last = time.monotonic()
                    pause = max(SAVE_EVERY, (last - saving) / SAVE_SHARE)
                ctx.progress(diagonal.examples, len(examples), "sample", f"loss {loss.item():.3f}")
        diagonal.check()
        seconds = (time.monotonic() - began) / max(len(examples) - first, 1)
        return tally, round(seconds, 4)

    def _with_reply(self, model: PreTrainedModel, example: Example) -> Example:
        from hubforge.masks._diagonal import Example, reply

        if self.labels != "response":
            return example
        return Example([*example.ids, *reply(model, example.ids, self.max_new_tokens)], len(example.ids))


@dataclass(frozen=True)
class _Drawn:
    examples: list[Example]
    truncated: int
    skipped: int


def _loss(
    model: PreTrainedModel, example: Example, reduction: str, generator: torch.Generator | None, number: int
) -> Tensor:
    from hubforge.masks._diagonal import example_loss

    loss = example_loss(model, example, reduction, generator)
    if not math.isfinite(loss.item()):
        raise StepError(
            f"the loss of sample {number + 1} is {loss.item()}",
            mend="The weights are damaged, or too large for their precision; try `dtype: float32`.",
        )
    return loss


def _parameters(
    model: nn.Module, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], ctx: Context
) -> dict[str, nn.Parameter]:
    """The model's parameter for each tensor of the checkpoint; StepError where it has another shape or is not there."""
    known = dict(model.named_parameters())
    aliases = Aliases(known, "the loaded model")
    found = {}
    for name in names:
        own = aliases.find(name)
        if own is None or tuple(known[own].shape) != shapes[name]:
            what = "has no such weight" if own is None else f"has it as {tuple(known[own].shape)}, not {shapes[name]}"
            mend = "It is tied to another, unused, or fused with others on loading; leave it out with `targets`."
            raise StepError(f"{name}: {type(model).__name__} {what}", where=ctx.where, mend=mend)
        found[name] = known[own]
    return found


def _write(ctx: Context, diagonal: Diagonal, left_out: Mapping[str, int], about: Mapping[str, Any]) -> list[Any]:
    """Write fisher.safetensors and layer_importance.json, and drop the saved states; the layers' sums and means."""
    import torch

    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    histogram: dict[int, int] = {}
    total = 0.0
    for name, tensor in diagonal.sums.items():
        values = tensor / diagonal.examples
        amount, layer = float(values.sum(dtype=torch.float64)), layer_of(name)
        total += amount
        if layer is not None:
            sums[layer] = sums.get(layer, 0.0) + amount
            counts[layer] = counts.get(layer, 0) + values.numel()
        decades, many = torch.unique(values[values > 0].log10().floor().int(), return_counts=True)
        for decade, number in zip(decades.tolist(), many.tolist(), strict=True):
            histogram[decade] = histogram.get(decade, 0) + number
    number_of_weights = sum(tensor.numel() for tensor in diagonal.sums.values())
    layers = {
        layer: {"sum": sums[layer], "mean": sums[layer] / counts[layer], "count": counts[layer]}
        for layer in sorted(sums)
    }
    digests = write_tensors(
        ctx.out,
        "fisher",
        {name: ("BF16", tuple(tensor.shape)) for name, tensor in diagonal.sums.items()},
        lambda name: (diagonal.sums[name] / diagonal.examples).to(torch.bfloat16),
    )
    ctx.sha256.update(digests)
    write_json(
        ctx.out / "layer_importance.json",
        {
            "layers": {str(layer): facts for layer, facts in layers.items()},
            "total": {"sum": total, "mean": total / number_of_weights, "count": number_of_weights},
            "samples": diagonal.examples,
            **about,
            # How many weights have a Fisher value in [10^n, 10^(n+1)), by n; the rest is exactly zero.
            "log10_histogram": {str(decade): histogram[decade] for decade in sorted(histogram)},
            "left_out": dict(left_out),
        },
    )
    States(ctx.out / "state").drop()
    return [{"layer": layer, "sum": facts["sum"], "mean": facts["mean"]} for layer, facts in layers.items()]


def _free(device: str) -> float:
    """Bytes that can still be held there; infinity where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return math.inf
