"""A card that people have edited, and the card of a new release: one card, or where the two do not go together.

What hubforge wrote is replaced, what people wrote stays where it is. A section or a key of the front matter that
hubforge wrote and somebody edited is a conflict, whatever the new release says there: nobody but the reader can tell
whether the edit was a mistake or an improvement. `take` settles all conflicts of a card: "ours" writes the release's,
"theirs" keeps what is there and marks it as kept by hand, so that the next push does not ask again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from typing import Any, Literal
from unicodedata import category

from hubforge.front_matter import plain_yaml, read_front_matter
from hubforge.sections import (
    WHOLE_BY_HAND,
    Piece,
    digest,
    is_by_hand,
    kept_by_hand,
    keys_by_hand,
    split,
    with_keys_by_hand,
)

Take = Literal["ours", "theirs"]
LISTS = ("tags", "language", "datasets")  # to these people may add, and hubforge's own entries stay
_ABSENT: Any = object()


@dataclass(frozen=True)
class Base:
    """What hubforge wrote there before, as the release files in the repository tell.

    fronts: front matter, one for each release that shares the card; names: its sections. known: whether any release
    file told, without which nobody knows that a section is gone.
    """

    known: bool = False
    fronts: tuple[Mapping[str, Any], ...] = ()
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Conflict:
    """One thing that hubforge wrote and somebody changed. diff: from what is there to what the release has."""

    what: str  # "the section results", "license in the front matter", "the whole card"
    how: str  # "was edited by hand"
    diff: str


@dataclass
class Merged:
    """The card to push, and what was in conflict; `text` is meant only when there is none or `take` settled them."""

    text: str
    conflicts: list[Conflict] = field(default_factory=list)


def text_diff(before: str, after: str, name: str, there: str = "on the Hub", here: str = "this release") -> str:
    """A unified diff of two texts, "" when they are equal; without control characters, since one of them is foreign."""
    lines = unified_diff(_printable(before), _printable(after), f"{name} ({there})", f"{name} ({here})", lineterm="")
    return "\n".join(lines)


def merge_cards(theirs: str, ours: str, base: Base, take: Take | None = None) -> Merged:
    """The card of this release with what people wrote on the one that is there.

    theirs: as it is on the Hub, ours: as rendered. A card that was never touched comes out as `ours`.
    """
    if theirs == ours or is_by_hand(theirs):
        return Merged(theirs)
    their_head, their_pieces = split(theirs)
    our_head, our_pieces = split(ours)
    new = {piece.name: piece for piece in our_pieces if piece.name}
    if not new or (not any(piece.name for piece in their_pieces) and any(piece.raw.strip() for piece in their_pieces)):
        how = "was edited by hand" if not new or base.known else "was not written by hubforge"
        return _whole(theirs, ours, how, take)
    merged = Merged("")
    head, hands = _merge_heads(their_head, our_head, base, keys_by_hand(theirs), take, merged.conflicts)
    body = _merge_bodies(their_pieces, our_pieces, base, take, merged.conflicts)
    if take == "theirs" and set(hands) != set(keys_by_hand(theirs)):
        body = "\n" + with_keys_by_hand(body.lstrip("\n"), hands)
    merged.text = head + body
    return merged


def _whole(theirs: str, ours: str, how: str, take: Take | None) -> Merged:
    conflict = Conflict("the whole card", how, text_diff(theirs, ours, "README.md"))
    if take == "theirs":
        return Merged(f"{theirs.rstrip()}\n\n{WHOLE_BY_HAND}\n", [conflict])
    return Merged(ours, [conflict])


def _merge_bodies(
    theirs: Sequence[Piece], ours: Sequence[Piece], base: Base, take: Take | None, conflicts: list[Conflict]
) -> str:
    new = {piece.name: piece for piece in ours if piece.name}
    there = {piece.name for piece in theirs if piece.name}
    made: list[Piece] = []
    for piece in theirs:
        fresh = new.get(piece.name)
        if not piece.name or piece.by_hand:
            made.append(piece)
        elif fresh is not None and not piece.damaged and digest(piece.text) == digest(fresh.text):
            made.append(piece if not piece.is_edited else fresh)  # their own line endings stay
        elif not piece.is_edited:
            made += [fresh] if fresh is not None else []
        else:
            conflicts.append(_edited(piece, fresh))
            if take == "theirs":
                made.append(Piece(kept_by_hand(piece.name, piece.text), piece.name, "by hand"))
            else:
                made += [fresh] if fresh is not None else []
    order = [piece.name for piece in ours if piece.name]
    shared = [piece.name for piece in theirs if piece.name in new]
    written = [piece for piece in theirs if piece.name]
    untouched = not any(piece.is_edited or piece.by_hand for piece in written) and not (base.names & new.keys()) - there
    if untouched and {piece.name: piece.mark for piece in written} == {name: new[name].mark for name in new}:
        return "".join(piece.raw for piece in theirs)
    in_order = shared == [name for name in order if name in there]
    if untouched and in_order and all(piece.name or piece.is_blank for piece in theirs):
        return "".join(piece.raw for piece in ours)
    for index, name in enumerate(order):
        if name in there:
            continue
        fresh = new[name]
        if base.known and name in base.names:
            conflicts.append(Conflict(f"the section {name}", "was taken out by hand", text_diff("", fresh.text, name)))
            if take == "theirs":
                fresh = Piece(kept_by_hand(name, ""), name, "by hand")
        _insert(made, fresh, order[:index], order[index + 1 :])
    return _joined(made)


def _edited(piece: Piece, fresh: Piece | None) -> Conflict:
    how = "lost its end mark" if piece.damaged else "was edited by hand"
    if fresh is None:
        how += ", and this release has no such section"
    text = fresh.text if fresh is not None else ""
    return Conflict(f"the section {piece.name}", how, text_diff(piece.text, text, piece.name))


def _insert(made: list[Piece], fresh: Piece, before: Sequence[str], after: Sequence[str]) -> None:
    """Put a section behind the nearest one that goes before it, else before the first that follows, else last."""
    at = {piece.name: index for index, piece in enumerate(made) if piece.name}
    for name in reversed(before):
        if name in at:
            made[at[name] + 1 : at[name] + 1] = [Piece("\n"), fresh]
            return
    for name in after:
        if name in at:
            made[at[name] : at[name]] = [fresh, Piece("\n")]
            return
    made += [Piece("\n"), fresh]


def _joined(pieces: Sequence[Piece]) -> str:
    """The pieces one after another, each section on lines of its own; where one went, one blank line is left."""
    text = ""
    for index, piece in enumerate(pieces):
        before = pieces[index - 1] if index else None
        if before is not None and piece.is_blank and before.is_blank:
            continue  # a section between the two is gone
        if text and not text.endswith("\n"):
            text += "\n"
        text += piece.raw
    return text


def _merge_heads(
    theirs: str, ours: str, base: Base, hands: Sequence[str], take: Take | None, conflicts: list[Conflict]
) -> tuple[str, tuple[str, ...]]:
    """The front matter with its `---` lines, and the keys that people keep themselves from now on."""
    mine = dict(read_front_matter(ours)) if ours else {}
    try:
        found = dict(read_front_matter(theirs)) if theirs else {}
    except ValueError as error:
        conflicts.append(Conflict("the front matter", str(error), text_diff(theirs, ours, "front matter")))
        return (theirs if take == "theirs" else ours), tuple(hands)
    result: dict[str, Any] = {}
    kept = list(hands)
    for key in [*mine, *(key for key in found if key not in mine)]:
        value, how = _merge_key(key, found.get(key, _ABSENT), mine.get(key, _ABSENT), base, key in hands)
        if how:
            there, here = (_shown({key: one[key]}) if key in one else "" for one in (found, mine))
            conflicts.append(Conflict(f"{key} in the front matter", how, text_diff(there, here, key)))
            value = mine.get(key, _ABSENT)
            if take == "theirs":
                value = found.get(key, _ABSENT)
                kept.append(str(key))
        if value is not _ABSENT:
            result[key] = value
    for candidate, text in ((found, theirs), (mine, ours)):
        if text and same(result, candidate):
            return text, tuple(dict.fromkeys(kept))
    if not result:
        return "", ()
    return _spliced(result, (found, theirs), (mine, ours)), tuple(dict.fromkeys(kept))


def _merge_key(key: str, theirs: Any, ours: Any, base: Base, by_hand: bool) -> tuple[Any, str]:
    """The value of a key, and how it is in conflict ("" when it is not)."""
    before = [front.get(key, _ABSENT) for front in base.fronts]
    was_ours = any(value is not _ABSENT for value in before)
    if by_hand or same(theirs, ours):
        return theirs, ""
    if theirs is _ABSENT:
        return ours, "was taken out by hand" if was_ours else ""
    if any(same(theirs, value) for value in before):
        return ours, ""
    if ours is _ABSENT:
        return theirs, "was edited by hand, and this release does not have it" if was_ours else ""
    if key in LISTS and _is_plain_list(theirs) and _is_plain_list(ours):
        return _merge_lists(_listed(theirs), _listed(ours), [_listed(value) for value in before])
    return ours, "was edited by hand" if was_ours else "says something else there"


def _merge_lists(theirs: list[Any], ours: list[Any], before: Iterable[list[Any]]) -> tuple[Any, str]:
    written = [entry for entries in before for entry in entries]
    gone = [entry for entry in ours if entry in written and entry not in theirs]
    if gone:
        return ours, f"lost {', '.join(str(entry) for entry in gone)}, which hubforge wrote"
    added = [entry for entry in theirs if entry not in ours and entry not in written]
    merged = [*ours, *added]
    return (theirs if sorted(map(str, merged)) == sorted(map(str, theirs)) else merged), ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is _ABSENT or value is None else [value]


def _is_plain_list(value: Any) -> bool:
    return all(isinstance(entry, str) for entry in _listed(value))


def same(one: Any, other: Any) -> bool:
    """Whether two values of a front matter are the same; True is not 1, and the order of keys says nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, bool) is not isinstance(other, bool):
        return False
    return one is other or bool(one == other)


