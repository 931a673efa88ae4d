"""Which tensors of a checkpoint a mask covers: by default the seven linears of each decoder layer.

Left out by default, and listed in the mask's own JSON: embeddings and heads, norms, vision and audio towers, Gemma's
per-layer-embedding projections, experts (three-dimensional), routers; and, whatever the pattern, the keys and values
of layers that use an earlier layer's (`num_kv_shared_layers`): no gradient reaches them and no output depends on them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubforge.errors import StepError
from hubforge.tensors.names import is_dead, natural_order

LINEARS = (
    r"^(?:model\.|language_model\.)*layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o|qkv)_proj|mlp\.(?:gate|up|down|gate_up)_proj)\.weight$"
)


@dataclass(frozen=True)
class Targets:
    names: tuple[str, ...]  # the checkpoint's own, in natural order
    left_out: dict[str, int]  # matrices not covered: name with `*` for the layer's number -> how many


def pattern(targets: str) -> str:
    """The regular expression, if it is one; ValueError for Pydantic if not."""
    try:
        re.compile(targets)
    except re.error as error:
        raise ValueError(f"{targets!r} is not a regular expression: {error}") from error
    return targets


def select(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], targets: str | None = None, where: str = ""
) -> Targets:
    """The tensors of two or more dimensions whose name holds `targets`, less the dead ones.

    shapes: of every tensor in the checkpoint. config: its config.json. targets: None for the seven linears.
    Raises StepError when nothing is left.
    """
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
    targets = targets or LINEARS
    wanted = re.compile(targets)
    names = [name for name in matrices if wanted.search(name) and not is_dead(name, config)]
    if not names:
        some = ", ".join(grouped(matrices)) or "none"
        raise StepError(f"no matrix of the model matches targets {targets!r}", where=where, mend=f"Matrices: {some}.")
    chosen = set(names)
    return Targets(tuple(sorted(names, key=natural_order)), grouped(name for name in matrices if name not in chosen))


def grouped(names: Iterable[str]) -> dict[str, int]:
    """How many names there are of each form, numbers written `*`, in natural order."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return dict(sorted(counts.items(), key=lambda item: natural_order(item[0])))
