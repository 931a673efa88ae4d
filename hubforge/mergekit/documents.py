"""Recipes from mergekit's configurations: the same models, the same method, the same parameters.

Written against mergekit 0.1.5: `models` and `slices`, parameters by model, slice and configuration, filters, gradients,
adapters (`model+lora`), revisions (`model@v1`), tokenizers, and several documents that refer to one another by `name`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hubforge import marks
from hubforge.errors import RecipeError
from hubforge.mergekit.fields import SHARED, Data, Losses, Merge, path_of, plain
from hubforge.mergekit.templates import TEMPLATES

_KEYS = {
    *(
        "models",
        "slices",
        "modules",
        "merge_method",
        "base_model",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "tokenizer",
    ),
    *("chat_template", "parameters", "name", "out_path"),
}
_FINAL = "merged"  # how a document without a name is called
_OF_SLICE, _OF_MODEL = {"sources", "base_model", "parameters"}, {"model", "layer_range", "parameters"}
_RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def import_mergekit(text: str, file: str = "mergekit.yml", folder: Path = Path()) -> tuple[str, list[str]]:
    """A recipe that does what the configuration says, as YAML; and, a sentence each, what it does not carry over.

    folder: where the recipe will lie; paths of the configuration are relative to the working folder, as in mergekit.
    Raises RecipeError for what is no configuration of mergekit, or one that no recipe can follow.
    """
    found = _Import(file, _documents(text, file), folder)
    try:
        final = found.all_stages()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecipeError(f"does not have the form of mergekit's configurations ({error!r})", where=file) from error
    recipe = {"name": slug(final), "sources": found.sources, "stages": found.stages}
    head = "# yaml-language-server: $schema=schema.json\n# From a mergekit configuration.\n"
    body = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    return head + "".join(f"# Not carried over: {loss}\n" for loss in found.losses.told) + body, found.losses.told


def _documents(text: str, file: str) -> list[Data]:
    """The documents of a file; each keeps its line numbers for errors."""
    documents, start = [], 0
    lines = text.splitlines()
    for end in [*(i for i, line in enumerate(lines) if re.fullmatch(r"---(\s+#.*|\s*)", line)), len(lines)]:
        part = lines[start:end]
        if any(line.strip() and not line.lstrip().startswith("#") for line in part):
            marked = marks.parse("\n".join(part) + "\n", file, line=start + 1)
            if marked.errors:
                raise marked.errors[0]
            data = _with_merge_keys(marked.data, file)
            if not isinstance(data, dict) or "merge_method" not in data:
                mend = "mergekit-moe and evolutionary configurations are of another kind."
                raise RecipeError("is no merge configuration: it has no merge_method", where=file, mend=mend)
            documents.append(data)
        start = end + 1
    if not documents:
        raise RecipeError("holds no merge configuration", where=file)
    return documents


def _with_merge_keys(data: Any, file: str) -> Any:
    """The data with what YAML 1.1's `<<: *anchor` brings in, as mergekit reads it; a mapping's own keys come first."""
    if isinstance(data, list):
        return [_with_merge_keys(each, file) for each in data]
    if not isinstance(data, dict):
        return data
    found = {key: _with_merge_keys(value, file) for key, value in data.items()}
    merged = found.pop("<<", {})
    for each in merged if isinstance(merged, list) else [merged]:
        if not isinstance(each, dict):
            raise RecipeError(f"<< is {each!r}, not a mapping", where=file, mend="It takes an alias: `<<: *name`.")
        found = {**each, **found}
    return found


@dataclass
class _Import:
    """One file being turned into sources and stages."""

    file: str
    documents: list[Data]
    folder: Path
    sources: dict[str, Data] = field(default_factory=dict)
    stages: dict[str, Data] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)
    _named: dict[str, str] = field(default_factory=dict)  # a model as written -> its source or stage
    _open: list[str] = field(default_factory=list)  # documents being turned, outermost first

    def all_stages(self) -> str:
        """Turn every document; the name of the last one's stage."""
        labels = [_label(document) for document in self.documents]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise self.refuse(f"two documents are called {twice!r}", mend="Give each a `name` of its own.")
        # The one without a name is the merge that the others are for, wherever it stands.
        last = sorted(self.documents, key=lambda document: _label(document) == _FINAL)
        return [self.stage(document) for document in last][-1]

    def refuse(self, what: str, mend: str = "") -> RecipeError:
        return RecipeError(what, where=self.file, mend=mend)

    def stage(self, document: Data) -> str:
        """The stage that one document becomes, with all it needs before it."""
        label = _label(document)
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
            parts, *rest = modules.values()
            if any(other != parts for other in rest) or (rest and parts.get("slices")):
                mend = "Import the merge of one module alone, and name its tensors: `include: [language_model.*]`, say."
                raise self.refuse("modules: a model's modules can only be merged alike, and whole", mend)
        scopes = [parts.get("parameters") or {}, document.get("parameters") or {}]
        merge = Merge(self, method, document.get("base_model"), scopes, self.dtype(document), self.tokens(document))
        slices = parts.get("slices") or []
        if parts.get("models"):
            fields = merge.fields(parts["models"], adds_base=True)
        elif len(slices) == 1 and self.is_whole(slices[0]):
            merge.scopes.insert(0, slices[0].get("parameters") or {})
            fields = merge.fields(slices[0]["sources"])
        elif slices:
            fields = self.stacked(slices, merge, label)
        else:
            raise self.refuse("has neither models nor slices")
        self._open.pop()
        return self.add(label, fields | self.template(document, fields))

    def add(self, label: str, fields: Data) -> str:
        name = self.free(label)
        self.stages[name] = fields
        self._named[label] = name
        return name

    def around(self, document: Data) -> None:
        """What stands beside the models and the method, and is not carried over."""
        if (method := document["merge_method"]) in _RANDOM:
            self.losses.tell(f"the random choice of {method}: as many elements are kept, but not the same")
        for key in sorted(document.keys() - _KEYS):
            self.losses.tell(f"{key}: mergekit itself does not know it")
        slices = document.get("slices") or []
        models = [*(document.get("models") or []), *(source for part in slices for source in part["sources"])]
        for what, parts, known in (("slice", slices, _OF_SLICE), ("model", models, _OF_MODEL)):
            for key in sorted({key for part in parts for key in part} - known):
                self.losses.tell(f"{key} of a {what}: mergekit itself does not look at it")

    def template(self, document: Data, fields: Data) -> Data:
        """The chat template, as a field of the document's stage."""
        template = document.get("chat_template")
        if not template:
            return {}
        if template in TEMPLATES:
            return {"chat_template": TEMPLATES[template].strip()}
        if template == "auto":
            if any(part["model"] in self.stages for part in fields.get("slices", ())):
                self.losses.tell("chat_template auto: a slice that merges counts once, with its first model's template")
        elif len(template) < 20 or "{" not in template:
            known = ", ".join(("auto", *TEMPLATES))
            raise self.refuse(f"chat_template is {template!r}", mend=f"It is a template's text, or one of: {known}.")
        return {"chat_template": template}

    def dtype(self, document: Data) -> Data:
        """The output's element type, as a field."""
        dtype = document.get("out_dtype") or document.get("dtype")
        if dtype is None:
            return {}
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in ("bfloat16", "float16", "float32"):
            self.losses.tell(f"dtype {dtype}: each tensor keeps its own")
            return {}
        return {"dtype": dtype}

    def tokens(self, document: Data) -> Data:
        """The vocabulary of the output, as fields."""
        settings = document.get("tokenizer") or {}
        source = document.get("tokenizer_source") or (settings.get("source", "union") if settings else None)
        if source is None:
            return {}
        if isinstance(source, str):
            source = source.removeprefix("model:")  # as older versions of mergekit had it
        fields: Data = {"tokenizer": source if source in ("base", "union") else self.model(source)}
        rows = {
            token: row for token, of in (settings.get("tokens") or {}).items() if (row := self.row(token, of or {}))
        }
        if rows:
            fields["tokens"] = {token: {} if row == {"zero": True} else row for token, row in rows.items()}
        if (multiple := settings.get("pad_to_multiple_of")) and multiple > 1:
            fields["pad_to_multiple_of"] = multiple
        return fields

    def row(self, token: str, settings: Data) -> Data:
        """Where one token's embedding comes from; {} for nothing that was said."""
        source = settings.get("source")
        force = {"force": True} if plain(settings.get("force")) else {}
        if source is None:
            self.losses.tell(f"tokenizer: {token!r} has no source")
            return {}
        if isinstance(source, Mapping) and source.get("kind") == "zero":
            return force or {"zero": True}
        if isinstance(source, Mapping) and source.get("kind") == "model_token":
            which = {key: source[key] for key in ("token", "token_id") if source.get(key) is not None}
            return {"model": self.model(source["model"])} | which | force
        return {"model": self.model(source)} | force

    def is_whole(self, part: Data) -> bool:
        """Whether the sources of a lone slice are models as they are: all their layers, as far as can be known."""
        ranges = [list(source["layer_range"]) for source in part["sources"]]
        if ranges[0][0] != 0 or ranges.count(ranges[0]) != len(ranges):
            return False
        depths = {_depth(path_of(source["model"])) for source in part["sources"]}
        if depths == {None}:
            self.losses.tell(f"layer_range {ranges[0]} is taken to be all layers")
        return depths <= {None, ranges[0][1]}

    def stacked(self, slices: list[Data], merge: Merge, label: str) -> Data:
        """Each slice's models merged, and the slices stacked."""
        parts: list[Data] = []
        for number, part in enumerate(slices, 1):
            sources = part["sources"]
            ranges = [list(source["layer_range"]) for source in sources]
            if len({last - first for first, last in ranges}) != 1:
                raise self.refuse(f"slice {number} of {label} merges different numbers of layers: {ranges}")
            own = merge.within(part.get("base_model"), part.get("parameters") or {}, ranges[0][1] - ranges[0][0])
            layers: Data = {"layers": ranges[0]}
            if len(sources) == 1:
                scale = own.setting("scale", sources[0]) if merge.method == "passthrough" else None
                if scale is not None:
                    layers["scale"] = scale
                    self.losses.tell_scale(scale)
                parts.append({"model": self.model(sources[0]["model"])} | layers)
                continue
            fields = own.fields(sources)
            if own.has_gradient or ranges.count(ranges[0]) != len(ranges):
                # Over the layers of the slice alone: a gradient runs from its first to its last.
                fields = own.fields([self.cut(source) for source in sources], cut=True)
                layers = {"layers": [0, ranges[0][1] - ranges[0][0]]}
            parts.append({"model": self.add(f"{label}-{number}", fields)} | layers)
        if merge.tokenizer and not any(part["model"] in self.stages for part in (parts[0], parts[-1])):
            self.losses.tell("tokenizer: layers are stacked as they are, with the first model's tokenizer")
        return {"op": "passthrough", "slices": parts} | merge.dtype

    def cut(self, source: Data) -> Data:
        """A source with only its layers, as a stage."""
        first, last = source["layer_range"]
        written = path_of(source["model"])
        label = f"{written}[{first}:{last}]"
        if label not in self._named:
            part = {"model": self.model(source["model"]), "layers": [first, last]}
            name = self.add(
                f"{slug(written.replace('+', '-'))}-{first}-{last}", {"op": "passthrough", "slices": [part]}
            )
            self._named[label] = name
        return source | {"model": label}

    def model(self, written: Any) -> str:
        """The source or stage of a model as mergekit writes it: `path@revision+lora`, or the mapping it stands for."""
        if isinstance(written, Mapping) and written.get("override_architecture"):
            self.losses.tell(f"override_architecture of {path_of(written)}")
        key = path_of(written)
        if key not in self._named:
            base, _, lora = key.partition("+")
            for document in self.documents:
                if base in (document.get("name"), document.get("out_path")):
                    self._named[base] = self.stage(document)
            if base not in self._named:
                self._named[base] = self.source("model", base)
            if lora:
                fields = {"op": "apply", "model": self._named[base], "adapters": [self.source("adapter", lora)]}
                self._named[key] = self.add(f"{slug(base)}-{slug(lora)}", fields)
        return self._named[key]

    def source(self, kind: str, path: str) -> str:
        path, _, revision = path.partition("@")
        is_repo = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path, re.ASCII) and not Path(path).is_dir()
        value = path
        if not is_repo and not path.startswith(("/", "~")):
            inside = os.path.relpath(path, self.folder)
            value = inside if inside.startswith("..") else f"./{inside}"
        name = self.free(path)
        self.sources[name] = {kind: value} | ({"revision": revision} if revision else {})
        return name

    def free(self, label: str) -> str:
        """A name after the last part of a path that no source or stage has yet."""
        name = start = slug(label)
        number = 2
        while name in self.sources or name in self.stages:
            name, number = f"{start}-{number}", number + 1
        return name


def _label(document: Data) -> str:
    return str(document.get("name") or document.get("out_path") or _FINAL)


def _depth(path: str) -> int | None:
    """The number of layers of a model in a folder; None where only its config on the Hub tells."""
    try:
        config = json.loads((Path(path) / "config.json").read_bytes())
        depth = config.get("num_hidden_layers") or (config.get("text_config") or {}).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return depth if isinstance(depth, int) else None


def slug(label: str) -> str:
    """The last part of a path, as a name."""
    last = label.partition("@")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip("-._")[:60] or "model"
