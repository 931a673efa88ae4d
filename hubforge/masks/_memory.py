"""The memory plan: what a Fisher will hold and where, which way of doing it that leaves, and how many go at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hubforge.errors import StepError
from hubforge.masks._files import size
from hubforge.tensors.names import layer_of

Engine = Literal["device", "groups", "host", "disk"]
ENGINES: tuple[Engine, ...] = ("device", "groups", "host", "disk")  # the order they are tried in: fastest first
BATCHES = (8, 4, 2, 1)
# Of what is free this share may be planned with, less that many bytes: for fragments, and for what nobody counts.
_SHARE, _RESERVE = 0.96, 500_000_000
# Bytes kept for the backward pass per token, as a multiple of the widths in and out of the layer's linears. Measured on
# a GPU, with what lives only for a moment: 2.8 at the shapes of Gemma 4 31B, 1.2 at E4B's; saved tensors alone 1.6.
_KEPT = 3.0


@dataclass(frozen=True)
class Room:
    """Bytes that are free. host: None where the device computes in the host's own memory."""

    device: float
    host: float | None
    disk: float


@dataclass(frozen=True)
class Work:
    """What there is to do. Sizes in bytes."""

    weights: int  # of the whole model, as loaded
    sums: Mapping[str, int]  # a float32 sum per covered weight
    itemsize: int  # of one weight or gradient
    layers: Mapping[int, float]  # activations per token, by decoder layer
    head: float  # activations of the head per token: logits, in several copies
    hidden: int  # of one token's hidden state
    length: int  # of the longest example, in tokens
    tokens: int  # of all examples
    examples: int
    cuts: frozenset[int]  # the layers where groups may begin; empty when there can be none
    batches: tuple[int, ...] = BATCHES  # numbers of examples to try at a time
    apart: bool = True  # whether the gradients of a batch's examples can be told apart

    @property
    def largest(self) -> int:
        return max(self.sums.values())


@dataclass(frozen=True)
class Plan:
    """How it is done. groups: [first, last) layers of each, from the top; empty when all layers go together."""

    engine: Engine
    batch: int
    device: float  # bytes needed there, weights included
    host: float
    disk: float
    groups: tuple[tuple[int, int], ...] = ()

    @property
    def where(self) -> Literal["device", "host", "disk"]:
        return "device" if self.engine == "groups" else self.engine

    def fits(self, room: Room) -> bool:
        if room.host is None:
            return self.device + self.host <= usable(room.device) and self.disk <= usable(room.disk)
        pairs = ((self.device, room.device), (self.host, room.host), (self.disk, room.disk))
        return all(needed <= usable(free) for needed, free in pairs)


def usable(free: float) -> float:
    return _SHARE * free - _RESERVE


def work_of(
    shapes: Mapping[str, tuple[int, ...]],
    covered: Iterable[str],
    config: Mapping[str, Any],
    lengths: list[int],
    itemsize: int,
    cuts: Iterable[int],
    batches: tuple[int, ...] = BATCHES,
    *,
    apart: bool = True,
) -> Work:
    """shapes: of the checkpoint's tensors. covered: those with a sum. lengths: of the examples, in tokens."""
    text = config.get("text_config") or config
    active = int(text.get("top_k_experts") or text.get("num_experts_per_tok") or 1)
    layers: dict[int, float] = {}
    for name, shape in shapes.items():
        layer = layer_of(name)
        if layer is not None and len(shape) >= 2:
            widths = sum(shape[-2:]) * (active if len(shape) > 2 else 1)
            layers[layer] = layers.get(layer, 0.0) + _KEPT * itemsize * widths
    chosen = list(covered)
    inside = all(layer_of(name) is not None for name in chosen)
    return Work(
        weights=sum(math.prod(shape) for shape in shapes.values()) * itemsize,
        sums={name: 4 * math.prod(shapes[name]) for name in chosen},
        itemsize=itemsize,
        layers=layers,
        # Logits, soft-capped in three steps, then in float32 twice, and their gradients.
        head=int(text.get("vocab_size") or 0) * (5.0 * itemsize + 12),
        hidden=int(text.get("hidden_size") or 0) * itemsize,
        length=max(lengths),
        tokens=sum(lengths),
        examples=len(lengths),
        cuts=frozenset(cuts) if inside else frozenset(),
        batches=batches if apart else (1,),
        apart=apart,
    )


def choose(work: Work, room: Room, engine: str = "auto", batch: int | None = None, spare: float = 0.0) -> Plan:
    """The first plan that fits; StepError with the numbers of the nearest when none does.

    engine: one of ENGINES, or "auto". batch: how many examples at a time; None for the most that fit.
    spare: bytes to leave on the disk, for what will be written there.
    """
    if engine == "groups" and not work.cuts:
        what = "engine: groups covers weights of decoder layers only, and `targets` names others"
        raise StepError(what, mend="Narrow `targets`, or choose another engine.")
    if batch is not None and batch > 1 and not work.apart:
        what = f"batch_size is {batch}, but not every target is the weight of a linear layer"
        raise StepError(what, mend="Only the gradients of linear layers can be told apart in a batch: batch_size: 1.")
    tried: list[Plan] = []
    for name in ENGINES if engine == "auto" else (engine,):
        if name == "groups" and not work.cuts:
            continue
        for count in work.batches if batch is None else (batch,):
            for plan in _plans(work, name, min(count, work.examples), room):
                plan = replace(plan, disk=plan.disk + spare)
                tried.append(plan)
                if plan.fits(room):
                    return plan
    least = min(tried, key=lambda plan: (plan.device, plan.host))
    host = "" if room.host is None else f" and {size(least.host)} of the host's, where {size(room.host)} are free"
    needed = least.device + (least.host if room.host is None else 0)
    what = f"{size(needed)} of the device's memory are needed ({least.engine}), and {size(room.device)} are free{host}"
    if least.disk > room.disk:
        what += f"; {size(least.disk)} of the disk, where {size(room.disk)} are free"
    mend = "Cover fewer layers with `targets`, shorten `max_length`, or take a larger machine."
    raise StepError(what, mend=mend)


