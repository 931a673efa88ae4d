"""What a gate is made of: Fisher masks, brought to [0, 1] tensor by tensor or over the whole mask; gates; layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import SourceError, StepError
from hubforge.op import Context, MaskRef
from hubforge.tensors.gate import Spread, in_unit_interval, needs_all, normalized, require_some
from hubforge.tensors.names import Aliases, layer_of
from hubforge.tensors.reader import Checkpoint, open_checkpoint, read_json

if TYPE_CHECKING:
    from torch import Tensor

GATE = "gate"  # stem of the file of importance in [0, 1]
LAYERS = "layers.json"  # of the mask that `op: layers` makes
BINS = 20  # of the histogram of a gate's values, from 0 to 1


class Part:
    """One mask that a gate is made of, as importance in [0, 1]; one tensor in memory at a time."""

    def __init__(self, ref: str, path: Path, how: str, stack: ExitStack) -> None:
        self.ref, self.how = ref, how
        self.whole: Spread | None = None  # of all tensors, for `scope: global`
        self.by_layer: Mapping[str, float] | None = None
        self._checkpoint: Checkpoint | None = None
        if holds(path, GATE) and not holds(path, "fisher"):
            self.how = "none"  # It is one already.
        elif not path.is_file() and not holds(path, "fisher") and (path / LAYERS).is_file():
            self.by_layer, self.shapes = _read_layers(path / LAYERS)
        if self.by_layer is None:
            self._checkpoint = stack.enter_context(open_checkpoint(path, GATE if self.how == "none" else "fisher"))
            self.shapes = {name: info.shape for name, info in self._checkpoint.tensors.items()}
        self._aliases = Aliases(self.shapes, str(path))

    @property
    def is_fisher(self) -> bool:
        return self.by_layer is None and self.how != "none"

    def own(self, name: str, shape: tuple[int, ...], where: str) -> str:
        """Its own name for a tensor of that shape; StepError when it lacks it, or has it in another."""
        own = self._aliases.find(name)
        if own is None:
            mend = "Make both of one model, with the same `targets`."
            raise StepError(f"{self.ref} has no {name}", where=where, mend=mend)
        if tuple(self.shapes[own]) != tuple(shape):
            what = f"{own} of {self.ref} is {list(self.shapes[own])}, not {list(shape)}"
            raise StepError(what, where=where, mend="Masks of one model can be combined.")
        return own

    def raw(self, own: str) -> Tensor:
        """The values as they are stored."""
        assert self._checkpoint is not None
        return self._checkpoint.read(own)

    def importance(self, own: str) -> Tensor:
        """In [0, 1], float32, of the tensor's shape."""
        import torch

        if self.by_layer is not None:
            layer = layer_of(own)
            if layer is None or str(layer) not in self.by_layer:
                raise StepError(f"{self.ref} has no layer for {own}")
            return torch.full(self.shapes[own], self.by_layer[str(layer)])
        values = self.raw(own)
        if self.how == "none":
            return in_unit_interval(values.float())
        if self.whole is not None:
            return self.whole.normalized(values, self.how)
        spread = Spread()
        spread.add(values, f"{own} of {self.ref}")
        require_some(spread.high, f"{own} of {self.ref}")
        low = spread.least_positive if self.how == "log" else spread.low
        if needs_all(self.how) and spread.exact:
            return spread.normalized(values, self.how)
        return normalized(values.float(), self.how, {"min": low, "max": spread.high})


def holds(path: Path, stem: str) -> bool:
    """Whether a mask's folder has a file of that kind. A file named by itself is what it is called."""
    if path.is_file():
        return path.name.startswith(f"{stem}.")
    return any((path / f"{stem}{suffix}").is_file() for suffix in (".safetensors", ".safetensors.index.json"))


def facts_of(ctx: Context, mask: MaskRef) -> dict[int, dict[str, float]]:
    """Sum, mean and count of a mask's values in each decoder layer: as its JSON has them, else counted now."""
    path = ctx.path(mask)
    folder = path.parent if path.is_file() else path
    stem = GATE if holds(path, GATE) and not holds(path, "fisher") else "fisher"
    described = folder / ("gate.json" if stem == GATE else "layer_importance.json")
    if described.is_file():
        try:
            layers = read_json(described)["layers"]
            return {
                int(layer): {key: float(facts[key]) for key in ("sum", "mean", "count")}
                for layer, facts in layers.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(f"has no sum and mean of each layer ({error!r})", where=str(described)) from error
    import torch

    found: dict[int, dict[str, float]] = {}
    with open_checkpoint(path, stem) as checkpoint:
        for name in checkpoint:
            if (layer := layer_of(name)) is not None:
                facts = found.setdefault(layer, {"sum": 0.0, "count": 0.0})
                facts["sum"] += float(checkpoint.read(name).sum(dtype=torch.float64))
                facts["count"] += checkpoint.info(name).elements
    for facts in found.values():
        facts["mean"] = facts["sum"] / max(facts["count"], 1.0)
    return found


def _read_layers(path: Path) -> tuple[Mapping[str, float], dict[str, tuple[int, ...]]]:
    """Importance by layer, and the shape of each tensor that it is for."""
    content: Any = read_json(path)
    try:
        gates = {str(layer): float(facts["importance"]) for layer, facts in content["layers"].items()}
        shapes = {str(name): tuple(int(size) for size in shape) for name, shape in content["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"is not what `op: layers` writes ({error!r})", where=str(path)) from error
    if not all(0 <= value <= 1 for value in gates.values()):
        raise SourceError("holds importance outside [0, 1]", where=str(path))
    return gates, shapes
