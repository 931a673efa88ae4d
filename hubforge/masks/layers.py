"""How much each whole layer matters: a mask with one number per decoder layer."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from hubforge.errors import StepError
from hubforge.masks._files import write_json
from hubforge.masks._gates import GATE, LAYERS, facts_of, holds
from hubforge.op import Context, Kind, MaskRef, Metrics, Op
from hubforge.tensors.gate import Normalize, normalized
from hubforge.tensors.names import layer_of
from hubforge.tensors.reader import open_checkpoint


class Layers(Op):
    """The importance of each decoder layer, from 0 for the least to 1 for the most, from the sums or means of a mask.

    A small file: one number per layer, and which tensors they are for. `combine` makes a gate of it, with other masks
    or alone. Under minmax the most important layer is not changed at all, the least important in full.
    """

    makes: ClassVar[Kind] = "mask"
    form: ClassVar[str] = "layers"
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "masks"
    formula: ClassVar[str] = "F_layer = normalize over layers of Σ F (or of its mean)"
    source: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv:1612.00796, for the Fisher; by layer as in published masks"

    mask: MaskRef = Field(description="A Fisher mask, or a gate.")
    of: Literal["sum", "mean"] = Field(
        "sum",
        description="What of a layer's values counts: their sum, under which wide layers matter more, or their mean.",
    )
    normalize: Normalize = Field(
        "minmax", description="How the layers' numbers become importance in [0, 1]: minmax, log, rank, sqrt or clip:P."
    )

    @field_validator("normalize")
    @classmethod
    def _some(cls, how: str) -> str:
        if how == "none":
            raise ValueError("sums are not in [0, 1]: choose minmax, log, rank, sqrt or clip:P")
        return how

    def misfit(self, field: str, form: str) -> str:
        return "" if form in ("fisher", "gate") else "It sums up a Fisher mask, or a gate."

    def run(self, ctx: Context) -> Metrics:
        import torch

        facts, path = facts_of(ctx, self.mask), ctx.path(self.mask)
        if not facts:
            raise StepError(f"no tensor of {self.mask} lies in a decoder layer", where=ctx.where)
        ordered = sorted(facts)
        values = torch.tensor([facts[layer][self.of] for layer in ordered], dtype=torch.float32)
        for layer, value in zip(ordered, values.tolist(), strict=True):
            if not 0 <= value < math.inf:
                what = f"the {self.of} of layer {layer} of {self.mask} is {value:.3g}"
                mend = "Importance is finite and not negative: make or fetch the mask again."
                raise StepError(what, where=ctx.where, mend=mend)
        least = values[values > 0].min() if self.normalize == "log" and bool((values > 0).any()) else values.min()
        gate = holds(path, GATE) and not holds(path, "fisher")
        if not gate and (empty := [layer for layer in ordered if not facts[layer]["sum"]]):
            what = f"layer {empty[0]} of {self.mask} is zero throughout"
            raise StepError(what, where=ctx.where, mend="Nothing of it would be spared: make or fetch the mask again.")
        made = normalized(values, self.normalize, {"min": float(least), "max": float(values.max())}).tolist()
        with open_checkpoint(path, GATE if gate else "fisher") as mask:
            tensors = {
                name: list(info.shape) for name, info in mask.tensors.items() if layer_of(name) in facts
            }  # of no other tensor is there anything to say
        layers = [
            {"layer": layer, self.of: facts[layer][self.of], "importance": importance}
            for layer, importance in zip(ordered, made, strict=True)
        ]
        content = {str(entry["layer"]): {k: v for k, v in entry.items() if k != "layer"} for entry in layers}
        write_json(
            ctx.out / LAYERS, {"of": self.of, "normalize": self.normalize, "layers": content, "tensors": tensors}
        )
        return {"layers": layers, "tensors": len(tensors)}
