"""Four numbers of a text's style, by their published definitions; where those leave something open, we say what we do.

Tokens are words as they stand in the text, lower-cased, a curly apostrophe made straight: "don't" is one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

LISTS = Path(__file__).parent / "data" / "slop"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_QUOTED = re.compile(r"\"[^\"\n]+\"|“[^”\n]+”")
_NEAR = 5  # words between a quotation and the verb that attributes it
_SPEECH = re.compile(
    r"said|says?|told|tells?|began|begins?|cried|cries|cry|replied|replies|reply|"
    r"(?:add|admit|admitt|agre|agree|announce?|answer|ask|beg|begg|breathe?|call|continue?|croak|declare?|demand|exclaim|"
    r"explain|growl|grumble?|hiss|insist|interrupt|joke?|laugh|mumble?|murmur|mutter|observe?|offer|plead|promise?|"
    r"protest|remark|repeat|respond|return|scream|shout|sigh|snap|snapp|stammer|suggest|tease?|warn|whisper|wonder|yell)"
    r"(?:s|ed)?"
)
# metric -> (unit, higher is better, what it means)
METRICS: dict[str, tuple[str, bool | None, str]] = {
    "slop": ("per 1k words", False, "Over-used words and phrases of language models, per 1000 words of text."),
    "rep3g": ("per 1k words", False, "Three-word sequences that come back in the same text, per 1000 words of text."),
    "dialogue_frac": ("share", None, "Share of lines with a quotation and a word such as 'said' near it."),
    "word_count": ("words", None, "Length of a text."),
}


def measure(text: str, slop: Mapping[str, Sequence[tuple[str, ...]]]) -> dict[str, float]:
    """The four numbers of one text; all zero for an empty one. slop: as `slop_list` gives it."""
    found = words(text)
    per_thousand = 1000 / len(found) if found else 0.0
    return {
        "slop": slop_hits(found, slop) * per_thousand,
        "rep3g": repeated_trigrams(found) * per_thousand,
        "dialogue_frac": dialogue_share(text),
        "word_count": float(len(found)),
    }


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def repeated_trigrams(tokens: Sequence[str]) -> int:
    """The occurrences of all three-word sequences that occur twice or more."""
    counts = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return sum(count for count in counts.values() if count > 1)


def slop_hits(tokens: Sequence[str], slop: Mapping[str, Sequence[tuple[str, ...]]]) -> int:
    """How many listed words and phrases the text has, read from left to right, the longest first, none overlapping."""
    hits = position = 0
    while position < len(tokens):
        for phrase in slop.get(tokens[position], ()):
            if tuple(tokens[position : position + len(phrase)]) == phrase:
                hits += 1
                position += len(phrase)
                break
        else:
            position += 1
    return hits


def dialogue_share(text: str) -> float:
    """Share of the lines, blank ones not counted, that hold speech: a quotation with a verb of saying near it.

    Near is within five words before or after the quotation marks, outside them.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(map(_is_speech, lines)) / len(lines) if lines else 0.0


def _is_speech(line: str) -> bool:
    return any(
        _SPEECH.fullmatch(word)
        for quoted in _QUOTED.finditer(line)
        for word in words(line[: quoted.start()])[-_NEAR:] + words(line[quoted.end() :])[:_NEAR]
    )


@cache
def slop_list(more: tuple[str, ...] = ()) -> dict[str, list[tuple[str, ...]]]:
    """The published phrases and words, and `more`, by their first word, longest first."""
    phrases = json.loads((LISTS / "antislop_slop_phrases_2025-04-07.json").read_text(encoding="utf-8"))
    single = json.loads((LISTS / "slop_score_words.json").read_text(encoding="utf-8"))
    return by_first_word([*(entry[0] for entry in phrases), *(entry[0] for entry in single), *more])


def by_first_word(phrases: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for phrase in sorted({tuple(words(phrase)) for phrase in phrases} - {()}, key=lambda one: (-len(one), one)):
        found.setdefault(phrase[0], []).append(phrase)
    return found
