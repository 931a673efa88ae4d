"""What adapter_config.json says of a LoRA: checked field by field, since it comes from strangers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubforge.errors import SourceError
from hubforge.tensors.reader import read_json

CONFIG = "adapter_config.json"
_MORE_THAN_LORA = (
    *("target_parameters", "lora_bias", "trainable_token_indices", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "monteclora_config", "kasa_config", "arrow_config"),
)
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT takes the first factors out of the base


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that decide what an adapter adds; `raw` holds all of them."""

    rank: int
    alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    raw: Mapping[str, Any]

    @property
    def use_dora(self) -> bool:
        return bool(self.raw.get("use_dora"))

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        return tuple(self.raw.get("modules_to_save") or ())

    @property
    def base_model(self) -> str:
        """The base the adapter says it was trained on; "" when it does not."""
        return str(self.raw.get("base_model_name_or_path") or "")

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank, alpha = self.rank_of(module), float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_adapter_config(path: Path) -> AdapterConfig:
    """The checked adapter_config.json at `path`."""
    raw = read_json(path, limit=10_000_000)

    def bad(what: str, mend: str = "") -> SourceError:
        return SourceError(what, where=str(path), mend=mend)

    def number(name: str, default: Any, kind: type[int] | type[float], value: Any = None) -> Any:
        value = raw.get(name, default) if value is None else value
        fits = type(value) in ((int,) if kind is int else (int, float))
        if not fits or not math.isfinite(value) or (kind is int and not 1 <= value <= 1 << 20):
            raise bad(f"{name} is {value!r}, not a {'positive whole ' if kind is int else ''}number")
        return value

    def flag(name: str) -> bool:
        value = raw.get(name) or False
        if not isinstance(value, bool):
            raise bad(f"{name} is {value!r}, not true or false")
        return value

    def pattern(name: str, kind: type[int] | type[float]) -> dict[str, Any]:
        values = raw.get(name) or {}
        if not isinstance(values, dict):
            raise bad(f"{name} is not a map of module patterns")
        for key, value in values.items():
            number(f"{name}[{key!r}]", None, kind, value)
            try:
                re.compile(key)
            except re.error as error:
                raise bad(f"{name}: {key!r} is not a regular expression ({error})") from error
        return values

    if not isinstance(raw, dict):
        raise bad("is not a JSON object")
    if raw.get("peft_type", "LORA") != "LORA":
        raise bad(f"peft_type is {raw['peft_type']!r}; only LORA adapters can be merged")
    for name in _MORE_THAN_LORA:
        if raw.get(name):
            mend = "It changes the base by more than scaling * B @ A. Merge it with PEFT, or train without it."
            raise bad(f"{name} is {raw[name]!r}, which is not supported", mend)
    start = str(raw.get("init_lora_weights", True)).lower()
    if start.startswith(_MOVES_THE_BASE):
        mend = (
            "Where it was trained, save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain."
        )
        raise bad(f"init_lora_weights is {start!r}: it was trained beside a base from which its start was taken", mend)
    if raw.get("bias", "none") != "none":
        raise bad(f"bias is {raw['bias']!r}, which is not supported", "Train with bias='none'.")
    flag("use_dora")
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise bad(f"modules_to_save is {saved!r}, not a list of names")
    return AdapterConfig(
        rank=number("r", 8, int),
        alpha=number("lora_alpha", 8, float),
        use_rslora=flag("use_rslora"),
        fan_in_fan_out=flag("fan_in_fan_out"),
        rank_pattern=pattern("rank_pattern", int),
        alpha_pattern=pattern("alpha_pattern", float),
        raw=raw,
    )
