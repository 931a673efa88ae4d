"""The fields of one stage, from one application of a method in a mergekit configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from hubforge.errors import RecipeError

Data = dict[str, Any]

_OPS = {"ties": "ties_models"}  # the others have mergekit's names
_SUM = {"weight": "weights", "density": "density"}
# Of each method: what is given per model, and for all, by mergekit's name and ours.
PER_MODEL: dict[str, dict[str, str]] = {
    "linear": {"weight": "weights"},
    "nuslerp": {"weight": "weights"},
    "multislerp": {"weight": "weights"},
    **dict.fromkeys(("task_arithmetic", "ties", "dare_linear", "dare_ties"), _SUM),
    **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), _SUM | {"gamma": "gamma"}),
    **dict.fromkeys(("della", "della_linear"), _SUM | {"epsilon": "epsilon"}),
    "passthrough": {"scale": "scale"},
}
_TASK_VECTORS = tuple(method for method, names in PER_MODEL.items() if "density" in names)
SHARED: dict[str, dict[str, str]] = {
    "linear": {"normalize": "normalize"},
    "slerp": {"t": "t"},
    "nuslerp": {"nuslerp_flatten": "", "nuslerp_row_wise": ""},
    "multislerp": {"normalize_weights": "normalize_weights", "eps": ""},
    "karcher": {"max_iter": "max_iter", "tol": "tol"},
    "model_stock": {"filter_wise": "filter_wise"},
    "sce": {"select_topk": "select_topk"},
    "nearswap": {"t": "t"},
    "arcee_fusion": {},
    "ram": {"epsilon": "epsilon"},
    "ramplus_tl": {"r": "r", "alpha": "alpha", "epsilon": "epsilon"},
    "passthrough": {},
    **{method: {"normalize": "normalize", "rescale": "rescale", "lambda": "scale"} for method in _TASK_VECTORS},
}
_NO_BASE = ("linear", "karcher", "passthrough")  # their base_model is one more model, and where the config comes from
_DEFAULTS = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15, "scale": 1.0, "lambda": 1.0}  # t and weight have none
_TRUTH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@dataclass
class Losses:
    """What a recipe does not carry over, a sentence each."""

    told: list[str] = field(default_factory=list)

    def tell(self, what: str) -> None:
        if what not in self.told:
            self.told.append(what)

    def tell_scale(self, scale: Any) -> None:
        """mergekit scales what stands outside the layers too."""
        default = scale.get("default") if isinstance(scale, Mapping) else scale
        if default != 1:
            self.tell("scale: the embeddings, the last norm and the head are not scaled, only layers are")


class Into(Protocol):
    """The file that is being turned."""

    losses: Losses

    def model(self, written: Any) -> str: ...
    def refuse(self, what: str, mend: str = "") -> RecipeError: ...


@dataclass
class Merge:
    """One application of a method: where its parameters are looked up, from the innermost scope outwards."""

    into: Into
    method: str
    base: Any
    scopes: list[Data]
    dtype: Data = field(default_factory=dict)
    tokenizer: Data = field(default_factory=dict)
    has_gradient: bool = False
    layers: int | None = None  # of a slice among others

    def within(self, base: Any, parameters: Data, layers: int) -> Merge:
        """The same for one slice of so many layers, with parameters of its own."""
        scopes, base = [parameters, *self.scopes], base or self.base
        return replace(self, base=base, scopes=scopes, has_gradient=False, layers=layers)

    def setting(self, name: str, model: Data | None = None) -> Any:
        """A parameter in our notation; None where it is not given. A model's own come first.

        mergekit's filters become patterns. There the first that fits counts, here the longest; where none of a scope
        fits, the scopes around it are asked.
        """
        found: Data = {}
        for scope in [model.get("parameters") or {} if model else {}, *self.scopes]:
            value = scope.get(name)
            entries = value if isinstance(value, list) and isinstance(value[0], Mapping) else [value]
            for entry in entries if value is not None else ():
                entry = entry if isinstance(entry, Mapping) else {"value": entry}
                text = entry.get("filter")
                if text not in (None, "*") and re.search(r"[\[\]?*]", text):
                    raise self.into.refuse(f"the filter {text!r} of {name} looks for a character that patterns use")
                pattern = "default" if text in (None, "*") else f"*{text}*"
                inside = self.over_layers(entry["value"])
                if self.layers is not None and re.search(r"\d", text or ""):
                    self.into.losses.tell(f"the filter {text!r} of {name}: in a slice, layers may have other numbers")
                if self.layers == 1 and isinstance(inside, list):
                    # A lone layer takes a gradient's last value; what stands around the layers, the first.
                    found.setdefault("*.[0-9]*" if pattern == "default" else pattern, inside[-1])
                    inside = inside[0]
                found.setdefault(pattern, inside)
                if pattern == "default":
                    return _by_length(found) if len(found) > 1 else found[pattern]
        if not found:
            return None
        if name not in _DEFAULTS:
            raise self.into.refuse(f"{name} has filters, but no value for the other tensors")
        return _by_length(found | {"default": _DEFAULTS[name]})

    def over_layers(self, value: Any) -> Any:
        """A number, or a gradient."""
        if not isinstance(value, list):
            return plain(value)
        self.has_gradient = self.has_gradient or (len(value) > 1 and self.layers != 1)
        return [plain(entry) for entry in value]

    def fields(self, models: list[Data], *, adds_base: bool = False, cut: bool = False) -> Data:
        """The stage's fields. adds_base: a base that is not among the models is one more of them, as in `models`."""
        base = self.into.model(self.base) if self.base else None
        if cut and self.base:  # The base's own layers stand among the sources.
            same = [model for model in models if str(model["model"]).startswith(f"{path_of(self.base)}[")]
            base = self.into.model(same[0]["model"]) if same else base
        held = {self.into.model(model["model"]): model for model in models}
        if self.method in _NO_BASE:
            if base and (adds_base or base in held):
                held = {base: held.get(base, {})} | held
            elif base:
                first = next(iter(held))
                self.into.losses.tell(f"config and tokenizer come from {first}, not from base_model {base}")
        else:
            held.pop(base or "", None)
            if base is None and self.method not in ("nuslerp", "multislerp"):
                raise self.into.refuse(f"{self.method} needs a base_model")
        self.unknown(models)
        if len(held) == 1 and self.method in _NO_BASE:
            return self.copy(next(iter(held)), next(iter(held.values())))
        if self.method == "passthrough":
            raise self.into.refuse(f"passthrough takes one model, not {len(held)}")
        if self.method == "slerp":
            return self.slerp(base, list(held)) | self.dtype | self.tokenizer
        fields: Data = {"op": _OPS.get(self.method, self.method)}
        fields |= {"base_model": base} if base and self.method not in _NO_BASE else {}
        fields["models"] = list(held)
        fields |= self.per_model(held)
        for name, ours in SHARED[self.method].items():
            value = self.setting(name)
            if value is not None and ours:
                if isinstance(value, (list, dict)) and name not in ("t", "lambda"):
                    self.into.losses.tell(
                        f"{name} of {self.method} is one number or yes and no, not by module or layer"
                    )
                else:
                    fields[ours] = value
        return self.mended(fields) | self.dtype | self.tokenizer

    def per_model(self, held: Mapping[str, Data]) -> Data:
        """What is given for each model: a list of one each, or the one value that they share."""
        fields: Data = {}
        for name, ours in PER_MODEL.get(self.method, {}).items():
            values = [self.setting(name, model) for model in held.values()]
            if name == "density" or any(value is not None for value in values):
                values = [_DEFAULTS.get(name, 1.0) if value is None else value for value in values]
                same = values.count(values[0]) == len(values) and not isinstance(values[0], list)
                fields[ours] = values[0] if same and ours != "weights" else values
        return fields

    def copy(self, model: str, settings: Data) -> Data:
        """One model as it is, or each of its tensors times a factor, or with other tokens."""
        scale = self.setting("scale", settings) if self.method == "passthrough" else None
        if self.method == "linear" and self.setting("normalize") is False:
            scale = self.setting("weight", settings)
        if scale is None and not self.tokenizer:
            return {"op": "passthrough", "slices": [{"model": model}]} | self.dtype
        fields = {"op": "linear", "models": [model], "weights": [1.0 if scale is None else scale], "normalize": False}
        return fields | self.dtype | self.tokenizer

    def mended(self, fields: Data) -> Data:
        """The fields where ours and mergekit's are not one to one."""
        if self.method == "nuslerp" and self.setting("nuslerp_flatten") is False:
            fields["along"] = "columns" if self.setting("nuslerp_row_wise") else "rows"
        if self.method == "task_arithmetic":
            fields["density"] = 1.0  # mergekit looks neither at it nor at `rescale`
            fields.pop("rescale", None)
            if not fields.get("normalize"):
                fields = {"op": "task_arithmetic", "model": fields["base_model"]} | fields
                for name in ("base_model", "density", "normalize"):
                    fields.pop(name, None)
            else:
                fields["op"] = "dare_linear"
        return fields

    def slerp(self, base: str | None, others: list[str]) -> Data:
        t = self.setting("t")
        if len(others) != 1 or base is None or t is None:
            raise self.into.refuse("slerp needs a base_model, one other model, and t")
        return {"op": "slerp", "model": base, "to": others[0], "t": t}

    def unknown(self, models: list[Data]) -> None:
        """Name the parameters that the method does not have. int8_mask only saved memory."""
        known = {*PER_MODEL.get(self.method, {}), *SHARED[self.method], "int8_mask"}
        for scope in [*self.scopes, *(model.get("parameters") or {} for model in models)]:
            for name in sorted(scope.keys() - known):
                self.into.losses.tell(f"parameter {name}: {self.method} has none of that name")


def path_of(written: Any) -> str:
    """A model as text, `path@revision+lora`, from how mergekit writes it: text, or a mapping."""
    if not isinstance(written, Mapping):
        return str(written)
    if "model" in written:
        return "+".join(path_of(part) for part in (written["model"], written.get("lora")) if part)
    revision = written.get("revision")
    return f"{written['path']}@{revision}" if revision else str(written["path"])


def plain(value: Any) -> Any:
    """A number that YAML 1.1 took for text ("1e-4"), a truth value that 1.2 does ("yes"); anything else as it is."""
    if isinstance(value, str) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _by_length(found: Data) -> Data:
    """The patterns with stars at their ends, which change nothing, until each is longer than all behind it."""
    longest, entries = 0, []
    for pattern, value in reversed(found.items()):
        if pattern != "default":
            pattern = pattern.ljust(longest + 1, "*")
            longest = len(pattern)
        entries.append((pattern, value))
    return dict(reversed(entries))
