"""Numbers, times and digests as people read them."""

from __future__ import annotations

import datetime
import time
from typing import Any
from urllib.parse import quote

from hubforge.hub.names import SINGULAR
from hubforge.hub.storage.facts import parameters_of, tags_of
from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.tree import Tree


def size(count: int) -> str:
    """Bytes, in decimal units as the Hub shows them."""
    if count < 1000:
        return f"{count} B"
    for power, unit in ((1, "kB"), (2, "MB"), (3, "GB")):
        if count < 999.5 * 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count / 1000**4:.3g} TB"


def count(number: int) -> str:
    """A number of parameters: 4.02B, 12.3M."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def ago(seconds: int) -> str:
    """A time in the past, roughly: 'just now', '5 minutes ago'."""
    passed = max(0, int(time.time()) - seconds)
    if passed < 60:
        return "just now"
    for limit, unit in ((31557600, "year"), (2629800, "month"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if passed >= limit:
            number = passed // limit
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


def moment(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def address(path: str) -> str:
    """A path or revision as part of an address."""
    return quote(path)


def segment(revision: str) -> str:
    return quote(revision, safe="")


def texts(value: object) -> list[str]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str) and each]


def facts(repo: Repository, tree: Tree, card: dict[str, Any]) -> dict[str, Any]:
    """What the side of a repository's page lists."""
    parameters = parameters_of(repo, tree) or {}
    known = {key: texts(card.get(key)) for key in ("license", "language", "datasets", "base_model", "library_name")}
    shown = set(known["license"]) | set(known["language"])
    plain = [tag for tag in tags_of(card, tree, None) if ":" not in tag and tag not in shown]
    return {
        "kind": SINGULAR[repo.kind],
        "license": [card.get("license_name") or each for each in known["license"]],
        "license_link": card.get("license_link") if str(card.get("license_link", "")).startswith("https://") else None,
        "language": known["language"],
        "datasets": known["datasets"],
        "base_model": known["base_model"],
        "relation": card.get("base_model_relation") if isinstance(card.get("base_model_relation"), str) else None,
        "new_version": card.get("new_version") if isinstance(card.get("new_version"), str) else None,
        "task": card.get("pipeline_tag") if isinstance(card.get("pipeline_tag"), str) else None,
        "library": known["library_name"][:1],
        "tags": [tag for tag in plain if tag not in known["library_name"] and tag != card.get("pipeline_tag")],
        "parameters": parameters.get("total"),
        "dtypes": list(parameters.get("parameters", ())),
        "size": sum(entry.size for entry in tree.files.values()),
        "files": len(tree.files),
        "results": results(card)[:12],
    }


def results(card: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(dataset, metric, value) of the card's model-index; whatever is not one is passed over."""
    found = []
    for model in card.get("model-index") or () if isinstance(card.get("model-index"), list) else ():
        rows = model.get("results") if isinstance(model, dict) else None
        for row in rows if isinstance(rows, list) else ():
            if not isinstance(row, dict):
                continue
            data = row.get("dataset")
            name = str(data.get("name", "")) if isinstance(data, dict) else ""
            metrics = row.get("metrics")
            for metric in metrics if isinstance(metrics, list) else ():
                if isinstance(metric, dict) and isinstance(metric.get("value"), int | float | str):
                    value = metric["value"]
                    text = f"{value:.4g}" if isinstance(value, float) else str(value)
                    found.append((name, str(metric.get("name") or metric.get("type")), text))
    return found
