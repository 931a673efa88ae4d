"""What happens during a run, as data; and the reporters that show it: a terminal, GitHub Actions, JSON lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something that happened to the step of that name ("" for the whole run)."""

    step: str


@dataclass(frozen=True)
class Started(Event):
    reason: str  # why it is made: "new", "density 0.2 -> 0.3", "resumed"
    number: int = 0  # 1-based, of `count`
    count: int = 0


@dataclass(frozen=True)
class Cached(Event):
    key: str


@dataclass(frozen=True)
class Finished(Event):
    seconds: float
    summary: str = ""


@dataclass(frozen=True)
class Failed(Event):
    what: str


@dataclass(frozen=True)
class Progress(Event):
    """How far a step is: `done` of `total`. Where `what` is one of several (a file), `part` of it is `part_done`."""

    what: str
    done: float
    total: float | None
    unit: str
    part_done: float | None = None
    part_total: float | None = None
    rate: float | None = None  # units a second, lately


@dataclass(frozen=True)
class Note(Event):
    text: str


@dataclass(frozen=True)
class Warned(Event):
    text: str
    where: str = ""  # `recipes/x.yaml:41`

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """A reporter that shows nothing."""
