"""The card of an upload, merged with the one that the repository has."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from hubforge.publish._earlier import CARD, EarlierReleases
from hubforge.publish._merge import Conflict, merge_cards, text_diff
from hubforge.publisher import Upload, UploadFile

CARD_LIMIT = 8 << 20  # bytes


@dataclass(frozen=True)
class MergedCard:
    """An upload whose card has what people wrote. diff: from the card that is there to that one."""

    upload: Upload
    diff: str = ""
    conflicts: tuple[Conflict, ...] = ()


def card_of(upload: Upload) -> UploadFile | None:
    """The card at the root of the repository, where the upload has one."""
    return next((file for file in upload.files if file.path == CARD), None)


def text_of(card: UploadFile) -> str:
    """The card as text; bytes that are not UTF-8 become U+FFFD, and the push refuses them later."""
    content = card.content if isinstance(card.content, bytes) else card.content.read_bytes()
    return content.decode("utf-8", "replace")


def merge_upload(upload: Upload, earlier: EarlierReleases, *, same: bool) -> MergedCard:
    """The upload with its card merged. same: the repository has that very card already.

    With the conflicts that are left, the card is the release's own.
    """
    ours = card_of(upload)
    if ours is None or same or CARD not in earlier.tree:
        return MergedCard(upload, "" if same else added_card(upload))
    data = earlier.remote.read(CARD, earlier.commit, CARD_LIMIT)
    try:
        theirs = data.decode("utf-8")
    except UnicodeDecodeError:
        theirs = data.decode("utf-8", "replace")
        conflict = Conflict("the whole card", "is not UTF-8", text_diff(theirs, text_of(ours), CARD))
        if upload.take == "theirs":
            return MergedCard(_with_card(upload, data), "", (conflict,))
        return MergedCard(upload, conflict.diff, (conflict,))
    if earlier.wrote(data):
        return MergedCard(upload, text_diff(theirs, text_of(ours), CARD))
    merged = merge_cards(theirs, text_of(ours), earlier.base(), upload.take)
    diff = text_diff(theirs, merged.text, CARD)
    return MergedCard(_with_card(upload, merged.text.encode()), diff, tuple(merged.conflicts))


def added_card(upload: Upload) -> str:
    """The diff of a card that is new."""
    card = card_of(upload)
    return text_diff("", text_of(card), CARD) if card else ""


def _with_card(upload: Upload, content: bytes) -> Upload:
    file = UploadFile(CARD, content, len(content), hashlib.sha256(content).hexdigest())
    return replace(upload, files=tuple(file if one.path == CARD else one for one in upload.files))
