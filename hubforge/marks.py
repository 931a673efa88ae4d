"""YAML read with the line of every key and value, as untrusted text: plain data only, YAML 1.2 scalars, bounded size.

YAML 1.1, PyYAML's default, reads `on:` as true, `no` as false and `1e-4` as text; recipes use all three, so the scalars
here are those of the YAML 1.2 core schema.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hubforge.errors import RecipeError

MAX_BYTES = 1 << 18  # a recipe is a page or two; a quarter of a megabyte of YAML is an accident or an attack
MAX_NODES = 50_000  # after aliases are followed: bounds the "billion laughs"
MAX_DEPTH = 40

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the implicit scalars of the YAML 1.2 core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


@dataclass
class Marked:
    """Plain data, and where each part of it stands: `lines[("stages", "healed", "t")]` is a 1-based line."""

    file: str
    text: str
    data: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    errors: list[RecipeError] = field(default_factory=list)

    def where(self, path: Path_) -> str:
        """`recipes/x.yaml:41` for that part, or for the closest part around it that is written down."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"


def read(path: Path, *, shown_as: str | None = None) -> Marked:
    """The YAML mapping in that file; its syntax errors and duplicate keys are in `.errors`.

    Raises RecipeError when the file cannot be read as text at all.
    """
    shown = shown_as or str(path)
    return parse(text_of(path, shown, missing="`hubforge init` writes a recipe."), shown)


def text_of(path: Path, shown: str, *, missing: str = "") -> str:
    """The text of a YAML file of bounded size; RecipeError about `shown` when it has none. missing: how to mend it."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError("there is no such file", where=shown, mend=missing) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=shown) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"is {len(raw)} bytes; hubforge reads at most {MAX_BYTES}", where=shown)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError("is not UTF-8 text", where=f"{shown}:{line}", mend="Save the file as UTF-8.") from error
    return text


def parse(text: str, file: str, *, line: int = 1) -> Marked:
    """The YAML mapping in that text, which begins on that line of its file."""
    marked = Marked(file, text)
    loader = None
    try:
        loader = _Loader(text)
        loader.line = line - 1
        node = loader.get_single_node()
        if node is not None:
            marked.data = _build(node, (), marked, loader, depth=0, budget=[MAX_NODES], above=())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = mark.line + 1 if mark else line
        problem = " ".join(part for part in (error.context, error.problem) if part)
        marked.errors.append(RecipeError(f"is not valid YAML: {problem}", where=f"{file}:{found}", mend=_hint(problem)))
    except yaml.YAMLError as error:
        found = text[: getattr(error, "position", 0) or 0].count("\n") + line
        marked.errors.append(RecipeError(f"is not valid YAML: {_one_line(error)}", where=f"{file}:{found}"))
    except RecursionError:
        marked.errors.append(RecipeError(f"is nested more than {MAX_DEPTH} deep", where=file))
    finally:
        if loader is not None:
            loader.dispose()
    return marked


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _hint(problem: str) -> str:
    if "'\\t'" in problem:
        return "YAML is indented with spaces, never tabs."
    if "mapping values are not allowed" in problem:
        return "A value with ': ' in it needs quotes."
    if "found undefined alias" in problem:
        return "A value that starts with * needs quotes."
    return ""


def _build(
    node: yaml.Node,
    path: Path_,
    marked: Marked,
    loader: _Loader,
    *,
    depth: int,
    budget: list[int],
    above: tuple[int, ...],
) -> Any:
    """The plain value of a node; records its line, and the duplicate keys below it."""
    line = node.start_mark.line + 1
    marked.lines.setdefault(path, line)
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH or id(node) in above:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MAX_NODES} values or {MAX_DEPTH} levels once aliases are followed",
            problem_mark=node.start_mark,
        )
    above = (*above, id(node))
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is not plain data", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            here = f"{marked.file}:{key_node.start_mark.line + 1}"
            if not isinstance(key, str) or not isinstance(key, Hashable):
                marked.errors.append(RecipeError("a key must be plain text", where=here))
                continue
            if key in result:
                first = marked.lines[(*path, key)]
                marked.errors.append(
                    RecipeError(
                        f"{'.'.join(map(str, (*path, key)))} is written twice (first on line {first})",
                        where=here,
                        mend="YAML would silently keep the last: remove or rename one.",
                    )
                )
                continue
            marked.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = _build(value_node, (*path, key), marked, loader, depth=depth + 1, budget=budget, above=above)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(child, (*path, index), marked, loader, depth=depth + 1, budget=budget, above=above)
            for index, child in enumerate(node.value)
        ]
    return _scalar(node, loader)


def _scalar(node: yaml.Node, loader: _Loader) -> Any:
    text = str(node.value)
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "str":
        return text
    if kind not in ("int", "float", "bool", "null"):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is not plain data", problem_mark=node.start_mark)
    implied = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    if implied != node.tag:  # The tag was written out: `!!int many`.
        raise yaml.MarkedYAMLError(problem=f"{text!r} is no {kind}", problem_mark=node.start_mark)
    if kind == "int":
        sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.lstrip("+"))
        base = {"0x": 16, "0o": 8}.get(digits[:2].lower(), 10)
        if len(digits) > 4000:  # Python refuses longer ones with a ValueError
            raise yaml.MarkedYAMLError(problem="a number of thousands of digits", problem_mark=node.start_mark)
        return sign * int(digits[2:] if base != 10 else digits, base)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "bool":
        return text.lower() == "true"
    return None