def _spliced(result: Mapping[str, Any], theirs: tuple[Any, str], ours: tuple[Any, str]) -> str:
    """The front matter with each key as it was written by whoever it is from, comments of people included."""
    parts = {**_chunks(ours[1]), **_chunks(theirs[1])}
    mine = _chunks(ours[1])
    lines = []
    for key, value in result.items():
        if key in parts and same(theirs[0].get(key, _ABSENT), value):
            lines.append(parts[key])
        elif key in mine and same(ours[0].get(key, _ABSENT), value):
            lines.append(mine[key])
        else:
            lines.append(_shown({key: value}))
    text = "---\n" + "".join(line if line.endswith("\n") else f"{line}\n" for line in lines) + "---\n"
    try:
        if same(dict(read_front_matter(text)), dict(result)):
            return text
    except ValueError:
        pass  # such as a mapping in one line: written anew then
    return f"---\n{_shown(result)}---\n"


def _chunks(head: str) -> dict[str, str]:
    """The lines of each key of a front matter in block style."""
    import yaml

    body = head.partition("\n")[2].rstrip()
    body = body[: -len("---")] if body.endswith("---") else body
    try:
        node = yaml.compose(body, plain_yaml())
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(node, yaml.MappingNode):
        return {}
    lines = body.split("\n")
    starts = [(str(key.value), key.start_mark.line) for key, _ in node.value]
    stops = [line for _, line in starts[1:]] + [len(lines) - 1 if not lines[-1] else len(lines)]
    return {
        key: "\n".join(line.rstrip("\r") for line in lines[start:stop]) + "\n"
        for (key, start), stop in zip(starts, stops, strict=True)
    }


def _shown(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, default_flow_style=False, width=4096)


def _printable(text: str) -> list[str]:
    lines = text.replace("\r\n", "\n").split("\n")
    lines = lines[:-1] if lines and not lines[-1] else lines
    return ["".join(char if _is_shown(char) else "�" for char in line) for line in lines]


def _is_shown(char: str) -> bool:
    """Whether a terminal shows that character and does nothing else; spaces of other widths are among them."""
    return char.isprintable() or char == "\t" or category(char) == "Zs"
