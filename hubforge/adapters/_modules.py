"""Which linear layers of a model get an adapter: by default the seven of each decoder layer, and never a tower's."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hubforge.errors import StepError
from hubforge.rows import some
from hubforge.tensors.names import is_dead, layer_of, natural_order
from hubforge.tensors.reader import open_checkpoint

# From the start of the name, so that a vision tower's layers, which have the same names inside, are not hit.
LINEARS = (
    r"(?:model\.|language_model\.)*layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o|qkv)_proj|mlp\.(?:gate|up|down|gate_up)_proj)"
)
_TOWER = re.compile(r"(?:^|\.)(?:vision|audio|image|embed_vision|embed_audio|multi_modal)(?:_|\.|$)")
_HEADS = ("lm_head", "embed_out", "embed_tokens", "wte")


def matches(target_modules: str | Sequence[str], name: str) -> bool:
    """Whether PEFT would put an adapter there: a pattern fits the whole name, a listed name its end."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def select(
    shapes: Mapping[str, tuple[int, ...]], target_modules: str | Sequence[str], rank: int, where: str = ""
) -> tuple[str, ...]:
    """The modules to adapt, in natural order; StepError when that is none, a tower's, a head, or one too narrow.

    shapes: weight of each module by its name, () for what is no linear layer.
    """
    hit = sorted((name for name in shapes if matches(target_modules, name)), key=natural_order)
    for target in () if isinstance(target_modules, str) else target_modules:
        if not any(matches([target], name) for name in shapes):
            raise _nothing(f"names {target!r}, which no module of the model is called", target, shapes, where)
    if not hit:
        raise _nothing(f"{target_modules!r} fits no module of the model", "", shapes, where)
    if towers := [name for name in hit if _TOWER.search(name)]:
        what = f"target_modules hits {some(towers)}: a tower, which no text reaches"
        mend = f"A pattern from the start of the name leaves towers out; the default is {LINEARS!r}."
        raise StepError(what, where=where, mend=mend)
    if heads := [name for name in hit if name.rpartition(".")[2] in _HEADS]:
        what = f"target_modules hits {some(heads)}; embeddings and heads cannot be trained as adapters here"
        raise StepError(
            what, where=where, mend="Leave it out: often it is tied to the embeddings and cannot change alone."
        )
    if others := [name for name in hit if len(shapes[name]) != 2]:
        raise StepError(f"target_modules hits {some(others)}, which is no linear layer", where=where)
    for name in hit:
        if rank > min(shapes[name]):
            what = f"rank {rank} is larger than {name}, which is {list(shapes[name])}"
            raise StepError(what, where=where, mend=f"Take a rank of at most {min(min(shapes[n]) for n in hit)}.")
    return tuple(hit)


def _nothing(what: str, target: str, shapes: Mapping[str, Any], where: str) -> StepError:
    leaves = sorted({name.rpartition(".")[2] for name in shapes if len(shapes[name]) == 2 and layer_of(f"{name}.w")})
    close = difflib.get_close_matches(target.rpartition(".")[2], leaves, 1) if target else []
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return StepError(f"target_modules {what}", where=where, mend=f"Its layers have {', '.join(leaves)}.{guess}")


def in_checkpoint(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Modules with a weight, by name, as a checkpoint's headers show them before any model is built.

    config: its config.json. Dead keys and values are left out, as the model that is built has none.
    """
    with open_checkpoint(folder) as checkpoint:
        found = {
            name.removesuffix(".weight"): info.shape
            for name, info in checkpoint.tensors.items()
            if name.endswith(".weight") and not is_dead(name, config)
        }
    # A clipped linear of Gemma's towers wraps the one with the weight; PEFT would meet the wrapper by its name.
    return found | {name.removesuffix(".linear"): () for name in found if name.endswith(".linear")}


def in_model(model: Any) -> dict[str, tuple[int, ...]]:
    """Every module of a model, by name, with the shape of its weight if it is a linear layer, else ()."""
    from torch import nn

    return {
        name: tuple(module.weight.shape) if isinstance(module, nn.Linear) else ()
        for name, module in model.named_modules()
        if name
    }


def rates(facts: Any, modules: Iterable[str], floor: float, where: str = "") -> dict[str, float]:
    """The factor of each module's learning rate: 1 − F_layer, at least `floor`; F_layer as `apply` has it.

    facts: layers.json, of which F_layer is the importance that `op: layers` found; or the layer_importance.json of a
    Fisher mask, of which it is the minmax over the layers of their sums.
    """
    try:
        given = any("importance" in entry for entry in facts["layers"].values())
        what = "importance" if given else "sum"
        sums = {int(layer): float(entry[what]) for layer, entry in facts["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StepError(f"the importance mask has no number for each layer ({error!r})", where=where) from error
    if not sums or not all(math.isfinite(value) for value in sums.values()):
        raise StepError("the importance mask has no finite number for each layer", where=where)
    if not given and max(sums.values()) == 0:
        raise StepError("the importance mask is zero in every layer", where=where, mend="Make it again.")
    low, high = (0.0, 1.0) if given else (min(sums.values()), max(sums.values()))
    if given and not all(0 <= value <= 1 for value in sums.values()):
        raise StepError("the importance mask has a layer's importance outside [0, 1]", where=where)
    found = {}
    for name in modules:
        layer = layer_of(f"{name}.weight")
        if layer not in sums:
            what = f"the importance mask has nothing for layer {layer} ({name})"
            raise StepError(what, where=where, mend="Make a mask of this very model.")
        found[name] = max(floor, 1 - ((sums[layer] - low) / (high - low) if high > low else 0.0))
    return found
