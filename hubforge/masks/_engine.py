"""Takes every example through the model and hands over each weight's sum of squares: by one pass, or layer group by
layer group. What is added up is saved now and then, so that a killed run goes on.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError
from hubforge.masks._accumulators import Accumulators
from hubforge.masks._files import States
from hubforge.masks._halves import Halves
from hubforge.masks._layers import Layers
from hubforge.masks._losses import Batch, Example, Losses, batches
from hubforge.masks._squares import Estimator, Squares, linears_of
from hubforge.tensors.names import layer_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hubforge.masks._memory import Plan

SAVE_EVERY = 60.0  # seconds between saved states, or more, so that
SAVE_SHARE = 0.05  # saving takes no more than this share of the time

Finish = Callable[[str, "Tensor", "Tensor", "Tensor"], None]
Parts = dict[int, "Tensor"]  # hidden states, or their gradients, by number of example: (tokens, hidden_size)
Say = Callable[[int, int, str], None]


@dataclass
class Run:
    """One Fisher, from the first example to the last.

    weights: by the model's own names; every other weight is frozen. device: of the ids, and of weights that accelerate
    keeps elsewhere. progress(done, total, what).
    """

    model: PreTrainedModel
    weights: Mapping[str, nn.Parameter]
    plan: Plan
    examples: Sequence[Example]
    losses: Losses
    device: torch.device | str = "cpu"
    estimator: Estimator = "sequence"
    folder: Path | None = None  # for accumulators on disk, and for states; None saves none
    progress: Say = lambda done, total, what: None
    note: Callable[[str], None] = lambda text: None
    loss: float = field(default=0.0, init=False)  # summed over the examples

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self._halves = Halves(
            {name: math.prod(weight.shape) for name, weight in self.weights.items()}, self.losses.seed
        )
        self._batches = batches(self.examples, self.plan.batch)
        self._linears = linears_of(self.model, self.weights)
        offloaded = any(weight.is_meta for weight in self.weights.values())
        if self.plan.batch == 1 and self.estimator == "sequence" and not offloaded:
            self._linears = None
        elif self._linears is None:
            what = "not every target is the weight of a linear layer"
            if self.estimator == "token":
                what = f"estimator: token, but {what}"
            raise StepError(what, mend="Narrow `targets`, or use estimator: sequence with batch_size: 1.")
        self._states = States(self.folder / "state") if self.folder is not None else None
        held = 4 * sum(math.prod(weight.shape) for weight in self.weights.values()) / max(len(self.plan.groups), 1)
        # Until a state has been saved, a disk is taken to write a gigabyte in a second.
        self._last, self._pause = time.monotonic(), max(SAVE_EVERY, held / 1e9 / SAVE_SHARE)

    def run(self, finish: Finish, finished: Collection[str] = ()) -> None:
        """Take in every example, and call `finish(name, sums, even, whole)` for each weight when its sum is complete.

        sums: float32, where they were accumulated. even, whole: the sums over every other example and over all, at
        the positions of `Halves`. finished: what a killed run has handed over already.
        """
        self._finish, self._finished = finish, finished
        if self.plan.groups:
            self._by_groups()
        else:
            self._at_once()

    def _at_once(self) -> None:
        sums = self._accumulators(self.weights)
        saved = self._restore(sums, 0)
        done = saved["batches"] if saved else 0
        if saved:
            self.loss = saved["loss"]
            self._say_resumed(done)
        with Squares(self.weights, self._linears, sums, self._halves, self.estimator) as squares:
            for number in range(done, len(self._batches)):
                batch = self._batches[number]
                squares.expect(batch)
                losses = self.losses.of(self.model, batch, self.device)
                if losses.requires_grad:  # If not, the loss depends on none of them, and that will be said.
                    losses.sum().backward()
                self._add_loss(losses, batch)
                if number == done:
                    self._check_reached(squares)
                self._save(sums, {"group": 0, "batches": number + 1})
                self.progress(self._taken(number + 1), len(self.examples), f"loss {losses.detach().mean():.3f}")
        self._hand_over(sums)

    def _by_groups(self) -> None:
        layers, groups = Layers(self.model), self.plan.groups
        saved = self._peek()
        group, total = (saved["group"] if saved else 0), len(self.examples) * (len(groups) + 1)
        inputs, above = self._go_up(layers, [first for first, _ in groups[group:]], heads=saved is None, total=total)
        for number in range(group, len(groups)):
            first, last = groups[number]
            mine = {name: w for name, w in self.weights.items() if first <= (layer_of(name) or 0) < last}
            sums, done = self._accumulators(mine), 0
            below: Parts = {}
            if saved and (facts := self._restore(sums, number, above, below)):
                done, self.loss = facts["batches"], facts["loss"]
                self._say_resumed(done, number)
            saved = None
            lowest = number == len(groups) - 1
            linears = {name: self._linears[name] for name in mine} if self._linears is not None else None
            with Squares(mine, linears, sums, self._halves, self.estimator) as squares:
                for at in range(done, len(self._batches)):
                    batch = self._batches[at]
                    squares.expect(batch)
                    hidden = self._stack(inputs[first], batch)
                    if not lowest:
                        hidden.requires_grad_(True)
                    output = layers.run(batch.ids(self.device), first, last, hidden)
                    if output.requires_grad:
                        output.backward(self._stack(above, batch).to(output.device))
                    if not lowest:
                        self._unstack(below, hidden.grad, batch)
                    if at == done:
                        self._check_reached(squares)
                    self._save(sums, {"group": number, "batches": at + 1}, above, below)
                    seen = (number + 1) * len(self.examples) + self._taken(at + 1)
                    self.progress(seen, total, f"layers {first} to {last - 1}")
            self._hand_over(sums)
            above = below
            del inputs[first]

    def _go_up(self, layers: Layers, wanted: list[int], *, heads: bool, total: int) -> tuple[dict[int, Parts], Parts]:
        """What goes into each layer in `wanted`, per example; and the loss's gradient where the last layer ends."""
        import torch

        inputs: dict[int, Parts] = {first: {} for first in wanted}
        above: Parts = {}
        for at, batch in enumerate(self._batches):

            def keep(number: int, hidden: Tensor, batch: Batch = batch) -> None:
                if number in inputs:
                    self._unstack(inputs[number], hidden, batch)

            with torch.no_grad():
                # Without heads only the inputs are wanted, the highest of which is the last to be seen.
                last = len(layers) if heads else max(wanted) + 1
                hidden = layers.run(batch.ids(self.device), 0, last, see=keep)
            if heads:
                for row, (example, number) in enumerate(zip(batch.examples, batch.numbers, strict=True)):
                    # One at a time: the logits of a large vocabulary outweigh everything else.
                    end = hidden[row : row + 1, : len(example.ids)].detach().requires_grad_(True)
                    one = Batch((example,), (number,))
                    loss = self.losses.of(layers.head(end), one, self.device)
                    loss.sum().backward()
                    assert end.grad is not None
                    above[number] = end.grad[0].cpu()
                    self._add_loss(loss, one)
            self.progress(self._taken(at + 1), total, "forward")
        return inputs, above

    def _stack(self, parts: Parts, batch: Batch) -> Tensor:
        """(batch, length, hidden_size) on the device, from one tensor per example, filled up with zeros."""
        from torch.nn.utils.rnn import pad_sequence

        return pad_sequence([parts[number] for number in batch.numbers], batch_first=True).to(self.device)

    def _unstack(self, parts: Parts, stacked: Tensor | None, batch: Batch) -> None:
        assert stacked is not None
        for row, example, number in zip(stacked.detach().cpu(), batch.examples, batch.numbers, strict=True):
            parts[number] = row[: len(example.ids)].clone()

    def _accumulators(self, weights: Mapping[str, nn.Parameter]) -> Accumulators:
        import torch

        default = torch.device(self.device)
        folder = self.folder / "sums" if self.folder is not None else None
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        devices = {name: default if weight.is_meta else weight.device for name, weight in weights.items()}
        return Accumulators(shapes, devices, self.plan.where, folder)

    def _taken(self, done: int) -> int:
        return min(done * self.plan.batch, len(self.examples))

    def _add_loss(self, losses: Tensor, batch: Batch) -> None:
        for loss, number in zip(losses.tolist(), batch.numbers, strict=True):
            if not math.isfinite(loss):
                raise StepError(
                    f"the loss of sample {number + 1} is {loss}",
                    mend="The weights are damaged, or too large for their precision; try `dtype: float32`.",
                )
            self.loss += loss

    def _check_reached(self, squares: Squares) -> None:
        # A mixture of experts may leave some of them out for now; at the end they would be zero, and that is said then.
        if missed := [name for name in squares.unreached() if "expert" not in name]:
            what = f"no gradient reaches {missed[0]}"
            if len(missed) > 1:
                what += f" and {len(missed) - 1} more"
            raise StepError(what, mend="No output of the model depends on it; leave it out with `targets`.")

    def _hand_over(self, sums: Accumulators) -> None:
        sums.settle()
        for name, total in sums.tensors.items():
            check(name, total, len(self.examples))
            whole = self._halves.at(name, total).cpu()
            even = self._halves.even.get(name)
            self._finish(name, total, even.cpu() if even is not None else whole * 0, whole)
            self._halves.forget(name)
        sums.drop()

    # What is saved: the sums at hand, the even halves, and between groups the gradients on both sides.

    @property
    def identity(self) -> str:
        """What a saved state must agree with."""
        names = zlib.crc32("\n".join(self.weights).encode())
        return json.dumps([self.plan.engine, self.plan.batch, self.plan.groups, len(self.examples), names])

    def _save(
        self,
        sums: Accumulators,
        facts: dict[str, Any],
        above: Parts | None = None,
        below: Parts | None = None,
    ) -> None:
        import torch

        if self._states is None or time.monotonic() - self._last < self._pause:
            return
        began = time.monotonic()
        sums.settle()
        for name, total in sums.tensors.items():
            check(name, total, self._taken(facts["batches"]), zero=False)
        tensors = sums.tensors | {f"{name}.even": half for name, half in self._halves.even.items()}
        for key, parts in (("above", above), ("below", below)):
            if parts:
                tensors[f"carried.{key}"] = torch.cat([parts[number] for number in sorted(parts)])
        number = facts["group"] * (len(self._batches) + 1) + facts["batches"]
        self._states.save(number, {**facts, "loss": self.loss, "identity": self.identity}, tensors)
        self._last = time.monotonic()
        self._pause = max(SAVE_EVERY, (self._last - began) / SAVE_SHARE)

    def _peek(self) -> dict[str, Any] | None:
        """The facts of a state that this plan can go on from."""
        found = self._states.newest() if self._states is not None else None
        if found is None:
            return None
        facts, tensors = found
        tensors.close()
        if facts.get("identity") != self.identity:
            self._say_begun_anew(str(facts.get("identity")))
            return None
        for first, last in self.plan.groups[: facts["group"]]:
            if any(first <= (layer_of(name) or 0) < last and name not in self._finished for name in self.weights):
                return None
        return facts

    def _restore(
        self,
        sums: Accumulators,
        group: int,
        above: Parts | None = None,
        below: Parts | None = None,
    ) -> dict[str, Any] | None:
        """Go on from the newest state, if it is of this plan, this group and these weights; its facts."""
        facts, found = self._peek(), self._states.newest() if self._states is not None else None
        if facts is None or found is None or facts["group"] != group:
            return None
        with found[1] as saved:
            shapes = {name: tuple(total.shape) for name, total in sums.tensors.items()}
            if any(name not in saved or saved.info(name).shape != shape for name, shape in shapes.items()):
                return None
            for name, total in sums.tensors.items():
                total.copy_(saved.read(name))
                if f"{name}.even" in saved:
                    self._halves.restore(name, saved.read(f"{name}.even"), self._home(name))
            done = [number for batch in self._batches[: facts["batches"]] for number in batch.numbers]
            for key, parts, numbers in (("above", above, range(len(self.examples))), ("below", below, sorted(done))):
                if parts is not None and f"carried.{key}" in saved:
                    rows = saved.read(f"carried.{key}").split([len(self.examples[n].ids) for n in numbers])
                    for number, row in zip(numbers, rows, strict=True):
                        parts[number] = row
        return facts

    def _home(self, name: str) -> torch.device:
        import torch

        weight = self.weights[name]
        return torch.device(self.device) if weight.is_meta else weight.device

    def _say_begun_anew(self, other: str) -> None:
        """Why what was saved is of no use: with other memory free, `auto` may choose otherwise than it did."""
        try:
            engine, batch, groups, *rest = json.loads(other)
        except ValueError:
            return
        if rest != json.loads(self.identity)[3:]:
            return  # Of other samples or targets: no setting would take it up.
        many = f", {len(groups)} groups" if groups else ""
        self.note(
            f"begun anew: what was saved is of another plan (engine: {engine}, batch_size: {batch}{many}), as free "
            "memory decides; `engine` and `batch_size` keep to one"
        )

    def _say_resumed(self, done: int, group: int = 0) -> None:
        where = f" of group {group + 1} of {len(self.plan.groups)}" if self.plan.groups else ""
        self.note(f"resumed after {self._taken(done)} of {len(self.examples)} samples{where}")


def check(name: str, sums: Tensor, examples: int, *, zero: bool = True) -> None:
    """StepError naming a tensor whose Fisher is not finite, or zero throughout."""
    total = float(sums.sum())
    if not math.isfinite(total):
        mend = "The gradients overflowed or the weights are damaged; try `dtype: float32`."
        raise StepError(f"the Fisher of {name} is not finite after {examples} samples", mend=mend)
    if zero and total == 0:
        mend = "No output of the model depends on it, or its gradients underflow; leave it out with `targets`."
        raise StepError(f"the Fisher of {name} is zero after {examples} samples", mend=mend)
