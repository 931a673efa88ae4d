"""`hubforge gc`: what no recipe needs any more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubforge import recipe as recipes
from hubforge.errors import LockError, RecipeError
from hubforge.lock import read_lock
from hubforge.places import default_store
from hubforge.plan import make
from hubforge.store import LocalStore


def collect_garbage(
    paths: Sequence[Path] | None, store: Path | None, *, dry_run: bool
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Remove what no given recipe needs: (removed, kept), each (what, bytes). Raises when a recipe cannot be read."""
    found = list(paths or sorted(Path("recipes").glob("*.yaml")) or sorted(Path().glob("*.yaml")))
    if not found:
        raise RecipeError("there is no recipe to keep anything for", mend="Name the recipes: hubforge gc RECIPE...")
    here = LocalStore(store or default_store(found[0]))
    needed: dict[str, str] = {}
    for path in found:
        recipe = recipes.load(path)
        try:
            plan = make(recipe, here)
        except LockError:
            if read_lock(path) is not None:
                raise
            continue  # never locked, so never run: nothing in the store is its
        needed |= {step.key: step.name for step in plan.steps.values()}
    removed, kept = [], []
    for key, _whole, size in list(here.contents()):
        if key in needed:
            kept.append((needed[key], size))
            continue
        name = here.manifest(key).name if here.has(key) else f"unfinished {key[:12]}"
        removed.append((name, size))
        if not dry_run:
            here.drop(key)
    return removed, kept
