"""Recipes from mergekit's configurations: the same models, the same method, the same parameters.

Written against mergekit 0.1.5: `models` and `slices`, parameters by model, slice and configuration, filters, gradients,
adapters (`model+lora`), revisions (`model@v1`), and several documents that refer to one another by `name`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from hubforge import marks
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
}
_TASK_VECTORS = tuple(method for method, names in PER_MODEL.items() if "density" in names)
_RESCALING = ("dare_linear", "dare_ties", "della", "della_linear")
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
    "passthrough": {"scale": "scale"},
    **{method: {"normalize": "normalize", "rescale": "rescale", "lambda": "scale"} for method in _TASK_VECTORS},
}
_NO_BASE = ("linear", "karcher", "passthrough")  # their base_model is one more model, and where the config comes from
# Module names that mergekit's filters, which look for text in a tensor's name, commonly hold: whole parts of the name.
_MODULES = (
    *("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "mlp", "up_proj", "down_proj", "gate_proj"),
    *("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm"),
)


def import_mergekit(text: str, file: str = "mergekit.yml") -> tuple[str, list[str]]:
    """A recipe that does what the configuration says, as YAML; and, a sentence each, what it does not carry over.

    Raises RecipeError for what is no configuration of mergekit, or one that no recipe can follow.
    """
    found = _Import(file, _documents(text, file))
    try:
        final = found.all_stages()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecipeError(f"does not have the form of mergekit's configurations ({error!r})", where=file) from error
    recipe = {"name": _slug(final), "sources": found.sources, "stages": found.stages}
    head = "# yaml-language-server: $schema=schema.json\n# From a mergekit configuration.\n"
    body = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    return head + "".join(f"# Not carried over: {loss}\n" for loss in found.losses) + body, found.losses


def _documents(text: str, file: str) -> list[Data]:
    """The documents of a file; each keeps its line numbers for errors."""
    documents, start = [], 0
    lines = text.splitlines()
    for end in [*(i for i, line in enumerate(lines) if line.rstrip() == "---"), len(lines)]:
        part = lines[start:end]
        if any(line.strip() and not line.lstrip().startswith("#") for line in part):
            marked = marks.parse("\n" * start + "\n".join(part) + "\n", file)
            if marked.errors:
                raise marked.errors[0]
            if not isinstance(marked.data, dict) or "merge_method" not in marked.data:
                mend = "mergekit-moe and evolutionary configurations are of another kind."
                raise RecipeError("is no merge configuration: it has no merge_method", where=file, mend=mend)
            documents.append(marked.data)
        start = end + 1
    if not documents:
        raise RecipeError("holds no merge configuration", where=file)
    return documents


@dataclass
class _Import:
    """One file being turned into sources and stages."""

    file: str
    documents: list[Data]
    sources: dict[str, Data] = field(default_factory=dict)
    stages: dict[str, Data] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    _named: dict[str, str] = field(default_factory=dict)  # a model as written -> its source or stage
    _open: list[str] = field(default_factory=list)  # documents being turned, outermost first

    def all_stages(self) -> str:
        """Turn every document; the name of the last one's stage."""
        return [self.stage(document) for document in self.documents][-1]

    def lose(self, what: str) -> None:
        if what not in self.losses:
            self.losses.append(what)

    def refuse(self, what: str, mend: str = "") -> RecipeError:
        return RecipeError(what, where=self.file, mend=mend)

    def stage(self, document: Data) -> str:
        """The stage that one document becomes, with all it needs before it."""
        label = str(document.get("name") or document.get("out_path") or "merged")
        if label in self._named:
            return self._named[label]
        if label in self._open:
            raise self.refuse(f"{label} needs itself: {' -> '.join([*self._open, label])}")
        self._open.append(label)
        method = str(document["merge_method"])
        if method not in SHARED:
            raise self.refuse(f"merge_method is {method!r}", mend=f"Known are: {', '.join(sorted(SHARED))}.")
        self.around(document)
        parts = document
        if modules := document.get("modules"):
            if len(modules) != 1:
                raise self.refuse("modules: a model of several modules cannot be merged module by module")
            (parts,) = modules.values()
        scopes = [parts.get("parameters") or {}, document.get("parameters") or {}]
        merge = _Merge(self, method, document.get("base_model"), scopes)
        slices = parts.get("slices") or []
        if parts.get("models"):
            fields = merge.fields(parts["models"])
        elif len(slices) == 1 and (whole := self.all_layers(slices[0])):
            self.lose(f"layer_range {whole} is taken to be all layers")
            merge.scopes.insert(0, slices[0].get("parameters") or {})
            fields = merge.fields(slices[0]["sources"])
        elif slices:
            fields = self.stacked(slices, merge, label)
        else:
            raise self.refuse("has neither models nor slices")
        if dtype := document.get("out_dtype") or document.get("dtype"):
            if dtype in ("bfloat16", "float16", "float32"):
                fields["dtype"] = dtype
            else:
                self.lose(f"dtype {dtype}: each tensor keeps its own")
        self._open.pop()
        return self.add(label, fields)

    def add(self, label: str, fields: Data) -> str:
        name = self.free(label)
        self.stages[name] = fields
        self._named[label] = name
        return name

    def around(self, document: Data) -> None:
        """What stands beside the models and the method."""
        tokenizer = document.get("tokenizer_source") or (document.get("tokenizer") or {}).get("source")
        if tokenizer and tokenizer != "base":
            self.lose(f"tokenizer {tokenizer}: the tokenizer is the base model's, and the vocabularies must be one")
        elif (document.get("tokenizer") or {}).keys() - {"source"}:
            self.lose("tokenizer: the embeddings of single tokens, and padding")
        if document.get("chat_template"):
            self.lose("chat_template: that of the base model stays")
        if document["merge_method"] in ("dare_linear", "dare_ties", "della", "della_linear"):
            self.lose(f"the random choice of {document['merge_method']}: as many elements are kept, but not the same")
        known = {
            "models", "slices", "modules", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source",
            "tokenizer", "chat_template", "parameters", "name", "out_path",
        }  # fmt: skip
        for key in sorted(document.keys() - known):
            self.lose(f"{key}: mergekit itself does not know it")

    def all_layers(self, part: Data) -> list[int] | None:
        """The range of layers that all sources of a lone slice share, if it starts at the first layer."""
        ranges = [source.get("layer_range") for source in part.get("sources") or []]
        return (
            ranges[0] if ranges and ranges[0] and ranges[0][0] == 0 and ranges.count(ranges[0]) == len(ranges) else None
        )

    def stacked(self, slices: list[Data], merge: _Merge, label: str) -> Data:
        """Each slice's models merged whole, and the slices stacked."""
        parts = []
        for number, part in enumerate(slices, 1):
            ranges = [source["layer_range"] for source in part["sources"]]
            if ranges.count(ranges[0]) != len(ranges):
                raise self.refuse(f"slice {number} of {label} merges layers of different places: {ranges}")
            own = _Merge(
                self, merge.method, part.get("base_model") or merge.base, [part.get("parameters") or {}, *merge.scopes]
            )
            layers: Data = {"layers": list(ranges[0])}
            if len(part["sources"]) == 1:
                (source,) = part["sources"]
                if merge.method == "passthrough" and (scale := own.setting("scale", source)) is not None:
                    layers["scale"] = scale
                parts.append({"model": self.model(source["model"])} | layers)
                continue
            fields = own.fields(part["sources"])
            if own.has_gradient:
                self.lose(f"slice {number} of {label}: a gradient runs over all layers, not over those of the slice")
            parts.append({"model": self.add(f"{label}-{number}", fields)} | layers)
        return {"op": "passthrough", "slices": parts}

    def model(self, written: Any) -> str:
        """The source or stage of a model as mergekit writes it: `path@revision+lora`, or the mapping it stands for."""
        if isinstance(written, Mapping):
            if written.get("override_architecture"):
                self.lose(f"override_architecture of {_path(written['model'])}")
            base, lora = _path(written["model"]), _path(written.get("lora"))
        else:
            base, _, lora = str(written).partition("+")
        key = f"{base}+{lora}" if lora else base
        if key not in self._named:
            for document in self.documents:
                if base in (document.get("name"), document.get("out_path")):
                    self._named[base] = self.stage(document)
            if base not in self._named:
                self._named[base] = self.source("model", base)
            if lora:
                fields = {"op": "apply", "model": self._named[base], "adapters": [self.source("adapter", lora)]}
                self._named[key] = self.add(f"{_slug(base)}-{_slug(lora)}", fields)
        return self._named[key]

    def source(self, kind: str, path: str) -> str:
        path, _, revision = path.partition("@")
        is_repo = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path, re.ASCII)
        value = path if is_repo or path.startswith(("./", "../", "/", "~")) else f"./{path}"
        name = self.free(path)
        self.sources[name] = {kind: value} | ({"revision": revision} if revision else {})
        return name

    def free(self, label: str) -> str:
        """A name after the last part of a path that no source or stage has yet."""
        name = slug = _slug(label)
        number = 2
        while name in self.sources or name in self.stages:
            name, number = f"{slug}-{number}", number + 1
        return name


