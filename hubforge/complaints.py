"""What is wrong with a recipe, in the recipe's own words."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from hubforge.errors import RecipeError
from hubforge.marks import Marked


def phrase(marked: Marked, model: type[BaseModel], data: Any, path: tuple[str | int, ...], item: Any) -> RecipeError:
    """One pydantic complaint as a sentence about the recipe."""
    inside: list[str | int] = []
    for part in item["loc"]:  # the names of union members are in it too: keep what is in the data
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if item["type"] == "missing" and part == item["loc"][-1]:
                break
            continue
        inside.append(part)
    place = dotted((*path, *inside))
    where = marked.where((*path, *inside))
    known = model.model_fields
    about = known[str(item["loc"][0])].description or "" if item["loc"] and item["loc"][0] in known else ""
    if item["type"] == "missing":
        return RecipeError(f"{place} needs {item['loc'][-1]!r}", where=where, mend=about)
    if item["type"] == "extra_forbidden":
        mend = closest(str(item["loc"][-1]), known) if len(item["loc"]) == 1 else ""
        return RecipeError(f"{dotted(path)} has no field {item['loc'][-1]!r}", where=where, mend=mend)
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if message.startswith("Input should be "):
        must = message.removeprefix("Input should be ").removeprefix("a valid ")
        return RecipeError(f"{place} is {short(item['input'])}, but must be {must}", where=where, mend=about)
    return RecipeError(f"{place}: {message}", where=where, mend=about)


def closest(word: str, known: Any) -> str:
    """ "Did you mean ...?", else all there are when they are few."""
    known = [str(name) for name in known]
    if close := get_close_matches(str(word), known, n=1):
        return f"Did you mean {close[0]!r}?"
    return f"There are: {', '.join(known)}." if 0 < len(known) <= 20 else ""


def dotted(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
