"""The YAML block at the top of a card: what the Hub indexes, filters and links by."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from hubforge.cards.components import base_of
from hubforge.cards.licenses import HUB_LICENSES, inherited_license
from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import is_repo
from hubforge.cards.quants import originals
from hubforge.cards.results import eval_step, metrics_of
from hubforge.release import SourceRecord

# Ops that say nothing of the method when they stand alone in a list of tags.
_NO_TAG = ("apply", "gguf")
_KIND_TAGS = {"model": (), "adapter": ("peft", "lora"), "gguf": ("gguf",), "mask": ("mask",)}


def front_matter(lineage: Lineage) -> dict[str, Any]:
    """The card's metadata, in the order it is shown. What is not known has no key."""
    release, target, card = lineage.release, lineage.target, lineage.release.card
    bases, relation = base_models(lineage)
    data: dict[str, Any] = {
        **_license(inherited_license(release, target.name), release.license_link),
        "language": list(card.language),
        "base_model": bases,
        "base_model_relation": relation if bases else "",
        "library_name": {"model": "transformers", "adapter": "peft", "gguf": "gguf"}.get(target.kind, ""),
        "pipeline_tag": pipeline_tag(lineage),
        "tags": tags(lineage),
        "datasets": data_sets(lineage),
        "quantized_by": target.repo.split("/")[0] if target.kind == "gguf" and "/" in target.repo else "",
        "model-index": model_index(lineage),
    }
    return {key: value for key, value in data.items() if value not in ("", [], None)}


def dump(data: dict[str, Any]) -> str:
    """The metadata between its two `---` lines."""
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False, width=4096)
    return f"---\n{body}---"


def base_models(lineage: Lineage) -> tuple[list[str], str]:
    """The Hub repositories this one comes from, and how: merge, adapter, quantized or finetune.

    A mask is none of the four, and the Hub takes any other base for a fine-tune's, so a mask page states none.
    """
    kind = lineage.target.kind
    if kind == "mask":
        return [], ""
    if kind == "adapter":
        return _unique(_adapter_bases(lineage)), "adapter"
    if kind == "gguf":
        return _quantized(lineage)
    return _weights(lineage), relation(lineage)


def relation(lineage: Lineage) -> str:
    """ "merge" when weights of two or more came together, else "finetune"; "" for a copy of a source."""
    steps = [step for step in lineage.steps if step.section == "stages"]
    if not steps:
        return ""
    read = [source for source in lineage.weights if source.kind in ("model", "adapter")]
    trained = [name for name in lineage.folded if lineage.release.step(name) is not None]
    models = [source for source in read if source.kind == "model"]
    if len(models) == 1 and len(read) == 1 and len(trained) == 1:
        return "finetune"  # one adapter, trained here, folded into its model
    return "merge" if len(read) + len(trained) > 1 else "finetune"


def pipeline_tag(lineage: Lineage) -> str:
    """The author's, else text-generation for what generates text; a mask has none."""
    if lineage.release.card.pipeline_tag:
        return lineage.release.card.pipeline_tag
    if lineage.target.kind == "mask":
        return ""
    names = [str(source.facts.get("architecture") or "") for source in lineage.weights if source.kind == "model"]
    if any(name.endswith("ForConditionalGeneration") for name in names):
        return "" if lineage.target.kind != "gguf" else "text-generation"
    return "text-generation"


def tags(lineage: Lineage) -> list[str]:
    """`hubforge`, the kind, the methods that were used, then the author's."""
    kind = lineage.target.kind
    found = ["hubforge", *_KIND_TAGS[kind]]
    steps = lineage.steps if kind != "mask" else lineage.made
    if kind in ("model", "gguf") and relation(lineage) == "merge":
        found.append("merge")
    found += [step.op for step in steps if step.section in ("masks", "adapters", "stages") and step.op not in _NO_TAG]
    return _unique([*found, *lineage.release.card.tags])


def data_sets(lineage: Lineage) -> list[str]:
    """The author's data sets, then those among the sources that are on the Hub."""
    read = [source.repo for source in lineage.sources if source.kind == "dataset" and is_repo(source.repo)]
    return _unique([*lineage.release.card.datasets, *(repo for repo in read if repo)])


def model_index(lineage: Lineage) -> list[dict[str, Any]]:
    """The results in the Hub's older form, which its pages still read; [] without results, or for quants and masks."""
    if lineage.target.kind not in ("model", "adapter"):
        return []
    results: list[dict[str, Any]] = []
    for entry in lineage.entries:
        for name in dict.fromkeys(metric.eval for metric in metrics_of(lineage, entry)):
            step = eval_step(lineage, name, entry)
            tasks = step.fields.get("tasks") if step else None
            data_set = str(tasks[0]) if isinstance(tasks, (list, tuple)) and len(tasks) == 1 else name
            metrics = [
                {"type": metric.metric, "value": round(metric.value, 6), "name": f"{name} {metric.metric}"}
                for metric in metrics_of(lineage, entry, name)
            ]
            results.append(
                {
                    "task": {"type": pipeline_tag(lineage) or "text-generation"},
                    "dataset": {"name": data_set, "type": data_set},
                    "metrics": metrics,
                }
            )
    return [{"name": lineage.target.repo.rsplit("/", 1)[-1], "results": results}] if results else []


def _license(name: str, address: str | None) -> dict[str, Any]:
    if not name:
        return {}
    if name.lower() in HUB_LICENSES - {"other"}:
        return {"license": name.lower()} | ({"license_link": address} if address else {})
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return {"license": "other", "license_name": slug if slug != "other" else "", "license_link": address}


def _weights(lineage: Lineage) -> list[str]:
    """Models first, as the Hub shows the first; then adapters."""
    order = sorted(lineage.weights, key=lambda source: source.kind != "model")
    return _unique(source.repo for source in order if is_repo(source.repo))


def _adapter_bases(lineage: Lineage) -> Iterable[str]:
    for step in lineage.made:
        for name in step.inputs.values():
            source = lineage.release.source(name)
            if (
                step.section == "adapters"
                and source
                and source.kind == "model"
                and source.repo
                and is_repo(source.repo)
            ):
                yield source.repo
    for source in lineage.weights:
        if source.kind == "adapter":
            yield from adapter_base_repo(lineage, source)


def adapter_base_repo(lineage: Lineage, source: SourceRecord) -> Iterable[str]:
    """The Hub repository of an adapter's base, when it has one."""
    base = base_of(lineage, source)
    if isinstance(base, SourceRecord):
        if base.repo and is_repo(base.repo):
            yield base.repo
    # What a local adapter states may be a path of two parts that only looks like a repository.
    elif base and source.repo and is_repo(base):
        yield base


def _quantized(lineage: Lineage) -> tuple[list[str], str]:
    """The repository of the quantized model: another target, or a source; else those the model was made from."""
    found: list[str] = []
    for entry in originals(lineage):
        step = lineage.release.step(entry)
        source = lineage.release.source(entry)
        target = lineage.published(step.name if step else f"sources.{entry}")
        if target and is_repo(target.repo):
            found.append(target.repo)
        elif source and source.repo and is_repo(source.repo):
            found.append(source.repo)
    if found:
        return _unique(found), "quantized"
    bases = _weights(lineage)
    return bases, relation(lineage) or "quantized"


def _unique(items: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(item for item in items if item))
