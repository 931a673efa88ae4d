"""Licences: what a release inherits from its inputs, and where its own licence does not fit theirs."""

from __future__ import annotations

from typing import Literal

from hubforge.cards.lineage import Lineage, find_target
from hubforge.cards.markdown import listed
from hubforge.release import Release, SourceRecord

Family = Literal["permissive", "terms", "copyleft", "noncommercial", "noderivatives", "unsure"]

# Identifiers that the Hub takes in `license:`; any other becomes `other` with a name. huggingface.co/docs, "Licenses".
# fmt: off
HUB_LICENSES = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc",
    "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
    "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa",
    "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license",
    "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "llama4", "grok2-community", "gemma", "other",
})
# fmt: on

# Licences that bind whoever passes the weights on to terms of their own.
_TERMS = ("gemma", "llama", "openrail", "creativeml", "bigscience", "bigcode", "deepfloyd", "grok", "apple-", "odbl")
_SAYS_NOTHING = ("", "unknown", "other")

_WHY: dict[Family, str] = {
    "permissive": "asks for attribution",
    "terms": "binds those who pass the weights on to its own terms",
    "copyleft": "asks that what is made from it keep the same licence",
    "noncommercial": "forbids commercial use",
    "noderivatives": "forbids sharing what is made from it",
    "unsure": "has terms that hubforge does not know",
}


def family(license: str) -> Family:
    """What kind of terms a licence identifier stands for."""
    name = license.strip().lower()
    if name.startswith("cc-") and "-nd" in name:
        return "noderivatives"
    if "-nc" in name or "noncommercial" in name or "research" in name or name == "apple-amlr":
        return "noncommercial"
    if any(name.startswith(prefix) or f"-{prefix}" in name for prefix in _TERMS):
        return "terms"
    if name.startswith(("gpl", "agpl", "lgpl", "cc-by-sa", "osl", "eupl")):
        return "copyleft"
    return "permissive" if name in HUB_LICENSES - {"other"} else "unsure"


def stated(source: SourceRecord) -> str:
    """The licence a source states, in lower case; "" when it states none."""
    name = (source.license or "").strip().lower()
    return "" if name in _SAYS_NOTHING[:2] else name


def inherited_license(release: Release, target: str | None = None) -> str:
    """The licence of what is published: the recipe's, else the one its inputs agree on or the strictest asks for.

    "" when nothing is known, or when two inputs ask for different ones.
    """
    if release.license:
        return release.license
    found = {name for source in _bearing(release, target) if (name := stated(source))}
    binding = {name for name in found if family(name) != "permissive"}
    candidates = binding or found
    return candidates.pop() if len(candidates) == 1 else ""


def bearing_licenses(release: Release, target: str) -> list[tuple[str, str]]:
    """Each licence that a model or adapter in what is published states, with their names."""
    found: dict[str, list[str]] = {}
    for source in _bearing(release, target):
        if name := stated(source):
            found.setdefault(name, []).append(source.repo or source.name)
    return [(name, listed(names)) for name, names in found.items()]


def check_license(release: Release, target: str | None = None) -> list[str]:
    """Sentences on where the licence of a release does not fit its inputs', or is missing; none when all is well.

    Only identifiers are compared; this is a reminder and no legal advice. With `target`, only what that one rests on.
    """
    problems: list[str] = []
    bearing = _bearing(release, target)
    ours = (release.license or "").strip().lower()
    if not ours:
        theirs = sorted({name for source in bearing if (name := stated(source))})
        if inherited := inherited_license(release, target):
            problems.append(
                f"The recipe names no licence; its inputs carry {inherited}. "
                f"Write `license: {inherited}` in the recipe."
            )
        elif theirs:
            problems.append(
                f"The recipe names no licence, and its inputs carry {listed(theirs)}. "
                "Write a `license` in the recipe that fits them all."
            )
        else:
            problems.append("The recipe names no licence, and neither do its inputs. Write a `license` in the recipe.")
    for source in bearing:
        if theirs_one := stated(source):
            if ours:
                problems += _compare(ours, source, theirs_one)
        elif source.repo:
            problems.append(
                f"{_name(source)} states no licence, so nobody may share what is made from it "
                "unless its owner allows it elsewhere."
            )
    problems += _among_inputs(bearing)
    for source in _training_data(release, target):
        name = stated(source)
        if name and family(name) in ("noncommercial", "noderivatives") and family(ours or "mit") != family(name):
            problems.append(
                f"{_name(source)}, on which an adapter was trained, is under {name}, which {_WHY[family(name)]}."
            )
    return problems


def _compare(ours: str, source: SourceRecord, theirs: str) -> list[str]:
    """What is wrong with publishing under `ours` something made from a source under `theirs`."""
    kind = family(theirs)
    if ours == theirs:
        return [] if kind != "noderivatives" else [f"{_name(source)} is under {theirs}, which {_WHY[kind]}."]
    if kind == "permissive":
        return []
    if kind == "copyleft" and _same_copyleft(ours, theirs):
        return []
    if kind == "noncommercial" and family(ours) == "noncommercial" and "-sa" not in theirs:
        return []
    if kind == "unsure" and ours == "other":
        return []
    return [
        f"The recipe says {ours}, but {_name(source)} is under {theirs}, which {_WHY[kind]}. "
        + (f"Write `license: {theirs}` in the recipe." if kind != "noderivatives" else "Ask its owner first.")
    ]


def _same_copyleft(ours: str, theirs: str) -> bool:
    """GPL code may go on under AGPL of the same version, and LGPL under either (GPL-3.0, section 13)."""
    allowed = {"gpl-3.0": {"agpl-3.0"}, "lgpl-3.0": {"gpl-3.0", "agpl-3.0"}, "gpl-2.0": set[str]()}
    return ours in allowed.get(theirs, set())


def _among_inputs(bearing: tuple[SourceRecord, ...]) -> list[str]:
    """Two inputs whose own terms cannot both be kept."""
    strict: dict[str, SourceRecord] = {}
    for source in bearing:
        name = stated(source)
        if name and family(name) in ("terms", "copyleft"):
            strict.setdefault(name, source)
    if len(strict) < 2:
        return []
    parts = [f"{_name(source)} ({name})" for name, source in strict.items()]
    return [f"These inputs each bind the result to terms of their own: {listed(parts)}. Check that both can be kept."]


def _bearing(release: Release, target: str | None) -> tuple[SourceRecord, ...]:
    """The models and adapters that end up in what is published, each once, in the release's order."""
    names = [target] if target else [one.name for one in release.targets]
    if not names:
        return tuple(source for source in release.sources if source.kind in ("model", "adapter", "gguf"))
    found: set[str] = set()
    for name in names:
        lineage = Lineage(release, find_target(release, name))
        # A mask holds numbers computed from a model: its licence is worth the reminder too.
        sources = lineage.sources if lineage.target.kind == "mask" else lineage.weights
        found |= {source.name for source in sources if source.kind in ("model", "adapter", "gguf")}
    return tuple(source for source in release.sources if source.name in found)


def _training_data(release: Release, target: str | None) -> tuple[SourceRecord, ...]:
    names = [target] if target else [one.name for one in release.targets]
    used: set[str] = set()
    for name in names:
        for step in Lineage(release, find_target(release, name)).steps:
            if step.section == "adapters":
                used |= {full.removeprefix("sources.") for full in step.inputs.values()}
    return tuple(source for source in release.sources if source.name in used and source.kind == "dataset")


def _name(source: SourceRecord) -> str:
    return source.repo or f"the local {source.kind} {source.name!r}"
