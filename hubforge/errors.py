"""Every error hubforge raises on purpose, and the exit code each ends the command with.

HubforgeError            1
├── RecipeError          2   the recipe is wrong: unknown key, bad ref, wrong type, bad YAML, a gate naming no metric
│   └── RecipeErrors     2   all of a recipe's errors at once
├── LockError            3   no lock, a stale lock, or a lock that does not fit the recipe
├── SourceError          4   an input is missing, truncated, lying, gated, or not the bytes the lock names
├── StepError            5   a step failed, or a check after it
│   └── GateError        5   a gate of the recipe did not hold
├── StoreError           6   the store: no space, not writable, a damaged artifact
├── PublishError         7   the Hub refused, or what is there is not what was expected
└── VerifyError          8   what was published is not what the release file says
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


class HubforgeError(Exception):
    """What is wrong (with the value), where (`recipes/x.yaml:41`, a file, a repository), and how to mend it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = _plain(what), _plain(where), _plain(mend)
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.mend}" if self.mend else head


def _plain(text: str) -> str:
    """The text without what moves a terminal's cursor, rings or recolours: names and messages come from strangers.

    Control and format characters (Unicode Cc, Cf: ANSI sequences, right-to-left overrides) are written as escapes.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(text: str, limit: int = 200) -> str:
    """That text in a form safe to print on a terminal: no control characters, and not endless."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return text if text.isprintable() else repr(text)


class RecipeError(HubforgeError):
    exit_code = 2


class RecipeErrors(RecipeError):
    """All that is wrong with one recipe, in the order of its lines."""

    def __init__(self, errors: Sequence[RecipeError]) -> None:
        self.errors = tuple(errors)
        HubforgeError.__init__(self, "\n".join(str(error) for error in self.errors))


class LockError(HubforgeError):
    exit_code = 3


class SourceError(HubforgeError):
    exit_code = 4


class StepError(HubforgeError):
    exit_code = 5


class GateError(StepError):
    """A gate of the recipe did not hold; nothing is pushed."""


class StoreError(HubforgeError):
    exit_code = 6


class PublishError(HubforgeError):
    exit_code = 7


class VerifyError(HubforgeError):
    exit_code = 8
