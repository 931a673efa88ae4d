"""Every op there is, by section and name: a section is a package, an op is the module of that name in it.

Another package adds ops through the entry point groups `hubforge.masks`, `hubforge.stages`, ...: the name is the op's,
the value its class.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import get_args

from hubforge.errors import HubforgeError
from hubforge.op import Op, Section

SECTIONS: tuple[Section, ...] = tuple(section for section in get_args(Section) if section != "sources")


class UnknownOp(HubforgeError):
    """There is no op of that name in that section."""

    exit_code = 2


@cache
def names(section: Section) -> dict[str, EntryPoint | None]:
    """The op names of a section, in alphabetical order; None for our own, the entry point for another package's."""
    package = importlib.import_module(f"hubforge.{section}")
    ours: dict[str, EntryPoint | None] = {
        module.name: None for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")
    }
    theirs = {point.name: point for point in entry_points(group=f"hubforge.{section}") if point.name not in ours}
    return dict(sorted((ours | theirs).items()))


@cache
def find(section: Section, name: str) -> type[Op]:
    """The class of that op. Raises UnknownOp with the closest names."""
    known = names(section)
    if name not in known:
        raise UnknownOp(f"there is no op {name!r} under {section}", mend=_suggest(section, name))
    if point := known[name]:
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Op)):
            raise UnknownOp(f"the entry point {point.value!r} of op {name!r} is not an Op")
        return loaded
    module = importlib.import_module(f"hubforge.{section}.{name}")
    ops = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Op) and value.__module__ == module.__name__
    ]
    ops = [value for value in ops if not any(other is not value and issubclass(other, value) for other in ops)]
    if len(ops) != 1:
        raise UnknownOp(f"{module.__name__} must hold exactly one op, and holds {len(ops)}")
    return ops[0]


def _suggest(section: Section, name: str) -> str:
    if close := get_close_matches(name, names(section), n=1):
        return f"Did you mean {close[0]!r}? `hubforge ops` lists them all."
    for other in SECTIONS:
        if name in names(other):
            return f"{name!r} is an op of the section {other!r}."
    return f"{section} knows: {', '.join(names(section))}. `hubforge ops` describes them."


@dataclass(frozen=True)
class Entry:
    section: Section
    name: str
    op: type[Op]


def everything() -> list[Entry]:
    """Every op, by section and then name."""
    return [Entry(section, name, find(section, name)) for section in SECTIONS for name in names(section)]


def summary(op: type[Op]) -> str:
    """The first paragraph of an op's docstring: what it makes."""
    return " ".join((op.__doc__ or "").strip().split("\n\n")[0].split())


def field_names(op: type[Op]) -> tuple[str, ...]:
    """Its own fields first, then those that every op of its kind has: the order for people."""
    own = [name for name in op.model_fields if name in vars(op).get("__annotations__", {})]
    return (*own, *(name for name in op.model_fields if name not in own))
