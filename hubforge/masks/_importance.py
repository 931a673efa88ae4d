"""What a Fisher mask holds: fisher.safetensors, and layer_importance.json with what it adds up to."""

from __future__ import annotations

import base64
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.masks._files import TensorWriter, settle, write_json
from hubforge.masks._halves import reliability
from hubforge.tensors.layout import lay_out
from hubforge.tensors.names import layer_of

if TYPE_CHECKING:
    from torch import Tensor

_DECADES = 64
_WRITING = 2  # weights on their way to the disk, in bfloat16, while the next are computed


class Importance:
    """Writes the mean of each weight as it is handed over, in bfloat16, and remembers what to say of it.

    shapes: of the weights, by their names in the checkpoint. examples: how many the sums are over.
    plan: how the sums are made, as text: `done` holds the weights a killed run of the same plan left in place.
    """

    def __init__(self, out: Path, shapes: Mapping[str, tuple[int, ...]], examples: int, plan: str) -> None:
        self._out, self._examples = out, examples
        layout = lay_out([(name, "BF16", shape) for name, shape in shapes.items()], stem="fisher")
        self._order = list(shapes)
        self._writer = TensorWriter(out / "writing", layout, plan)
        self._threads = ThreadPoolExecutor(max_workers=_WRITING)
        self._writing: deque[Future[None]] = deque()
        self._on_host = OnHost(max(math.prod(shape) for shape in shapes.values()))
        self.facts: dict[str, dict[str, Any]] = dict(self._writer.done)

    @property
    def done(self) -> frozenset[str]:
        return frozenset(self.facts)

    def take(self, name: str, sums: Tensor, even: Tensor, whole: Tensor) -> None:
        """sums: of one weight, float32. even, whole: of the even and of all examples, where the halves are compared."""
        import torch

        if name in self.facts:
            return
        values = sums / self._examples
        facts = summary(values) | {"even": _text(even), "whole": _text(whole)}
        while len(self._writing) >= _WRITING:  # Checksums take longer than the next weights do on a GPU.
            self._writing.popleft().result()
        mean = self._on_host(values.to(torch.bfloat16))
        self._writing.append(self._threads.submit(self._writer.put, name, mean, facts))
        self.facts[name] = facts

    def complete(self) -> dict[str, str]:
        """Bring the files to their place; their sha256."""
        while self._writing:
            self._writing.popleft().result()
        digests = self._writer.complete()
        settle(self._out / "writing", self._out)
        return digests

    def close(self) -> None:
        self._threads.shutdown()
        self._writer.close()

    def reliability(self) -> float | None:
        import torch

        even, whole = (
            torch.cat([_values(self.facts[name][half]) for name in self._order]) for half in ("even", "whole")
        )
        return reliability(even, whole, self._examples)

    def histogram(self) -> dict[str, int]:
        """How many weights have a Fisher value in [10^n, 10^(n+1)), by n, rising."""
        decades: dict[str, int] = {}
        for facts in self.facts.values():
            for decade, count in facts["decades"].items():
                decades[decade] = decades.get(decade, 0) + count
        return {decade: decades[decade] for decade in sorted(decades, key=int)}

    def describe(self, about: Mapping[str, Any], left_out: Mapping[str, int]) -> list[dict[str, Any]]:
        """Write layer_importance.json; the sum and mean of each layer."""
        layers: dict[int, dict[str, Any]] = {}
        for name in self._order:
            facts = self.facts[name]
            if (number := layer_of(name)) is not None:
                layer = layers.setdefault(number, {"sum": 0.0, "mean": 0.0, "count": 0})
                layer["sum"] += facts["sum"]
                layer["count"] += facts["count"]
                layer["mean"] = layer["sum"] / layer["count"]
        layers = {number: layers[number] for number in sorted(layers)}
        total, count, zeros = (sum(facts[what] for facts in self.facts.values()) for what in ("sum", "count", "zeros"))
        unreached = {name: facts["unreached"] for name, facts in self.facts.items() if facts.get("unreached")}
        write_json(
            self._out / "layer_importance.json",
            {
                "layers": {str(number): facts for number, facts in layers.items()},
                "total": {"sum": total, "mean": total / count, "count": count},
                "samples": self._examples,
                "reliability": self.reliability(),
                **about,
                # How many weights have a Fisher value in [10^n, 10^(n+1)), by n; the rest is exactly zero.
                "log10_histogram": self.histogram(),
                "zeros": zeros,
                **({"experts_without_a_token": unreached} if unreached else {}),
                "left_out": dict(left_out),
            },
        )
        return [{"layer": number, "sum": facts["sum"], "mean": facts["mean"]} for number, facts in layers.items()]


class OnHost:
    """Brings tensors from a GPU through pinned buffers: several times faster than into memory that may be paged out.

    largest: elements of the largest. A tensor stays as it is until so many more have been brought as are written at a
    time.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._buffers: deque[Tensor] = deque()

    def __call__(self, tensor: Tensor) -> Tensor:
        import torch

        if not tensor.is_cuda:
            return tensor
        if not self._buffers:
            sizes = [self._largest] * (_WRITING + 1)
            self._buffers.extend(torch.empty(size, dtype=tensor.dtype, pin_memory=True) for size in sizes)
        self._buffers.rotate()
        return self._buffers[0][: tensor.numel()].view(tensor.shape).copy_(tensor)


def summary(values: Tensor) -> dict[str, Any]:
    """Sum, count, zeros, and how many values there are per power of ten; of stacked experts, how many are all zero."""
    import torch

    flat = values.view(-1)
    total, count = float(flat.sum(dtype=torch.float64)), flat.numel()
    there = int(flat.count_nonzero())
    decades: dict[str, int] = {}
    counted, edge = 0, math.floor(math.log10(float(flat.amax()))) if there else 0
    while counted < there and edge > -_DECADES:
        above = int((flat >= 10.0**edge).count_nonzero())
        if above > counted:
            decades[str(edge)] = above - counted
        counted, edge = above, edge - 1
    facts = {"sum": total, "count": count, "decades": decades, "zeros": count - there}
    if values.dim() > 2:
        facts["unreached"] = int((values.flatten(1).amax(1) == 0).sum())
    return facts


def write_pt(out: Path) -> None:
    """fisher.pt beside fisher.safetensors: a dict of name -> tensor, as torch.save writes it."""
    import torch

    from hubforge.tensors.reader import open_checkpoint

    with open_checkpoint(out, stem="fisher") as written:
        torch.save({name: written.read(name) for name in written}, out / "fisher.pt")


def _text(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _values(text: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
