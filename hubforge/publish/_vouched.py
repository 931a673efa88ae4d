"""What of a published card its release file vouches for, compared: sections and front matter, not what people wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hubforge.errors import shown
from hubforge.front_matter import read_front_matter
from hubforge.publish._front_matter import told
from hubforge.publish._merge import LISTS, same
from hubforge.release import CardRecord, TargetRecord
from hubforge.sections import digest, is_by_hand, keys_by_hand, split

_FILE_ROW = re.compile(r"\| `([^`|]+)` \|[^|]*\| `([0-9a-f]{64})` \|")
_QUANT_ROW = re.compile(r"\| \[[^\]]*\]\(([^()\s]+\.gguf)\) \|")


def vouched_faults(card: str, record: CardRecord) -> Iterator[str]:
    """One line for each section and each key of the front matter that is not as the release file says."""
    head, pieces = split(card)
    there = {piece.name: piece for piece in pieces if piece.name}
    for name, sha256 in record.sections.items():
        piece = there.get(name)
        if piece is None:
            yield f"the section {shown(name)} is missing"
        elif not piece.by_hand and (piece.damaged or digest(piece.text) != sha256):
            yield f"the section {shown(name)} is not as it was published"
    for name, piece in there.items():
        if name not in record.sections and not piece.by_hand:
            yield f"has a section {shown(name)} that was not published"
    try:
        front = read_front_matter(head) if head else {}
    except ValueError as error:
        yield str(error)
        return
    kept = keys_by_hand(card)
    for key, value in record.front_matter.items():
        found = front.get(key)
        if key in kept or same(found, value):
            continue
        if key in LISTS and isinstance(value, list):
            lost = [entry for entry in value if entry not in (found if isinstance(found, list) else [found])]
            if lost:
                yield f"{shown(key)} in the front matter lacks {', '.join(told(entry) for entry in lost)}"
        elif key not in front:
            yield f"{shown(key)} is missing from the front matter"
        else:
            yield f"says {shown(key)} {told(found)}, but the release has {told(value)}"


def table_faults(card: str, target: TargetRecord) -> Iterator[str]:
    """One line for each row of the card's tables of files that is not a file of the release with that digest."""
    digests = {file.path: file.sha256 for file in target.files}
    for piece in split(card)[1]:
        if piece.by_hand or piece.name not in ("files", "quants"):
            continue
        rows = set()
        for line in piece.text.split("\n"):
            if match := _FILE_ROW.fullmatch(line.strip()):
                path, sha256 = match.groups()
                rows.add(path)
                if digests.get(path) != sha256:
                    yield f"its table of files says {shown(path)} has sha256 {sha256}, but the release does not"
            elif piece.name == "quants" and (match := _QUANT_ROW.match(line.strip())) and match[1] not in digests:
                yield f"its table of quants lists {shown(match[1])}, which the release does not have"
        lost = [path for path in sorted(digests) if piece.name == "files" and _is_artifact(path) and path not in rows]
        yield from (f"its table of files lacks {shown(path)}" for path in lost)


def _is_artifact(path: str) -> bool:
    """Whether a file stands in the table: not the card and its pictures, nor a name that has to be written as HTML."""
    return path != "README.md" and "/assets/" not in f"/{path}" and "|" not in path and "`" not in path


def by_hand_notes(card: str) -> list[str]:
    """What people keep themselves, so that nobody vouches for it: a line each."""
    if is_by_hand(card):
        return ["README.md is kept by hand; the release does not vouch for it"]
    kept = [piece.name for piece in split(card)[1] if piece.by_hand]
    notes = [f"README.md: the section {shown(name)} is kept by hand" for name in kept]
    if keys := keys_by_hand(card):
        notes.append(f"README.md: kept by hand in the front matter: {shown(', '.join(keys))}")
    if any(not piece.name and piece.raw.strip() for piece in split(card)[1]):
        notes.append("README.md holds text between the sections that the release does not vouch for")
    return notes