def said(work: Work, room: Room, plan: Plan, device: str) -> str:
    """The plan in words."""
    sums = sum(work.sums.values())
    per_token = sum(work.layers.values()) + work.head
    where = {"device": f"on {device}", "groups": f"on {device}", "host": "in the host's memory", "disk": "in files"}
    how = f"; {len(plan.groups)} groups of layers, one after the other" if plan.groups else ""
    parts = [
        f"Fisher of {len(work.sums)} tensors, {size(sums / 4, '')} weights; engine: {plan.engine}, "
        f"{plan.batch} of {work.examples} samples at a time{how}",
        f"{size(work.weights)} of weights, {size(sums)} of float32 sums {where[plan.engine]}, about "
        f"{size(plan.batch * work.length * per_token)} of activations if all layers' are kept",
        f"at most {size(plan.device)} of {size(room.device)} that are free on {device}",
    ]
    if room.host is not None:
        parts.append(f"{size(plan.host)} of {size(room.host)} in the host's memory")
    parts.append(f"{size(plan.disk)} of {size(room.disk)} on the disk")
    return "; ".join(parts)


def _plans(work: Work, engine: str, batch: int, room: Room) -> Iterable[Plan]:
    sums, tokens = sum(work.sums.values()), batch * work.length
    one = work.itemsize * work.largest / 4  # a gradient
    written = 3 * work.largest  # the mean, and its logarithms, of one weight at a time
    if engine == "groups":
        yield from _grouped(work, batch, room, one, written)
        return
    activations = tokens * (sum(work.layers.values()) + work.head)
    device = work.weights + activations + max(one, written)
    if engine == "device":
        yield Plan("device", batch, device + sums, 0, 0)
    elif engine == "host":
        if room.host is not None:
            yield Plan("host", batch, device + 3 * work.largest, sums + 2 * work.largest, 0)
        else:
            yield Plan("host", batch, device + sums, 0, 0)
    else:
        travel = 3 * work.largest if room.host is not None else 0
        yield Plan("disk", batch, device + travel, travel, sums)


def _grouped(work: Work, batch: int, room: Room, one: float, written: float) -> Iterable[Plan]:
    """As few groups as fit. Each layer's sums and activations count; the head goes one example at a time."""
    tokens, by_layer = batch * work.length, dict.fromkeys(sorted(work.layers), 0.0)
    for name, held in work.sums.items():
        layer = layer_of(name)
        assert layer is not None
        by_layer[layer] += held
    lowest, top = min(layer for layer, held in by_layer.items() if held), max(by_layer) + 1
    starts = sorted({lowest, *(cut for cut in work.cuts if cut > lowest)})
    blocks = list(zip(starts, [*starts[1:], top], strict=True))
    costs = [sum(by_layer[n] + tokens * work.layers.get(n, 0.0) for n in range(*block)) for block in blocks]
    head = work.length * work.head
    budget = usable(room.device) - work.weights - max(one, written)
    if room.host is None:
        budget -= 4 * work.tokens * work.hidden  # Hidden states of a few groups; counted exactly below.
    for count in range(1, len(blocks) + 1):
        groups, worst = _split(blocks, costs, count)
        # On the way: each group's input, and the gradient above and below the group at hand.
        carried = (len(groups) + 2) * work.tokens * work.hidden
        if worst <= budget or count == len(blocks):
            device = work.weights + max(head, worst + max(one, written))
            yield Plan("groups", batch, device, carried, 0, tuple(reversed(groups)))
            return


def _split(blocks: list[tuple[int, int]], costs: list[float], count: int) -> tuple[list[tuple[int, int]], float]:
    """At most `count` runs of blocks, of even cost, and the cost of the dearest."""
    low, high = max(costs), sum(costs)
    for _ in range(40):  # The smallest limit under which that many runs suffice.
        middle = (low + high) / 2
        low, high = (low, middle) if len(_runs(costs, middle)) <= count else (middle, high)
    runs = _runs(costs, high)
    groups = [(blocks[run[0]][0], blocks[run[-1]][1]) for run in runs]
    return groups, max(sum(costs[n] for n in run) for run in runs)


def _runs(costs: list[float], limit: float) -> list[list[int]]:
    runs: list[list[int]] = []
    held = 0.0
    for number, cost in enumerate(costs):
        if not runs or held + cost > limit * (1 + 1e-9):
            runs.append([])
            held = 0.0
        runs[-1].append(number)
        held += cost
    return runs


def free(device: str, folder: Any) -> Room:
    """What is free now; infinite where the system does not tell. folder: on the disk in question."""
    import shutil

    disk = float(shutil.disk_usage(folder).free)
    if not device.startswith("cuda"):
        return Room(_host(), None, disk)
    import torch

    indices = [torch.device(device).index] if ":" in device else range(torch.cuda.device_count())
    # What torch has reserved and does not use is free to us.
    bytes_free = [
        torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        for index in indices
    ]
    return Room(float(sum(bytes_free)), _host(), disk)


def _host() -> float:
    from pathlib import Path

    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return math.inf
