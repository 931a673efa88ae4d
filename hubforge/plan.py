"""The plan: what a recipe stands for, as data. Each step with its key, whether it is made, and why not.

Step key = H(op, version, fields with each ref replaced by the key it points to, versions of `pins`). Every key is known
before anything runs; names, comments, key order and line numbers are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hubforge.errors import HubforgeError, RecipeError
from hubforge.fusion import places, unrounded
from hubforge.lock import read_lock, resolve_locked
from hubforge.op import Kind, Op, Ref
from hubforge.recipe import Node, Recipe
from hubforge.sources import HashCache, Source, digest, package_versions, resolve_local
from hubforge.store import LocalStore

Status = Literal["cached", "resume", "make", "fused"]


@dataclass(frozen=True)
class Step:
    """One step of a plan. material: all that the key is made of, kept so that a later plan can say what changed."""

    node: Node
    key: str
    material: Mapping[str, Any]
    status: Status
    reason: str
    unrounded: Mapping[str, str] = field(default_factory=dict)  # ref -> step whose output is computed in this pass
    stored: str = ""  # of a merge: why its output is stored
    fused_into: tuple[str, ...] = ()  # status fused: the stored steps in whose passes it is computed

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def op(self) -> Op:
        return self.node.op


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    store: LocalStore
    sources: Mapping[str, Source]  # by name
    steps: Mapping[str, Step]  # by full name, each after its inputs
    lock: dict[str, Any] | None

    def to_make(self) -> list[Step]:
        return [step for step in self.steps.values() if step.status not in ("cached", "fused")]

    def kind(self, name: str) -> Kind:
        """What the source or step of that full name is."""
        section, _, entry = name.partition(".")
        return self.sources[entry].kind if section == "sources" else self.steps[name].op.makes

    def only(self, names: list[str]) -> Plan:
        """This plan, with just the steps of those names (full or entry names) and what they need."""
        wanted: set[str] = set()
        asked = [self.find(name) for name in names]
        todo = list(asked)
        while todo:
            name = todo.pop()
            if name not in wanted and name in self.steps:
                wanted.add(name)
                todo += self.steps[name].node.inputs.values()
        steps = {name: step for name, step in self.steps.items() if name in wanted}
        return Plan(self.recipe, self.store, self.sources, _placed(steps, self.store, asked), self.lock)

    def find(self, name: str) -> str:
        """The full name of a step given as "stages.healed" or "healed"; RecipeError when there is none."""
        if name in self.steps:
            return name
        for step in self.steps.values():
            if step.node.entry == name:
                return step.name
        from difflib import get_close_matches

        names = [*self.steps, *(step.node.entry for step in self.steps.values())]
        close = get_close_matches(name, names, n=1)
        mend = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(self.steps)}."
        raise RecipeError(f"there is no step {name!r}", where=str(self.recipe.path), mend=mend)


def make(recipe: Recipe, store: LocalStore) -> Plan:
    """The plan of a recipe against a store. Asks no network.

    Raises what is wrong with the sources, all at once when several are: LockError for a Hub source that the lock does
    not pin, SourceError for a local one that is not there.
    """
    lock = read_lock(recipe.path)
    sources = resolve_sources(recipe, store, lock)
    # The lock's versions where it has them: a machine that only renders cards finds the same keys without torch.
    locked = {str(name): str(version) for name, version in ((lock or {}).get("packages") or {}).items()}
    pins = package_versions(pinned(recipe)) | {name: locked[name] for name in pinned(recipe) if name in locked}
    history = store.history(recipe.name)
    keys = {f"sources.{name}": source.key for name, source in sources.items()}
    steps: dict[str, Step] = {}
    for name, node in recipe.nodes.items():
        op = node.op
        taken = unrounded(node, recipe.nodes)
        key, material = step_key(node, keys, pins, taken)
        keys[name] = key
        status = _status(store, key, op)
        reason = "" if status == "cached" else _reason(material, history.get(name), node, steps)
        if status == "resume":
            reason = f"was interrupted; {reason}" if reason != "new" else "was interrupted"
        steps[name] = Step(node, key, material, status, reason, taken)
    published = [entry for target in recipe.targets.values() for entry in target.entries]
    return Plan(recipe, store, sources, _placed(steps, store, published), lock)


def _status(store: LocalStore, key: str, op: Op) -> Status:
    return "cached" if store.has(key) else "resume" if op.resumable and store.has_part(key) else "make"


def _placed(steps: Mapping[str, Step], store: LocalStore, kept: Iterable[str]) -> dict[str, Step]:
    """The steps, with those that exist only in the passes of others marked as fused. kept: whose files are wanted."""
    stored = places({name: step.node for name, step in steps.items()}, kept)
    into: dict[str, list[str]] = {}
    for name in steps:
        if stored.get(name):
            todo = list(steps[name].unrounded.values())
            while todo:
                inner = todo.pop()
                if name not in into.setdefault(inner, []):
                    into[inner].append(name)
                    todo += steps[inner].unrounded.values()
    found = {}
    for name, step in steps.items():
        if name in stored and not stored[name]:
            found[name] = replace(step, status="fused", stored="", fused_into=tuple(into[name]))
        else:
            status = _status(store, step.key, step.op)
            found[name] = replace(step, status=status, stored=stored.get(name, ""), fused_into=())
    return found


def step_key(
    node: Node, keys: Mapping[str, str], pins: Mapping[str, str], taken: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """The key of a step, and all that it is made of.

    keys: by full name, of what it uses; pins: versions by package; taken: what it takes unrounded (`fusion.unrounded`).
    """
    op = node.op
    inputs = {ref: keys[target] for ref, target in node.inputs.items()}
    fields = {each: _plain(getattr(op, each)) for each in type(op).model_fields if each not in op.unkeyed}
    material = {
        "op": op_name(node),
        "version": op.version,
        "fields": fields,
        "inputs": inputs,
        "pins": {pin: pins[pin] for pin in op.pins},
    }
    if taken:
        material["unrounded"] = sorted(taken)
    # A ref's name is only how the recipe speaks of it: in the key stands what it points to.
    keyed = {each: _plain(getattr(op, each), inputs) for each in fields}
    exact = {"unrounded": sorted(inputs[ref] for ref in taken)} if taken else {}
    return digest({**material, "fields": keyed, "inputs": None, **exact}), material


def pinned(recipe: Recipe) -> set[str]:
    """The packages whose versions are part of some step's key."""
    return {pin for node in recipe.nodes.values() for pin in node.op.pins}


