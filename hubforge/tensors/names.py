"""Tensor names across checkpoints: which names mean the same tensor, which decoder layer one lies in, their order.

The same text decoder is saved as `model.layers.0...` (text only), `model.language_model.layers.0...` (multimodal) and
`language_model.model.layers.0...` (multimodal, before Transformers 4.52); a LoRA trained on one fits them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from hubforge.errors import SourceError

_WRAPPERS = ("model.", "language_model.")
_LAYER = re.compile(
    r"""(?:(?:transformer|gpt_neox|backbone|bert|roberta|distilbert|electra|deberta)\.)?
    (?:(?:encoder|decoder|transformer)\.)? (?:layers?|h|blocks?) \. (\d+) \.""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"(\d+)")
_KEY_VALUE = re.compile(r"\.self_attn\.[kv]_(?:proj|norm)\.")


def canonical(name: str) -> str:
    """The name without the wrappers `model.` and `language_model.` in front: `layers.0.mlp.up_proj.weight`."""
    stripped = True
    while stripped:
        stripped = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, stripped = name[len(wrapper) :], True
    return name


@lru_cache(1 << 14)
def layer_of(name: str) -> int | None:
    """The layer a tensor lies in; None for embeddings, heads, final norms, and everything in a tower.

    Of a model with encoder and decoder, layers of one number are one.
    """
    found = _LAYER.match(canonical(name))
    return int(found[1]) if found else None


def is_dead(name: str, config: Mapping[str, Any]) -> bool:
    """Whether this is a key or value weight of a layer that shares an earlier layer's keys and values.

    Published checkpoints of Gemma 4 E4B hold such weights, and no model that is loaded from them does. config: its
    config.json.
    """
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    shared, layers, layer = text.get("num_kv_shared_layers"), text.get("num_hidden_layers"), layer_of(name)
    if not isinstance(shared, int) or not isinstance(layers, int) or layer is None:
        return False
    return layer >= layers - shared and bool(_KEY_VALUE.search(name))


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts layer 2 before layer 10, whatever the input's shards were."""
    parts = _NUMBER.split(name)
    return tuple((1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts))


class Aliases:
    """Finds a checkpoint's own name for a tensor that another checkpoint names.

    An exact name wins; else the only one with the same canonical name. Two candidates raise SourceError.
    """

    def __init__(self, names: Iterable[str], where: str) -> None:
        self._exact = frozenset(names)
        self._where = where
        self._by_canonical: dict[str, list[str]] = {}
        for name in self._exact:
            self._by_canonical.setdefault(canonical(name), []).append(name)

    def find(self, name: str) -> str | None:
        if name in self._exact:
            return name
        found = self._by_canonical.get(canonical(name), [])
        if len(found) > 1:
            raise SourceError(f"{name} could be any of {', '.join(sorted(found))}", where=self._where)
        return found[0] if found else None


def paired(names: Iterable[str], other: Aliases) -> Mapping[str, str]:
    """For each name that `other` has too, `other`'s own name for it."""
    return {name: match for name in names if (match := other.find(name)) is not None}
