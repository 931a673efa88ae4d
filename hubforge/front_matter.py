"""The front matter of a card that strangers wrote: read as plain data, bounded, without trust."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hubforge.errors import shown

_LIMIT = 128 << 10  # characters; PyYAML takes about a second for as much


def read_front_matter(card: str) -> Mapping[str, Any]:
    """The front matter of a card; ValueError when it has none, or none that is a YAML mapping without aliases.

    A few lines of aliases can stand for gigabytes.
    """
    import yaml

    match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t\r]*$", card, re.DOTALL | re.MULTILINE)
    if match is None:
        raise ValueError("has no front matter between two lines of ---")
    if len(match[1]) > _LIMIT:
        raise ValueError(f"has front matter of {len(match[1]):,} characters, but {_LIMIT:,} are plenty")
    try:
        front = yaml.load(match[1], plain_yaml())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"has front matter that cannot be read: {shown(' '.join(str(error).split()))}") from error
    if not isinstance(front, dict):
        raise ValueError("has front matter that is not a mapping")
    return front


def front_matter_in(folder: Path) -> Mapping[str, Any]:
    """The front matter of the README.md in a folder; empty when there is none, or none that can be taken."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as stream:
            return read_front_matter(stream.read(2 * _LIMIT))
    except (OSError, ValueError):
        return {}


@cache
def plain_yaml() -> Any:
    """A YAML loader for plain data that refuses aliases."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it uses an alias")
            return super().compose_node(parent, index)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (LookupError, AttributeError) as error:  # what PyYAML raises for `!!int ""` and `!!timestamp x`
                raise yaml.YAMLError(f"{node.value!r} is no {node.tag.rpartition(':')[2]}") from error

    return Plain
