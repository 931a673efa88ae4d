"""What a published card's front matter says, against the release: licence, bases, results.

The card is untrusted: its front matter is compared, and nothing of it is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hubforge.errors import shown
from hubforge.front_matter import read_front_matter
from hubforge.release import Release

_RELATIONS = ("adapter", "merge", "quantized", "finetune")  # huggingface.co/docs/hub/model-cards, "base_model_relation"


def front_matter_faults(card: str, release: Release, by_hand: Collection[str] = ()) -> Iterator[str]:
    """One line for each thing in a card's front matter that is not well formed, or that the release contradicts.

    by_hand: keys that people keep themselves, which are not compared.
    """
    try:
        front = read_front_matter(card)
    except ValueError as error:
        yield str(error)
        return
    if "license" in by_hand:
        release = release.model_copy(update={"license": None})
    front = {key: value for key, value in front.items() if key not in by_hand}
    yield from _license_faults(front, release)
    yield from _base_faults(front, release)
    yield from _result_faults(front, release)


def told(value: object) -> str:
    """A value of a front matter in few words, safe to print."""
    return shown(repr(value)) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _slug(name: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") if isinstance(name, str) else ""


def _license_faults(front: Mapping[str, Any], release: Release) -> Iterator[str]:
    """A licence the Hub has no word for is written `other`, with its name beside it."""
    said = front.get("license_name") if front.get("license") == "other" else front.get("license")
    if release.license and _slug(said or front.get("license")) != _slug(release.license):
        yield f"says license {told(said)}, but the release has {shown(release.license)}"


def _base_faults(front: Mapping[str, Any], release: Release) -> Iterator[str]:
    known = {source.repo for source in release.sources} | {target.repo for target in release.targets}
    known |= {str(source.facts.get("base_model")) for source in release.sources}
    bases = front.get("base_model")
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []:
        if not isinstance(base, str) or base not in known:
            yield f"says base_model {told(base)}, which the release does not know"
    relation = front.get("base_model_relation")
    if relation is not None and not (isinstance(relation, str) and relation in _RELATIONS):
        yield f"says base_model_relation {told(relation)}, but the Hub knows {', '.join(_RELATIONS)}"


def _result_faults(front: Mapping[str, Any], release: Release) -> Iterator[str]:
    """Each number of `model-index` must be one that the release measured, to the digits that the card gives."""
    measured: dict[str, list[float]] = {}
    for metric in release.metrics:
        measured.setdefault(metric.metric, []).append(metric.value)
    for model in _list(front.get("model-index")):
        for result in _list(_get(model, "results")):
            for metric in _list(_get(result, "metrics")):
                name, value = _get(metric, "type"), _get(metric, "value")
                if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float):
                    yield f"has a result of {told(name)} that is no number: {told(value)}"
                elif not any(abs(value - known) <= 5e-7 for known in measured.get(name, ())):
                    yield f"says {shown(name)} is {value}, which the release did not measure"


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _get(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None