def resolve_sources(recipe: Recipe, store: LocalStore, lock: dict[str, Any] | None) -> dict[str, Source]:
    """Every source of a recipe, with its key."""
    hashes = HashCache(store.root / "hashes.json")
    found: dict[str, Source] = {}
    errors: list[HubforgeError] = []
    for name, spec in recipe.sources.items():
        where = recipe.where("sources", name)
        try:
            if spec.is_local:
                found[name] = resolve_local(name, spec, recipe.path.parent, hashes, where)
            else:
                found[name] = resolve_locked(name, spec, lock, recipe.path, where)
        except HubforgeError as error:
            errors.append(error)
    hashes.save()
    if len(errors) == 1:
        raise errors[0]
    if errors:
        first = errors[0]
        lines = [
            # What mends the next one too is said there, not with each of them.
            str(HubforgeError(error.what, where=error.where, mend="" if error.mend == after else error.mend))
            for error, after in zip(errors, [*(error.mend for error in errors[1:]), ""], strict=True)
        ]
        raise type(first)("\n".join(lines))
    return found


def op_name(node: Node) -> str:
    """ "stages.slerp": the section and the op's module."""
    return f"{node.section}.{type(node.op).__module__.rpartition('.')[2]}"


def _plain(value: Any, inputs: Mapping[str, str] | None = None) -> Any:
    """A field as JSON; with `inputs`, each ref as the key it points to."""
    if isinstance(value, Ref):
        return {"key": inputs[str(value)]} if inputs is not None else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(child, inputs) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child, inputs) for child in value]
    if hasattr(value, "model_dump"):
        return {name: _plain(getattr(value, name), inputs) for name in type(value).model_fields}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _reason(now: Mapping[str, Any], before: Mapping[str, Any] | None, node: Node, steps: Mapping[str, Step]) -> str:
    """Why a step is to be made: what differs from what it was last made from."""
    if not before:
        return "new"
    if before.get("op") != now["op"]:
        return f"op {before.get('op')} -> {now['op']}"
    reasons = []
    old_fields = before.get("fields", {})
    for name in {**now["fields"], **old_fields}:
        old, new = old_fields.get(name), now["fields"].get(name)
        if old != new:
            reasons.append(f"{name} {_show(old)} -> {_show(new)}")
    old_inputs = before.get("inputs", {})
    for ref, key in now["inputs"].items():
        if ref in old_inputs and old_inputs[ref] != key:
            target = node.inputs[ref]
            remade = target in steps and steps[target].status != "cached" and ref not in now.get("unrounded", ())
            reasons.append(f"{ref} is remade" if remade else f"{ref} has changed")
    if before.get("unrounded", []) != now.get("unrounded", []):
        taken = ", ".join(now.get("unrounded", [])) or "nothing"
        reasons.append(f"{taken} is computed in its pass")
    if before.get("version") != now["version"]:
        reasons.append("the op itself has changed")
    for pin, version in now["pins"].items():
        if before.get("pins", {}).get(pin) != version:
            reasons.append(f"{pin} {before.get('pins', {}).get(pin)} -> {version}")
    return ", ".join(reasons) or "it is no longer in the store"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
