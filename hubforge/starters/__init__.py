"""Commented recipes to start from, one per purpose: `hubforge init PURPOSE`."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

from hubforge.errors import RecipeError

PURPOSES = {
    "merge": "adapters merged by TIES and folded into a model",
    "two-stage": "adapters averaged and folded in under a Fisher mask, then slerped with a fine-tune",
    "masks": "Fisher and subspace masks of one model, as a folder of a mask repository",
    "gguf": "GGUF quants of a model, measured",
}


def write_starter(purpose: str, recipe: Path, *, name: str | None, force: bool) -> list[Path]:
    """Write the recipe of a purpose, and beside it the schema that its first line names; returns what was written.

    Raises RecipeError for an unknown purpose, and for a file that is there already.
    """
    if purpose not in PURPOSES:
        known = "\n  ".join(f"{key:10} {about}" for key, about in PURPOSES.items())
        raise RecipeError(f"there is no starter {purpose!r}", mend=f"There are:\n  {known}")
    if recipe.exists() and not force:
        raise RecipeError("is there already", where=str(recipe), mend="--force overwrites it.")
    title = re.sub(r"[^A-Za-z0-9_.-]+", "-", name or recipe.stem).strip("-.") or "my-model"
    text = files(__package__).joinpath(f"{purpose}.yaml").read_text(encoding="utf-8").replace("my-model", title)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(text, encoding="utf-8")
    written = [recipe]
    schema = recipe.with_name("schema.json")
    if not schema.exists():
        from hubforge.manual import recipe_schema

        schema.write_text(json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(schema)
    return written
