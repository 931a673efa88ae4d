"""The manual, from the code: what every op is and takes (`hubforge ops`), and the JSON Schema of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hubforge import catalog
from hubforge.op import Op
from hubforge.release import CardText
from hubforge.sources import SourceSpec

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
_ABOUT = {
    "masks": "What is extracted from models: importance, protected subspaces.",
    "adapters": "Adapters trained here.",
    "stages": "Merge stages, each by name; `model` is by default the stage just before.",
    "quantize": "GGUF files made of a model, one step per type.",
    "evals": "What is measured, one step per model in `on`.",
    "publish": "What is pushed where: one entry per repository or folder.",
}


def describe(entry: catalog.Entry) -> dict[str, Any]:
    """One op as data: summary, what it makes, formula, source, and each field with type, default and meaning."""
    op = entry.op
    schema = op.model_json_schema()
    required = set(schema.get("required", ()))
    fields = []
    properties = schema.get("properties", {})
    for name in catalog.field_names(op):
        field = properties[name]
        fields.append(
            {
                "name": name,
                "type": type_name(field, schema.get("$defs", {})),
                "required": name in required,
                "default": field.get("default"),
                "description": " ".join(field.get("description", "").split()),
            }
        )
    return {
        "op": entry.name,
        "section": entry.section,
        "summary": catalog.summary(op),
        "about": "\n\n".join(" ".join(part.split()) for part in (op.__doc__ or "").strip().split("\n\n")),
        "makes": op.makes,
        "exact": op.exact,
        "formula": op.formula,
        "source": op.source,
        "extra": op.extra,
        "fields": fields,
    }


def type_name(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A field's type in words: "number in (0, 1]", "list of adapter", "minmax | log"."""
    if "$ref" in field:
        field = definitions.get(field["$ref"].rpartition("/")[2], {}) | {k: v for k, v in field.items() if k != "$ref"}
    if "x-kinds" in field:
        return " or ".join(field["x-kinds"])
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if options := field.get("anyOf") or field.get("oneOf"):
        kinds = [type_name(option, definitions) for option in options]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    kind = field.get("type", "anything")
    if kind == "array":
        return f"list of {type_name(field.get('items', {}), definitions)}"
    if kind == "object":
        return "mapping"
    if kind in ("number", "integer"):
        return f"{'whole number' if kind == 'integer' else 'number'}{_range(field)}"
    return {"string": "text", "boolean": "true or false"}.get(str(kind), str(kind))


def _range(field: dict[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    if (low, high, above, below) == (None, None, None, None):
        return ""
    if high is None and below is None:
        return f" >= {low:g}" if low is not None else f" > {above:g}"
    if low is None and above is None:
        return f" <= {high:g}" if high is not None else f" < {below:g}"
    left = f"[{low:g}" if low is not None else f"({above:g}"
    right = f"{high:g}]" if high is not None else f"{below:g})"
    return f" in {left}, {right}"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors: every op of every section with its fields and their meaning."""
    models: list[type[BaseModel]] = [SourceSpec, CardText, *(entry.op for entry in catalog.everything())]
    keys, definitions = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    defs: dict[str, Any] = dict(definitions.get("$defs", {}))
    where = {model: keys[(model, "validation")]["$ref"].rpartition("/")[2] for model in models}
    sections: dict[str, Any] = {}
    for section in catalog.SECTIONS:
        options = []
        for name in catalog.names(section):
            op = catalog.find(section, name)
            title = f"{section}.{name}"
            defs[title] = _with_op(defs[where[op]], name, op, section)
            options.append({"$ref": f"#/$defs/{title}"})
        sections[section] = {
            "type": "object",
            "description": _ABOUT[section],
            "additionalProperties": {
                "type": "object",
                "required": ["op"],
                "properties": {"op": {"enum": list(catalog.names(section))}},
                "oneOf": options,
            }
            if options
            else False,
        }
    for op in {entry.op for entry in catalog.everything()}:
        defs.pop(where[op], None)
    used = _used(defs, sections) | {where[SourceSpec], where[CardText]}
    return {
        "$schema": SCHEMA_ID,
        "title": "hubforge recipe",
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {
            "name": {
                "type": "string",
                "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
                "description": "Of the release.",
            },
            "license": {"type": "string", "description": "Licence of what is published, as the Hub spells it."},
            "license_link": {"type": "string", "description": "Where the licence can be read, when it is `other`."},
            "seed": {"type": "integer", "description": "Seed of every step that does not set its own."},
            "sources": {
                "type": "object",
                "description": "Inputs by name: Hub repositories, or local folders and files relative to the recipe.",
                "additionalProperties": {"$ref": f"#/$defs/{where[SourceSpec]}"},
            },
            **sections,
            "gates": {
                "type": "array",
                "items": {"type": "string"},
                "description": "What must hold before anything is pushed: `eval.metric >= baseline - 0.02`.",
            },
            "card": {"$ref": f"#/$defs/{where[CardText]}"},
        },
        "$defs": {
            name: defs[name] for name in sorted(defs) if name in used or name in (where[SourceSpec], where[CardText])
        },
    }


def _with_op(schema: dict[str, Any], name: str, op: type[Op], section: str) -> dict[str, Any]:
    required = [field for field in schema.get("required", []) if not (section == "stages" and field == "model")]
    return {
        **schema,
        "title": name,
        "description": catalog.summary(op),
        "properties": {"op": {"const": name, "description": catalog.summary(op)}, **schema.get("properties", {})},
        "required": ["op", *required],
    }


def _used(defs: dict[str, Any], roots: Any) -> set[str]:
    """Names of the definitions that are reachable from the sections."""
    found: set[str] = set()
    todo = [roots]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            ref = value.get("$ref")
            if isinstance(ref, str) and (name := ref.rpartition("/")[2]) in defs and name not in found:
                found.add(name)
                todo.append(defs[name])
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return found
