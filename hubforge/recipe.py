"""A recipe: YAML with line marks -> typed ops and their graph. All of a recipe's errors at once, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hubforge import catalog, marks
from hubforge.complaints import closest, dotted, phrase, short
from hubforge.errors import RecipeError, RecipeErrors
from hubforge.evals._gates import Gate, GateSyntaxError, known_metrics, parse_gate
from hubforge.op import Kind, Op, Ref, Section
from hubforge.publisher import Publisher
from hubforge.release import CardText
from hubforge.sources import SourceSpec

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
KEYS = ("name", "license", "license_link", "seed", "sources", *catalog.SECTIONS[:-1], "gates", "card", "publish")

_FORMS = {"fisher": "a Fisher mask", "gate": "a gate", "layers": "a mask of layers", "subspace": "a subspace mask"}


@dataclass(frozen=True)
class Node:
    """One step: an op, what it is called, where it is written, and what each of its refs points to."""

    section: Section
    entry: str  # what others call it: "healed", "gguf/Q6_K"
    op: Op
    where: str
    inputs: Mapping[str, str] = field(default_factory=dict)  # ref as written -> "sources.x" or "stages.y"

    @property
    def name(self) -> str:
        return f"{self.section}.{self.entry}"


@dataclass(frozen=True)
class Target:
    """One entry under `publish`, and the full names of what it pushes."""

    name: str
    op: Publisher
    where: str
    entries: tuple[str, ...]


@dataclass(frozen=True)
class PlacedGate:
    gate: Gate
    text: str
    where: str


@dataclass(frozen=True)
class Recipe:
    path: Path
    text: str
    name: str
    license: str | None
    license_link: str | None
    sources: Mapping[str, SourceSpec]
    nodes: Mapping[str, Node]  # by full name, each after its inputs
    groups: Mapping[str, tuple[str, ...]]  # an entry as written -> the entries it stands for, in the order listed
    gates: tuple[PlacedGate, ...]
    card: CardText
    targets: Mapping[str, Target]
    marked: marks.Marked

    def where(self, *path: str | int) -> str:
        return self.marked.where(path)


def load(path: Path) -> Recipe:
    """The recipe in that file. Raises RecipeErrors with everything that is wrong with it, in the order of its lines."""
    return _Loader(marks.read(path), path).recipe()


def loads(text: str, name: str) -> Recipe:
    """The recipe in that text, as `load` gives it. name: what its errors call the file."""
    return _Loader(marks.parse(text, name), Path(name)).recipe()


def refs(op: BaseModel) -> Iterator[tuple[tuple[str | int, ...], Ref]]:
    """Every ref in the fields of an op, with its path in them."""

    def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Ref]]:
        if isinstance(value, Ref):
            yield path, value
        elif isinstance(value, Mapping):
            for key, child in value.items():
                yield from walk(child, (*path, key))
        elif isinstance(value, (list, tuple)):
            for index, child in enumerate(value):
                yield from walk(child, (*path, index))
        elif isinstance(value, BaseModel):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name), (*path, name))

    yield from walk(op, ())


class _Loader:
    def __init__(self, marked: marks.Marked, path: Path) -> None:
        self.marked, self.path = marked, path
        self.errors: list[RecipeError] = list(marked.errors)
        self.sources: dict[str, SourceSpec] = {}
        self.nodes: dict[str, Node] = {}  # by entry name
        self.groups: dict[str, tuple[str, ...]] = {}  # entry as written -> entry names it expands to, as listed
        self.broken: set[str] = set()  # entries that are there, but did not validate: refs to them are not errors too
        self.names: dict[str, str] = {}  # every name taken, and where

    def wrong(self, what: str, *path: str | int, mend: str = "") -> None:
        self.errors.append(RecipeError(what, where=self.marked.where(path), mend=mend))

    def recipe(self) -> Recipe:
        data = self.marked.data
        if not isinstance(data, dict):
            if not self.errors:
                self.wrong("a recipe is a mapping of keys to values", mend="`hubforge init` writes one to start from.")
            self.finish()
        if "merge_method" in data:
            mend = f"`hubforge import {self.path} my-merge.yaml` writes the recipe of it; with --run, and makes it."
            self.wrong("this is a configuration of mergekit, not a recipe", "merge_method", mend=mend)
            self.finish()
        for key in data:
            if key not in KEYS:
                self.wrong(f"there is no key {key!r} in a recipe", key, mend=closest(key, KEYS))
        name = self.plain("name", str)
        if isinstance(name, str) and not NAME.match(name):
            self.wrong(f"name is {name!r}, but may hold letters, digits, '-', '_' and '.' only", "name")
        if name is None and "name" not in data:
            self.wrong("a recipe needs a name", mend="Write `name: my-model` on its first line.")
        self.read_sources()
        for section in catalog.SECTIONS[:-1]:
            self.read_section(section)
        nodes = self.link()
        targets = self.read_targets()
        gates = tuple(self.read_gates())
        card = self.validate(CardText, data.get("card") or {}, "card")
        license_, link = self.plain("license", str), self.plain("license_link", str)
        self.plain("seed", int)
        self.finish()
        assert isinstance(name, str) and isinstance(card, CardText)
        return Recipe(
            path=self.path,
            text=self.marked.text,
            name=name,
            license=license_,
            license_link=link,
            sources=self.sources,
            nodes=nodes,
            groups=self.groups,
            gates=gates,
            card=card,
            targets=targets,
            marked=self.marked,
        )

    def finish(self) -> None:
        if self.errors:
            raise RecipeErrors(sorted(self.errors, key=_line))

    def plain(self, key: str, kind: type) -> Any:
        value = self.marked.data.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            self.wrong(f"{key} is {value!r}, but must be {'text' if kind is str else 'a whole number'}", key)
            return None
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.marked.data.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(f"{key} must be a mapping of names to entries", key, mend=f"{key}:\n    my-name: {{...}}")
            return {}
        return value

    def take(self, section: str, name: str) -> bool:
        """Reserve a name; names are shared by sources and all steps, so that a ref needs no prefix."""
        if not NAME.match(name):
            self.wrong(f"{name!r} is no name: letters, digits, '-', '_' and '.' only", section, name)
            return False
        if name in self.names:
            self.wrong(
                f"{section}.{name} has the name of {self.names[name]}", section, name, mend="Rename one of them."
            )
            return False
        self.names[name] = f"{section}.{name}"
        return True

    def validate(self, model: type[BaseModel], value: Any, *path: str | int) -> BaseModel | None:
        try:
            return model.model_validate(value)
        except ValidationError as error:
            for item in error.errors():
                self.errors.append(phrase(self.marked, model, value, path, item))
            return None

    def read_sources(self) -> None:
        for name, value in self.mapping("sources").items():
            if not self.take("sources", name):
                continue
            if not isinstance(value, dict):
                self.wrong(
                    f"sources.{name} must say what it is", "sources", name, mend=f"{name}: {{model: namespace/name}}"
                )
                self.broken.add(name)
            elif isinstance(spec := self.validate(SourceSpec, value, "sources", name), SourceSpec):
                self.sources[name] = spec
            else:
                self.broken.add(name)

    def read_op(self, section: Section, name: str, value: Any) -> Op | None:
        if not isinstance(value, dict) or not isinstance(value.get("op"), str):
            ops = ", ".join(catalog.names(section))
            self.wrong(f"{section}.{name} does not say which op it is", section, name, mend=f"Add `op:` ({ops}).")
            return None
        try:
            kind = catalog.find(section, value["op"])
        except catalog.UnknownOp as error:
            self.wrong(error.what, section, name, "op", mend=error.mend)
            return None
        fields = {key: child for key, child in value.items() if key != "op"}
        # What an entry leaves out and the recipe around it tells.
        given, known = self.marked.data, kind.model_fields
        stages = [node for node in self.nodes.values() if node.section == "stages" and node.op.makes == "model"]
        if section == "stages" and "model" in known and stages:
            fields.setdefault("model", stages[-1].entry)
        if "seed" in known and isinstance(given.get("seed"), int):
            fields.setdefault("seed", given["seed"])
        if section == "quantize" and "name" in known and isinstance(given.get("name"), str):
            fields.setdefault("name", given["name"])  # its files are called by it
        op = self.validate(kind, fields, section, name)
        return op if isinstance(op, Op) else None

    def read_section(self, section: Section) -> None:
        for name, value in self.mapping(section).items():
            if not self.take(section, name):
                continue
            op = self.read_op(section, name, value)
            if op is None:
                self.broken.add(name)
                continue
            where = self.marked.where((section, name))
            steps = op.expand(name)
            for entry, step in steps.items():
                self.nodes[entry] = Node(section, entry, step, where)
            listed = [f"{name}/{item}" for item in getattr(op, op.each)] if op.each else [name]
            self.groups[name] = tuple(entry for entry in listed if entry in steps) or tuple(steps)

    def kind_of(self, name: str) -> Kind | None:
        if name in self.sources:
            return self.sources[name].kind
        return self.nodes[name].op.makes if name in self.nodes else None

    def resolve(self, ref: Ref, path: tuple[str | int, ...], *, group: bool = False) -> list[str]:
        """The full names a ref points to; an error is recorded when there are none, or it is of another kind."""
        entries = self.groups.get(ref, ()) if group else ()
        entries = entries or ((str(ref),) if self.kind_of(ref) else ())
        if not entries:
            if ref.partition("/")[0] in self.broken:
                return []
            if ref in self.groups:
                choices = ", ".join(self.groups[ref])
                self.wrong(f"{dotted(path)}: {ref!r} stands for several steps", *path, mend=f"Name one: {choices}.")
                return []
            fitting = [name for name in (*self.sources, *self.nodes) if self.kind_of(name) in ref.kinds]
            mend = closest(ref, fitting) or f"There is no {' or '.join(ref.kinds)} in this recipe yet."
            self.wrong(f"{dotted(path)} is {str(ref)!r}, and nothing has that name", *path, mend=mend)
            return []
        if self.kind_of(entries[0]) not in ref.kinds:
            fitting = [name for name in (*self.sources, *self.nodes) if self.kind_of(name) in ref.kinds]
            wanted, is_ = " or ".join(ref.kinds), self.kind_of(entries[0])
            mend = f"Of kind {wanted} there are: {', '.join(fitting)}." if fitting else f"There is no {wanted} yet."
            self.wrong(f"{dotted(path)} is {str(ref)!r}, which is a {is_}; it must be a {wanted}", *path, mend=mend)
            return []
        return [f"sources.{name}" if name in self.sources else self.nodes[name].name for name in entries]

    def link(self) -> dict[str, Node]:
        """The nodes with their inputs, each after those it uses."""
        linked: dict[str, Node] = {}
        for node in self.nodes.values():
            inputs: dict[str, str] = {}
            for inside, ref in refs(node.op):
                path = (node.section, node.entry.partition("/")[0], *inside)
                found = self.resolve(ref, path)
                if found and inside[0] not in node.op.unkeyed:
                    inputs[str(ref)] = found[0]
                form = self.nodes[ref].op.form if ref in self.nodes else ""
                if form and (mend := node.op.misfit(str(inside[0]), form)):
                    self.wrong(f"{dotted(path)} is {str(ref)!r}, which is {_FORMS.get(form, form)}", *path, mend=mend)
            linked[node.name] = Node(node.section, node.entry, node.op, node.where, inputs)
        sorter: TopologicalSorter[str] = TopologicalSorter()
        for name, node in linked.items():
            sorter.add(name, *(value for value in node.inputs.values() if value in linked))
        try:
            sorter.prepare()
        except CycleError as error:
            circle = list(reversed(error.args[1]))
            first = linked[circle[0]]
            self.errors.append(
                RecipeError(
                    f"{' -> '.join(circle)}: each needs the next, round in a circle",
                    where=first.where,
                    mend="Let one of them use a source or an earlier stage.",
                )
            )
            return linked
        ordered: dict[str, Node] = {}

        def visit(name: str) -> None:
            """In the order of the recipe, so that evals come last, but each after its inputs."""
            if name in linked and name not in ordered:
                for needed in linked[name].inputs.values():
                    visit(needed)
                ordered[name] = linked[name]

        for name in linked:
            visit(name)
        return ordered

    def read_targets(self) -> dict[str, Target]:
        targets: dict[str, Target] = {}
        for name, value in self.mapping("publish").items():
            if not NAME.match(name):
                self.wrong(f"{name!r} is no name: letters, digits, '-', '_' and '.' only", "publish", name)
                continue
            op = self.read_op("publish", name, value)
            if not isinstance(op, Publisher):
                continue
            entries = [
                found for inside, ref in refs(op) for found in self.resolve(ref, ("publish", name, *inside), group=True)
            ]
            self.check_file_names(name, op)
            targets[name] = Target(name, op, self.marked.where(("publish", name)), tuple(dict.fromkeys(entries)))
        return targets

    def check_file_names(self, name: str, op: Publisher) -> None:
        """Masks of one form have files of the same names, and cannot share a folder."""
        first: dict[str, Ref] = {}
        for inside, ref in refs(op):
            form = self.nodes[ref].op.form if ref in self.nodes else ""
            if form and first.setdefault(form, ref) != ref:
                path = ("publish", name, *inside)
                what = f"{dotted(path)} is {str(ref)!r}, {_FORMS.get(form, form)} as {str(first[form])!r} is"
                mend = "Their files have the same names: publish each under a `folder` of its own."
                self.wrong(what, *path, mend=mend)

    def read_gates(self) -> Iterator[PlacedGate]:
        value = self.marked.data.get("gates") or []
        if not isinstance(value, list):
            self.wrong(
                "gates must be a list of lines", "gates", mend="gates:\n    - ifeval.prompt_level_strict_acc >= 0.5"
            )
            return
        evals = {node.entry.partition("/")[0] for node in self.nodes.values() if node.section == "evals"}
        for index, text in enumerate(value):
            if not isinstance(text, str):
                self.wrong(f"gates[{index}] is {short(text)}, but must be a line of text", "gates", index)
                continue
            try:
                gate = parse_gate(text)
            except GateSyntaxError as error:
                what = f"gates[{index}] cannot be read: {error.what} (column {error.column})"
                self.wrong(what, "gates", index, mend=error.mend)
                continue
            if gate.eval not in evals:
                if gate.eval not in self.broken:
                    self.wrong(
                        f"gates[{index}] names {gate.eval!r}, and no eval has that name",
                        "gates",
                        index,
                        mend=closest(gate.eval, evals) or "Add it under `evals`.",
                    )
                continue
            steps = {node.entry: node for node in self.nodes.values() if node.entry.partition("/")[0] == gate.eval}
            if gate.on is not None and f"{gate.eval}/{gate.on}" not in steps:
                models = [entry.partition("/")[2] for entry in steps]
                self.wrong(f"gates[{index}] names {gate.on!r}, which {gate.eval} is not run on", "gates", index,
                           mend=closest(gate.on, models))  # fmt: skip
                continue
            op = next(iter(steps.values())).op
            metrics = known_metrics(op)
            if metrics is not None and gate.metric not in metrics:
                self.wrong(
                    f"gates[{index}]: {gate.eval} has no metric {gate.metric!r}",
                    "gates",
                    index,
                    mend=closest(gate.metric, metrics),
                )
                continue
            if gate.uses_baseline and getattr(op, "baseline", None) is None:
                self.wrong(f"gates[{index}] speaks of the baseline, and {gate.eval} has none", "gates", index,
                           mend=f"Add `baseline:` to evals.{gate.eval}.")  # fmt: skip
                continue
            yield PlacedGate(gate, text, self.marked.where(("gates", index)))


def _line(error: RecipeError) -> int:
    """The line of `recipes/x.yaml:41`; 0 for what is wrong with the whole file."""
    line = error.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0
