"""Whether a release file is at one with itself: its recipe and lock with the keys of its sources and steps.

A key says how a thing was asked for. Computed again from the recipe and the lock that the release carries, each must be
the one that the release records; a recipe, lock, field or version that was changed afterwards gives another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hubforge import __version__, recipe
from hubforge.errors import HubforgeError, LockError, shown
from hubforge.fusion import unrounded
from hubforge.lock import resolve_locked
from hubforge.plan import step_key
from hubforge.recipe import Node, Recipe
from hubforge.release import Release, SourceRecord, TargetRecord
from hubforge.sources import SourceSpec, local_key


def key_faults(release: Release) -> tuple[list[str], list[str]]:
    """What is wrong with the keys of a release, a line each; and notes on what could not be computed again.

    Ops change: what another version of hubforge made is only noted where its keys come out differently here.
    """
    if not release.steps and not release.sources:
        return [], []
    try:
        read = recipe.loads(release.recipe, release.recipe_file)
    except HubforgeError as error:
        first = shown(str(error).split("\n")[0], 300)
        if release.hubforge != __version__ or "there is no op" in str(error):
            return [], [f"made by hubforge {shown(release.hubforge)}; its recipe is not one to this version: {first}"]
        return [f"the recipe in it cannot be read: {first}"], []
    faults = [*_source_faults(read, release), *_step_faults(read, release)]
    if faults and release.hubforge != __version__:
        return [], [f"made by hubforge {shown(release.hubforge)}; its keys come out differently in {__version__}"]
    return faults, []


def _source_faults(read: Recipe, release: Release) -> Iterator[str]:
    recorded = {source.name: source for source in release.sources}
    for name in recorded.keys() | read.sources.keys():
        if name not in recorded or name not in read.sources:
            missing = "the release does not" if name not in recorded else "its recipe does not"
            yield f"the source {shown(name)}: {missing} have it"
            continue
        try:
            yield from _one_source(read.sources[name], recorded[name], release)
        except LockError as error:
            yield f"the source {shown(name)} and the lock: {shown(error.what, 300)}"


def _one_source(spec: SourceSpec, record: SourceRecord, release: Release) -> Iterator[str]:
    name = shown(record.name)
    if spec.is_local:
        if record.key != local_key(spec, record.files):
            yield f"the source {name}: its files do not give its key"
        return
    locked = resolve_locked(record.name, spec, release.lock, Path(release.recipe_file))
    if record.commit != locked.commit:
        yield f"the source {name}: commit {shown(str(record.commit))}, but the lock has {locked.commit}"
    elif record.repo != spec.value:
        yield f"the source {name}: from {shown(str(record.repo))}, but the recipe has {shown(spec.value)}"
    elif record.key != locked.key:
        yield f"the source {name}: recipe and lock do not give its key"


def _step_faults(read: Recipe, release: Release) -> Iterator[str]:
    recorded = {step.name: step for step in release.steps}
    keys = {f"sources.{source.name}": source.key for source in release.sources}
    keys |= {name: step.key for name, step in recorded.items()}
    packages = (release.lock or {}).get("packages")
    locked = {str(name): str(version) for name, version in packages.items()} if isinstance(packages, dict) else {}
    for name, node in read.nodes.items():
        step = recorded.get(name)
        if step is None:
            yield f"the step {shown(name)} is in the recipe, but not in the release"
            continue
        pins = {pin: locked.get(pin) or step.versions.get(pin, "absent") for pin in node.op.pins}
        if any(target not in keys for target in node.inputs.values()):
            yield f"the step {shown(name)} uses what the release does not have"
            continue
        key, material = step_key(node, keys, pins, unrounded(node, read.nodes))
        if step.key != key:
            yield f"the step {shown(name)}: {_why(node, material, step.fields)}"
        elif _told(material["fields"]) != _told(step.fields):
            yield f"the step {shown(name)}: its fields are not those of the recipe"
    for name in recorded.keys() - read.nodes.keys():
        yield f"the step {shown(name)} is not in the recipe"


def _why(node: Node, material: dict[str, object], fields: dict[str, object]) -> str:
    asked = material["fields"]
    assert isinstance(asked, dict)
    differ = [field for field in asked if _told(asked[field]) != _told(fields.get(field))]
    if differ:
        return f"{', '.join(differ)} in the recipe is not what it was made with, so that its key does not fit"
    return "recipe, lock and versions do not give its key"


def _told(value: object) -> object:
    """Without what is None, which a release file leaves out."""
    if isinstance(value, dict):
        return {key: _told(child) for key, child in value.items() if child is not None}
    return [_told(child) for child in value] if isinstance(value, (list, tuple)) else value


def artifact_faults(release: Release, target: TargetRecord) -> Iterator[str]:
    """Files of a target that are not, by digest, what the steps and sources that it names made."""
    listed = {file.path: file for file in target.files}
    for entry in target.entries:
        made = release.step(entry) if not entry.startswith("sources.") else release.source(entry)
        if made is None:
            yield f"{shown(entry)} is published, but the release does not say how it was made"
            continue
        for file in made.files:
            path = target.prefix + file.path
            if path not in listed:
                yield f"{shown(path)}: {shown(entry)} made it, but it is not listed"
            elif listed[path].sha256 != file.sha256:
                yield f"{shown(path)}: listed with another sha256 than {shown(entry)} made"
