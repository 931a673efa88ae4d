"""The chat template of a merge's output: its base's, a text of the recipe, or the one that most models have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hubforge.op import Context, TensorOp
from hubforge.tensors.inputs import refs_of
from hubforge.tensors.reader import read_json

FILE = "chat_template.jinja"


def template_of(folder: Path) -> str | None:
    """The template in a model's folder, the one named `default` of several; None without one.

    chat_template.jinja counts before what older files hold, as in Transformers.
    """
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        held = read_json(folder / name) if (folder / name).is_file() else None
        found = held.get("chat_template") if isinstance(held, dict) else None
        if isinstance(found, list):
            named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
            found = named[0].get("template") if named else None
        if found and isinstance(found, str):
            return found
    return None


def most_common(templates: Iterable[str | None]) -> str | None:
    """The template that most have, without space around it, as mergekit counts; of several the first."""
    found = Counter(template.strip() for template in templates if template and template.strip())
    return found.most_common(1)[0][0] if found else None


def chosen_template(op: TensorOp, ctx: Context) -> str | None:
    """The template that is to stand in place of the one beside the output's tokenizer; None where that one stays."""
    inner = ctx.fused.get(op.base_ref)
    found = op.chat_template
    if found == "auto":
        refs = dict.fromkeys([op.base_ref, *map(str, refs_of(op))])
        found = most_common(_in_effect(ref, ctx) for ref in refs if _is_model(ref, ctx))
    return found or (chosen_template(inner.op, inner.ctx) if inner else None)


def _is_model(ref: str, ctx: Context) -> bool:
    return ref in ctx.fused or ctx.inputs[ref].kind == "model"


def _in_effect(ref: str, ctx: Context) -> str | None:
    """The template of a model that may exist only in this pass."""
    if ref not in ctx.fused:
        return template_of(ctx.inputs[ref].path)
    inner = ctx.fused[ref]
    return chosen_template(inner.op, inner.ctx) or _in_effect(inner.op.base_ref, inner.ctx)
