"""A parameter that may differ by model, module and layer: `0.2`, `[0.1, 0.5]` over the layers, `{"mlp.*": 0.3, ...}`.

As in mergekit, a list is a gradient: its values are spread evenly from the first layer to the last, with straight lines
between them, and everything outside the layers (embeddings, the final norm, the head) takes the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, Discriminator, Field, Tag

DEFAULT = "default"


def _form(value: object) -> str:
    """Which of the forms a value is meant as, so that what is wrong with it is said of that form alone."""
    return "mapping" if isinstance(value, Mapping) else "list" if isinstance(value, (list, tuple)) else "number"


def _has_default(schedule: dict[str, float | list[float]]) -> dict[str, float | list[float]]:
    if DEFAULT not in schedule:
        raise ValueError(f"needs an entry {DEFAULT!r} for the tensors that no pattern fits")
    return schedule


Number = Annotated[float, Field(allow_inf_nan=False), Tag("number")]
Gradient = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1), Tag("list")]
ByLayer = Annotated[Number | Gradient, Discriminator(_form)]
ByModule = Annotated[dict[str, ByLayer], AfterValidator(_has_default), Tag("mapping")]
Schedule = Annotated[Number | Gradient | ByModule, Discriminator(_form)]
OfEach = Annotated[list[Schedule], Field(min_length=1), Tag("list")]  # one for each model
PerModel = Annotated[Number | OfEach | ByModule, Discriminator(_form)]


def value_at(schedule: float | Sequence[float] | Mapping[str, float | list[float]], name: str, depth: float) -> float:
    """The parameter of one tensor. depth: from `depth_of`."""
    if isinstance(schedule, Mapping):
        fitting = [pattern for pattern in schedule if pattern != DEFAULT and fits(pattern, name)]
        # Not the first: keys have no order, in a recipe's identity as in JSON.
        schedule = schedule[max(fitting, key=lambda pattern: (len(pattern), pattern), default=DEFAULT)]
    if isinstance(schedule, (int, float)):
        return float(schedule)
    assert isinstance(schedule, Sequence)
    place = depth * (len(schedule) - 1)
    below = min(int(place), max(len(schedule) - 2, 0))
    above = min(below + 1, len(schedule) - 1)
    share = place - below
    return (1 - share) * schedule[below] + share * schedule[above]


def fits(pattern: str, name: str) -> bool:
    """Whether a shell pattern fits whole parts of a tensor's name, anywhere in it: `mlp.*`, `layers.3`, `q_proj`.

    Of several patterns in a schedule the longest that fits is taken.
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*") or fnmatchcase(f"{name}.", f"{pattern}.*")


def depth_of(layer: int | None, layers: int) -> float:
    """How deep in a model of so many layers one lies: 0 for the first, 1 for the last; 0 outside the layers."""
    return (layer or 0) / (layers - 1) if layers > 1 else 0.0


def values_of(schedule: object) -> Iterator[float]:
    """Every number that a schedule, or a list of one for each model, holds."""
    if isinstance(schedule, (int, float)):
        yield float(schedule)
    elif isinstance(schedule, Mapping):
        for value in schedule.values():
            yield from values_of(value)
    elif isinstance(schedule, Sequence):
        for part in schedule:
            yield from values_of(part)
