"""Collections: titled lists of repositories, papers and other collections; a JSON file each."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from hubforge.hub.disk import locked, write_whole
from hubforge.hub.refusal import Refusal

Collection = dict[str, Any]
THEMES: Final = ("orange", "blue", "green", "purple", "pink", "indigo")
TYPES: Final = ("model", "dataset", "space", "kernel", "paper", "collection")
# The real Hub's limits, in letters.
_TITLE, _DESCRIPTION, _NOTE = 60, 150, 500
_MAX_ITEMS: Final = 1000
_ID: Final = re.compile(r"[0-9a-f]{24}")
_PAPER: Final = re.compile(r"\d{4}\.\d{4,5}")


class Collections:
    """`collections/ID` below a Hub's folder. Every change is one file replaced whole, under one lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "collections"
        self._lock = folder / "locks" / "collections.lock"

    def all(self) -> Iterator[Collection]:
        """Every collection, the last changed first."""
        found = []
        for path in self._folder.glob("*"):
            if _ID.fullmatch(path.name):
                try:
                    found.append(json.loads(path.read_bytes()))
                except FileNotFoundError:  # Deleted meanwhile.
                    continue
        yield from sorted(found, key=lambda each: (-each["updated"], each["slug"]))

    def get(self, slug: str) -> Collection:
        """The collection of a slug. Its last 24 digits name it, so that a changed title breaks no link."""
        owner, _, rest = slug.partition("/")
        id = rest[-24:]
        try:
            found: Collection = json.loads((self._folder / id).read_bytes()) if _ID.fullmatch(id) else {}
        except FileNotFoundError:
            found = {}
        if not found or found["owner"] != owner:
            raise Refusal(404, f"Collection not found: {slug}")
        return found

    def create(self, owner: str, title: str, description: str, *, private: bool) -> Collection:
        """A new collection; 409 with its `slug` when the owner has one of that title."""
        title, description = _text(title, "title", _TITLE).strip(), _text(description, "description", _DESCRIPTION)
        if not title:
            raise Refusal(400, "A collection needs a title")
        with locked(self._lock):
            mine = [each for each in self.all() if each["owner"] == owner]
            for each in mine:
                if each["title"] == title:
                    raise Refusal(409, f"{owner} has a collection of this title", more={"slug": each["slug"]})
            id = secrets.token_hex(12)
            made: Collection = {
                "slug": f"{owner}/{_slug(title)}-{id}",
                "title": title,
                "description": description,
                "owner": owner,
                "private": private,
                "theme": THEMES[int(id, 16) % len(THEMES)],
                "position": len(mine),
                "items": [],
            }
            return self._write(made)

    def _write(self, collection: Collection) -> Collection:
        collection["updated"] = int(time.time())
        path = self._folder / collection["slug"][-24:]
        write_whole(path, json.dumps(collection, ensure_ascii=False, indent=1).encode())
        return collection

    def change(self, slug: str, changes: Mapping[str, Any]) -> Collection:
        """Give it another `title`, `description`, `private`, `theme` or `position`; its slug keeps its name."""
        with locked(self._lock):
            collection = self.get(slug)
            if "title" in changes:
                collection["title"] = _text(changes["title"], "title", _TITLE).strip() or collection["title"]
            if "description" in changes:
                collection["description"] = _text(changes["description"], "description", _DESCRIPTION)
            if changes.get("theme") is not None:
                if changes["theme"] not in THEMES:
                    raise Refusal(400, f"theme must be one of {', '.join(THEMES)}")
                collection["theme"] = changes["theme"]
            if "private" in changes:
                collection["private"] = bool(changes["private"])
            if "position" in changes:
                collection["position"] = _position(changes["position"])
            return self._write(collection)

    def delete(self, slug: str) -> None:
        with locked(self._lock):
            (self._folder / self.get(slug)["slug"][-24:]).unlink()

    def add(self, slug: str, kind: str, id: str, note: str) -> Collection:
        """With one more item at its end; 409 when it is there."""
        note = _text(note, "note", _NOTE)
        with locked(self._lock):
            collection = self.get(slug)
            items = collection["items"]
            if any((item["type"], item["id"]) == (kind, id) for item in items):
                raise Refusal(409, f"{id} is in this collection already")
            if len(items) >= _MAX_ITEMS:
                raise Refusal(400, f"A collection holds at most {_MAX_ITEMS} items")
            items.append({"_id": secrets.token_hex(12), "type": kind, "id": id, "note": note})
            return self._write(collection)

    def change_item(self, slug: str, item: str, changes: Mapping[str, Any]) -> Collection:
        """Give an item another `note`, or another `position` among the items."""
        with locked(self._lock):
            collection = self.get(slug)
            found = _item(collection, item)
            if "note" in changes:
                found["note"] = _text(changes["note"], "note", _NOTE)
            if "position" in changes:
                items = collection["items"]
                items.remove(found)
                items.insert(_position(changes["position"]), found)
            return self._write(collection)

    def drop_item(self, slug: str, item: str) -> Collection:
        with locked(self._lock):
            collection = self.get(slug)
            collection["items"].remove(_item(collection, item))
            return self._write(collection)


def check_paper(id: str) -> str:
    """An arXiv number, unchanged."""
    if not _PAPER.fullmatch(id):
        raise Refusal(400, f"A paper is named by its arXiv number, such as 2310.06825, not {id[:80]!r}")
    return id


def _item(collection: Collection, id: str) -> dict[str, Any]:
    for item in collection["items"]:
        if item["_id"] == id:
            found: dict[str, Any] = item
            return found
    raise Refusal(404, f"No item {id} in this collection")


def _text(value: object, what: str, limit: int) -> str:
    if not isinstance(value, str):
        raise Refusal(400, f"{what} must be a string")
    if len(value) > limit:
        raise Refusal(400, f"{what} has {len(value)} letters; at most {limit}")
    return value


def _position(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Refusal(400, "position must be a number from 0")
    return value


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "collection"
