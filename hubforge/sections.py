"""The parts of a card: what hubforge writes, between marks, and what people write around it.

A mark is an HTML comment on a line of its own, which no renderer shows:

    <!-- hubforge:results 3f9a1c2b40d7 -->
    ## Results
    ...
    <!-- /hubforge:results -->

The digest in it is that of the section as it was written, so that a section that somebody edited is told from one that
nobody did, without anything else to compare with. `by hand` in its place says that people keep that section
themselves; `<!-- hubforge by hand -->` says so of the whole card, and `<!-- hubforge:front-matter by hand: tags -->`
of keys of its front matter. Everything outside the marks is people's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BY_HAND = "by hand"
HINT = "<!-- hubforge writes what lies between its marks; what you write outside of them stays. -->"
WHOLE_BY_HAND = "<!-- hubforge by hand -->"

_DIGITS = 12  # of the digest in a mark: it tells edits from none, and vouches for nothing
_START = re.compile(r"<!-- hubforge:([a-z0-9][a-z0-9-]{0,60}) ([0-9a-f]{12}|by hand) -->[ \t]*")
_END = re.compile(r"<!-- /hubforge:([a-z0-9][a-z0-9-]{0,60}) -->[ \t]*")
_KEYS = re.compile(r"<!-- hubforge:front-matter by hand: ([^>]{1,2000}) -->[ \t]*")
_FRONT = re.compile(r"---[ \t]*\r?\n(?:.*?\r?\n)??---[ \t]*(?:\r?\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A stretch of a card. raw: its characters, marks included; all pieces of a card together are the card's body.

    name: of the section, "" for what people wrote. mark: the digest that its mark gives, or "by hand". text: what is
    between the marks. damaged: its end mark is missing.
    """

    raw: str
    name: str = ""
    mark: str = ""
    text: str = ""
    damaged: bool = False

    @property
    def by_hand(self) -> bool:
        return self.mark == BY_HAND

    @property
    def is_edited(self) -> bool:
        """Whether the section is not as it was written."""
        return bool(self.name) and not self.by_hand and (self.damaged or digest(self.text)[:_DIGITS] != self.mark)

    @property
    def is_blank(self) -> bool:
        return not self.name and not self.raw.strip()


def digest(text: str) -> str:
    """sha256 of a section's text. Line endings and spaces at line ends do not count: editors change them unasked."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return hashlib.sha256("\n".join(lines).strip("\n").encode("utf-8", "surrogatepass")).hexdigest()


def wrap(name: str, text: str) -> str:
    """The section between its marks. A line of the text that looks like a mark is indented, which ends its meaning."""
    lines = [f" {line}" if _is_mark(line) else line for line in text.strip("\n").split("\n")]
    body = "\n".join(lines)
    return f"<!-- hubforge:{name} {digest(body)[:_DIGITS]} -->\n{body}\n\n<!-- /hubforge:{name} -->\n"


def kept_by_hand(name: str, text: str) -> str:
    """The section as people want it, and marked so that it stays."""
    body = f"{text.strip()}\n\n" if text.strip() else ""
    return f"<!-- hubforge:{name} {BY_HAND} -->\n{body}<!-- /hubforge:{name} -->\n"


def wrap_rest(page: str) -> str:
    """The page with whatever a template wrote outside the sections between marks as well: `title`, `text-2`, ..."""
    head, pieces = split(page)
    taken = {piece.name for piece in pieces}
    made = [head]
    for piece in pieces:
        if piece.name or piece.is_blank:
            made.append(piece.raw)
            continue
        name = next(name for name in _free_names() if name not in taken)
        taken.add(name)
        hint = f"{HINT}\n\n" if name == "title" else ""
        made.append("\n" + wrap(name, hint + piece.raw.strip("\n")) + "\n")
    return "".join(made)


def _free_names() -> Iterator[str]:
    yield "title"
    number = 2
    while True:
        yield f"text-{number}"
        number += 1


def split(card: str) -> tuple[str, tuple[Piece, ...]]:
    """The front matter of a card with its `---` lines ("" when it has none), and the pieces of what follows it.

    Of two sections of one name the first counts; the second is taken for something people wrote.
    """
    match = _FRONT.match(card)
    head = match[0] if match else ""
    lines = _lines(card[len(head) :])
    pieces: list[Piece] = []
    loose: list[str] = []
    seen: set[str] = set()
    at = 0
    while at < len(lines):
        start = _START.fullmatch(lines[at].rstrip("\r\n"))
        if start is None or start[1] in seen:
            loose.append(lines[at])
            at += 1
            continue
        if loose:
            pieces.append(Piece("".join(loose)))
            loose = []
        name, mark = start[1], start[2]
        seen.add(name)
        end = at + 1
        while end < len(lines) and not _is_mark(lines[end].rstrip("\r\n")):
            end += 1
        closing = _END.fullmatch(lines[end].rstrip("\r\n")) if end < len(lines) else None
        whole = closing is not None and closing[1] == name
        text = "".join(lines[at + 1 : end])
        stop = end + 1 if whole else end
        pieces.append(Piece("".join(lines[at:stop]), name, mark, text, damaged=not whole))
        at = stop
    if loose:
        pieces.append(Piece("".join(loose)))
    return head, tuple(pieces)


def sections(card: str) -> dict[str, str]:
    """sha256 of each section that hubforge wrote, by name; those kept by hand are left out."""
    return {piece.name: digest(piece.text) for piece in split(card)[1] if piece.name and not piece.by_hand}


def keys_by_hand(card: str) -> tuple[str, ...]:
    """The keys of the front matter that people keep themselves."""
    found: list[str] = []
    for piece in split(card)[1]:
        for line in _lines(piece.raw) if not piece.name else ():
            if match := _KEYS.fullmatch(line.rstrip("\r\n")):
                found += match[1].split()
    return tuple(dict.fromkeys(found))


def with_keys_by_hand(body: str, keys: Sequence[str]) -> str:
    """The body of a card with the line that names those keys; without it when there are none."""
    lines = [line for line in _lines(body) if not _KEYS.fullmatch(line.rstrip("\r\n"))]
    if not keys:
        return "".join(lines)
    return f"<!-- hubforge:front-matter by hand: {' '.join(keys)} -->\n" + "".join(lines)


def is_by_hand(card: str) -> bool:
    """Whether people keep the whole card themselves."""
    return any(
        line.rstrip() == WHOLE_BY_HAND for piece in split(card)[1] if not piece.name for line in _lines(piece.raw)
    )


def _lines(text: str) -> list[str]:
    """With their ends. Only a line feed ends one: str.splitlines also takes characters that no renderer breaks at."""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def _is_mark(line: str) -> bool:
    return bool(_START.fullmatch(line) or _END.fullmatch(line))