@dataclass
class _Merge:
    """One application of a method: where its parameters are looked up, from the innermost scope outwards."""

    into: _Import
    method: str
    base: Any
    scopes: list[Data]
    has_gradient: bool = False

    def setting(self, name: str, model: Data | None = None) -> Any:
        """A parameter in our notation; None where it is not given. A model's own come first."""
        inner = [model.get("parameters") or {}] if model else []
        for scope in [*inner, *self.scopes]:
            if scope.get(name) is not None:
                return self.schedule(name, scope[name])
        return None

    def schedule(self, name: str, value: Any) -> Any:
        """mergekit's filters as patterns. There the first that fits counts, here the longest."""
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            return _number(value)
        if not any(isinstance(entry, Mapping) for entry in value):
            self.has_gradient = True
            return [_number(entry) for entry in value]
        found: Data = {}
        for entry in value:
            text = entry.get("filter")
            inside = self.schedule(name, entry["value"])
            if text in (None, "*"):
                found["default"] = inside
                break
            if re.search(r"[\[\]?*]", text):
                raise self.into.refuse(f"the filter {text!r} of {name} looks for a character that patterns use")
            pattern = text if text in _MODULES else f"*{text}*"
            found.setdefault(pattern, inside)
        if "default" not in found:
            raise self.into.refuse(f"{name} has filters, but no value for the other tensors")
        return _by_length(found)

    def fields(self, models: list[Data]) -> Data:
        """The stage's fields."""
        op = _OPS.get(self.method, self.method)
        base = self.into.model(self.base) if self.base else None
        held = {self.into.model(model["model"]): model for model in models}
        if self.method in _NO_BASE:
            if base and self.method == "karcher":
                held.setdefault(base, {})
            if base and base != next(iter(held)):
                self.into.lose(f"config and tokenizer come from {next(iter(held))}, not from base_model {base}")
        else:
            held.pop(base or "", None)
            if base is None and self.method not in ("nuslerp", "multislerp"):
                raise self.into.refuse(f"{self.method} needs a base_model")
        self.unknown(models)
        if self.method == "passthrough":
            raise self.into.refuse("passthrough of whole models is a copy; it stacks `slices`")
        if self.method == "slerp":
            return self.slerp(base, list(held))
        fields: Data = {"op": op} | ({"base_model": base} if base and self.method not in _NO_BASE else {})
        fields["models"] = list(held)
        for name, ours in PER_MODEL.get(self.method, {}).items():
            values = [self.setting(name, model) for model in held.values()]
            if name == "density" or any(value is not None for value in values):
                default = 1.0 if name in ("weight", "density") else {"gamma": 0.01, "epsilon": 0.15}[name]
                values = [default if value is None else value for value in values]
                is_one = (
                    ours != "weights" and values.count(values[0]) == len(values) and not isinstance(values[0], list)
                )
                fields[ours] = values[0] if is_one else values
        for name, ours in SHARED[self.method].items():
            value = self.setting(name)
            if value is not None and ours:
                if isinstance(value, (list, dict)) and name != "t":
                    self.into.lose(f"{name} of {self.method} is one number or yes and no, not by module or layer")
                else:
                    fields[ours] = value
        return self.mended(fields)

    def mended(self, fields: Data) -> Data:
        """The fields where ours and mergekit's are not one to one."""
        if self.method not in _RESCALING and fields.pop("rescale", False):
            self.into.lose(f"rescale: {self.method} keeps what it keeps at its size")
        if self.method == "nuslerp" and self.setting("nuslerp_flatten") is False:
            fields["along"] = "columns" if self.setting("nuslerp_row_wise") else "rows"
        simple = all(isinstance(weight, (int, float)) for weight in fields.get("weights") or [])
        if self.method == "task_arithmetic":
            fields["density"] = 1.0  # mergekit does not look at it
            if simple and not fields.get("normalize"):
                fields = {"op": "task_arithmetic", "model": fields["base_model"]} | fields
                for name in ("base_model", "density", "normalize"):
                    fields.pop(name, None)
            else:
                fields["op"] = "dare_linear"
        if self.method == "linear" and not simple:
            if fields.pop("normalize", True) is False:
                raise self.into.refuse("linear with weights by layer or module must normalize them")
            # W + Σ wᵢ · (Wᵢ − W) / Σ wᵢ is the mean, whichever of the models W is.
            fields |= {"op": "dare_linear", "base_model": fields["models"][0], "density": 1.0, "normalize": True}
        return fields

    def slerp(self, base: str | None, others: list[str]) -> Data:
        t = self.setting("t")
        if len(others) != 1 or base is None or t is None:
            raise self.into.refuse("slerp needs a base_model, one other model, and t")
        if isinstance(t, (int, float)):
            return {"op": "slerp", "model": base, "to": others[0], "t": t}
        return {"op": "nuslerp", "models": [base, others[0]], "weights": [_one_minus(t), t]}

    def unknown(self, models: list[Data]) -> None:
        """Name the parameters that the method does not have. int8_mask only saved memory."""
        known = {*PER_MODEL.get(self.method, {}), *SHARED[self.method], "int8_mask"}
        for scope in [*self.scopes, *(model.get("parameters") or {} for model in models)]:
            for name in sorted(scope.keys() - known):
                self.into.lose(f"parameter {name}: {self.method} has none of that name")


def _path(written: Any) -> str:
    """A path, with its revision, as text."""
    if isinstance(written, Mapping):
        revision = written.get("revision")
        return f"{written['path']}@{revision}" if revision else str(written["path"])
    return str(written or "")


def _slug(label: str) -> str:
    """The last part of a path, as a name."""
    return re.sub(r"[^\w.-]", "-", label.partition("@")[0].rstrip("/").rpartition("/")[2], flags=re.ASCII) or "model"


def _number(value: Any) -> Any:
    """A number that YAML 1.1 took for text ("1e-4"); anything else as it is."""
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


def _one_minus(t: Any) -> Any:
    if isinstance(t, Mapping):
        return {pattern: _one_minus(value) for pattern, value in t.items()}
    return [_one_minus(value) for value in t] if isinstance(t, list) else round(1 - t, 12)
