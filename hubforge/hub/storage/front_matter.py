"""The YAML block at the head of a card: read without trust, and checked as the Hub checks it."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any, Final

import yaml

from hubforge.hub.refusal import Refusal

_BLOCK: Final = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPO: Final = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_MAX_NODES: Final = 50_000  # Counted with every alias written out.
_MAX_BLOCK: Final = 256 << 10  # PyYAML reads some 100 KiB a second.


class BadFrontMatter(ValueError):
    """One sentence on what is wrong, with the line where YAML knows it."""


@dataclass(frozen=True)
class Card:
    """A README: its metadata, the text below it, and whether there was a block at all."""

    data: dict[str, Any]
    body: str
    has_block: bool


class _Loader(yaml.SafeLoader):
    """YAML as the Hub takes it: no key twice, and aliases may not multiply into millions of nodes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > 64:
            raise BadFrontMatter("nested more than 64 deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                # A dozen lines of them, each naming the one before twice, take hours to flatten.
                raise BadFrontMatter(f"merge keys (<<) are not taken ({key.start_mark.line + 2})")
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise BadFrontMatter(f"duplicated mapping key {key.value!r} ({key.start_mark.line + 2})")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_card(text: str) -> Card:
    """Split and read a card; BadFrontMatter when its YAML cannot be taken."""
    match = _BLOCK.match(text)
    if not match:
        return Card({}, text, has_block=False)
    block = match.group(1)
    if len(block) > _MAX_BLOCK:
        raise BadFrontMatter(f"the YAML block is larger than {_MAX_BLOCK >> 10} KiB")
    loader = None
    try:
        loader = _Loader(block)
        data = loader.get_single_data()
        _count(data)
        plain = _plain(data)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" ({mark.line + 2}:{mark.column + 1})" if mark else ""
        raise BadFrontMatter(f"{getattr(error, 'problem', None) or error}{where}") from error
    except (LookupError, AttributeError) as error:  # what PyYAML raises for `!!int ""` and `!!timestamp x`
        raise BadFrontMatter("a value is not of the type that its tag names") from error
    except (RecursionError, OverflowError, ValueError, TypeError) as error:
        raise BadFrontMatter(str(error) or type(error).__name__) from error
    finally:
        if loader is not None:
            loader.dispose()
    if plain is None:
        return Card({}, text[match.end() :], has_block=True)
    if not isinstance(plain, dict):
        raise BadFrontMatter("the YAML block must be a mapping")
    return Card(plain, text[match.end() :], has_block=True)


def _count(value: object) -> int:
    """Nodes of a value with every alias written out; refuses too many, and what holds itself."""
    known: dict[int, int] = {}
    open_: set[int] = set()

    def count(node: object) -> int:
        if not isinstance(node, dict | list | set | tuple):
            return 1
        if id(node) in known:
            return known[id(node)]
        if id(node) in open_:
            raise BadFrontMatter("a value that contains itself")
        open_.add(id(node))
        inside = [*node.keys(), *node.values()] if isinstance(node, dict) else list(node)
        total = 1 + sum(count(each) for each in inside)
        if total > _MAX_NODES:
            raise BadFrontMatter(f"more than {_MAX_NODES} values once its aliases are written out")
        open_.discard(id(node))
        known[id(node)] = total
        return total

    return count(value)


def _plain(value: object) -> Any:
    """The value as JSON can hold it: dates as text, keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def check_front_matter(text: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a card's metadata, in sentences like the Hub's."""
    try:
        card = read_card(text)
    except BadFrontMatter as error:
        return [f"Invalid YAML in README.md: {error}"], []
    if not card.data:
        return [], ["empty or missing yaml metadata in repo card"]
    return _Checker(card.data).run()


def check_card(data: bytes) -> None:
    """Refuse a README.md whose metadata the Hub would not take."""
    errors, _ = check_front_matter(data.decode("utf-8", "replace"))
    if errors:
        raise Refusal(400, "Invalid metadata in README.md.\n" + "\n".join(f"- {error}" for error in errors))


class _Checker:
    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def run(self) -> tuple[list[str], list[str]]:
        for key in ("license", "pipeline_tag", "library_name", "license_name", "base_model_relation", "new_version"):
            if key in self.data and not isinstance(self.data[key], str | list if key == "license" else str):
                self.errors.append(f'"{key}" must be a string')
        for key in ("tags", "language", "license", "datasets", "metrics", "base_model"):
            self._strings(key)
        for key in ("base_model", "datasets"):
            for value in self._list(key):
                if isinstance(value, str) and not _REPO.fullmatch(value):
                    what = "model id from https://hf.co/models" if key == "base_model" else "dataset id"
                    self.errors.append(f'"{key}" with value "{value}" is not valid. Use a {what}.')
        for value in self._list("language"):
            if isinstance(value, str) and not re.fullmatch(r"[a-z]{2,8}(-[A-Za-z0-9]{2,8})*|multilingual|code", value):
                self.warnings.append(f'"language" with value "{value}" is not an ISO 639 code.')
        if self.data.get("license") == "other" and not self.data.get("license_name"):
            self.warnings.append('"license_name" is missing although "license" is "other".')
        if "license" not in self.data:
            self.warnings.append('"license" is missing.')
        self._model_index()
        return self.errors, self.warnings

    def _list(self, key: str) -> list[Any]:
        value = self.data.get(key)
        return value if isinstance(value, list) else [] if value is None else [value]

    def _strings(self, key: str) -> None:
        value = self.data.get(key)
        if value is None:
            return
        if isinstance(value, bool) and key == "language":
            self.errors.append('"language" is a boolean: write "no" (Norwegian) in quotes')
        elif not isinstance(value, str | list) or any(not isinstance(each, str) for each in self._list(key)):
            self.errors.append(f'"{key}" must be a string or a list of strings')

    def _model_index(self) -> None:
        index = self.data.get("model-index")
        if index is None:
            return
        if not isinstance(index, list):
            self.errors.append('"model-index" must be an array')
            return
        for i, model in enumerate(index):
            where = f'"model-index[{i}]'
            if not isinstance(model, dict) or not isinstance(model.get("name"), str):
                self.errors.append(f'{where}.name" is required and must be a string')
                continue
            results = model.get("results")
            if not isinstance(results, list):
                self.errors.append(f'{where}.results" is required and must be an array')
                continue
            for j, result in enumerate(results):
                self._result(f"{where}.results[{j}]", result)

    def _result(self, where: str, result: Any) -> None:
        if not isinstance(result, dict):
            self.errors.append(f'{where}" must be an object')
            return
        for key, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
            part = result.get(key)
            for name in needed:
                if not isinstance(part, dict) or not isinstance(part.get(name), str):
                    self.errors.append(f'{where}.{key}.{name}" is required and must be a string')
        metrics = result.get("metrics")
        if not isinstance(metrics, list):
            self.errors.append(f'{where}.metrics" is required and must be an array')
            return
        for k, metric in enumerate(metrics):
            if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or "value" not in metric:
                self.errors.append(f'{where}.metrics[{k}]" needs "type" and "value"')
