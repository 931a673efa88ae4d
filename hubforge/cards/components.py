"""What went in: the models and the adapters, as far as their own files and the recipe tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import code, is_repo, link, repo_link, text
from hubforge.cards.numbers import big_count, count, short
from hubforge.release import SourceRecord, StepRecord

Row = dict[str, str]

# The names under which adapters' own files keep these facts, the most telling first.
_CORPUS = ("corpus", "dataset", "datasets", "data", "dataset_name")
_SAMPLES = ("samples", "num_samples", "n_samples", "examples", "rows", "train_samples")
_TOKENS = ("tokens", "num_tokens", "total_tokens", "num_input_tokens_seen", "train_tokens")
_RECIPE = ("recipe", "config", "training_recipe")


def model_rows(lineage: Lineage) -> list[Row]:
    """The models whose weights are in what is published, and where each is used."""
    return [
        {
            "Model": source_link(source),
            "Used in": used_in(lineage, f"sources.{source.name}"),
            "Architecture": code(source.facts.get("architecture")),
            "Parameters": big_count(source.facts.get("parameters")),
            "dtype": text(source.facts.get("dtype")),
            "Licence": text(source.license),
        }
        for source in lineage.weights
        if source.kind == "model"
    ]


def adapter_rows(lineage: Lineage) -> list[Row]:
    """The adapters that were merged or folded in: those read, then those trained by this recipe."""
    rows: list[Row] = []
    for name in lineage.folded:
        step, source = lineage.release.step(name), lineage.release.source(name)
        if step is not None:
            rows.append(_trained(lineage, step))
        elif source is not None:
            rows.append(_read(lineage, source))
    return rows


def source_link(source: SourceRecord) -> str:
    """A source by its Hub repository, else by the path in the recipe, else by its name."""
    if source.repo:
        return repo_link(source.repo, source.kind)
    return code(source.name)


def used_in(lineage: Lineage, name: str) -> str:
    """The fields of steps that refer to that full name: "`styled.model`, `healed.to`"."""
    places: list[str] = []
    for step in lineage.steps:
        for ref, parent in step.inputs.items():
            if parent == name:
                places += [code(f"{step.entry}.{field}") for field, value in step.fields.items() if _holds(value, ref)]
    return ", ".join(dict.fromkeys(places))


def base_of(lineage: Lineage, source: SourceRecord) -> SourceRecord | str | None:
    """What an adapter says its base is: a model source of this release where one matches, else the name it states."""
    stated = source.facts.get("base_model")
    if not isinstance(stated, str) or not stated:
        return None
    models = [model for model in lineage.release.sources if model.kind == "model"]
    for model in models:
        if stated in (model.repo, model.path):
            return model
    # An adapter trained on this machine names a folder, of which only the last part is kept.
    named = [model for model in models if model.path and stated == model.path.rstrip("/").rsplit("/", 1)[-1]]
    return named[0] if len(named) == 1 else stated


def first(facts: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of those facts that is known."""
    for name in names:
        if facts.get(name) not in (None, "", [], {}):
            return facts[name]
    return None


def _read(lineage: Lineage, source: SourceRecord) -> Row:
    training = source.facts.get("training")
    training = training if isinstance(training, Mapping) else {}
    base = base_of(lineage, source)
    rank = source.facts.get("rank")
    return {
        "Adapter": source_link(source),
        "Base": _base(base, on_hub=source.repo is not None),
        "Rank": text(count(rank) if isinstance(rank, int) else rank),
        "Alpha": text(short(source.facts.get("alpha"))) + (" (rsLoRA)" if source.facts.get("use_rslora") else ""),
        "Weight": _weight(lineage, f"sources.{source.name}"),
        "Source corpus": _corpus(first(training, _CORPUS)),
        "Samples": text(count(first(training, _SAMPLES))),
        "Tokens": text(big_count(first(training, _TOKENS))),
        "Recipe": _recipe(first(training, _RECIPE)),
    }


def _trained(lineage: Lineage, step: StepRecord) -> Row:
    bases = [name for name in step.inputs.values() if lineage.kind(name) == "model"]
    data = [source for name in step.inputs.values() if (source := lineage.release.source(name))]
    corpora = [source_link(source) for source in data if source.kind == "dataset"]
    base = lineage.release.source(bases[0]) if bases else None
    return {
        "Adapter": f"{code(step.entry)}, trained here",
        "Base": source_link(base) if base else code(lineage.entry(bases[0])) if bases else "",
        "Rank": text(count(first({**step.fields, **step.metrics}, ("rank", "r")))),
        "Alpha": text(short(step.fields.get("alpha"))),
        "Weight": _weight(lineage, step.name),
        "Source corpus": ", ".join(corpora),
        "Samples": text(count(first(step.metrics, _SAMPLES))),
        "Tokens": text(big_count(first(step.metrics, _TOKENS))),
        "Recipe": f"{code(step.op)}, below",
    }


def _base(base: SourceRecord | str | None, *, on_hub: bool) -> str:
    if isinstance(base, SourceRecord):
        return source_link(base)
    if base is None:
        return ""
    # A local adapter's base may be a path of two parts that only looks like a repository.
    return repo_link(base) if on_hub and is_repo(base) else code(base)


def _corpus(value: Any) -> str:
    items = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(text(item) for item in items if isinstance(item, (str, int)) and item != "")


def _recipe(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    return link(value.rsplit("/", 1)[-1], value) if value.startswith("https://") else text(value)


def _weight(lineage: Lineage, name: str) -> str:
    """The weight a stage's `weights` gives that adapter, when it has such a list beside `adapters`."""
    for step in lineage.steps:
        refs, weights = step.fields.get("adapters"), step.fields.get("weights")
        if isinstance(refs, (list, tuple)) and isinstance(weights, (list, tuple)) and len(refs) == len(weights):
            for ref, weight in zip(refs, weights, strict=True):
                if step.inputs.get(str(ref)) == name:
                    return text(short(weight))
    return ""


def _holds(value: Any, ref: str) -> bool:
    return value == ref or (isinstance(value, (list, tuple)) and ref in value)
