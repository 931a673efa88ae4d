"""Collections: made, listed, shown, changed. What an asker may not see is not in what they are shown."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hubforge.hub.names import KINDS, SINGULAR, check_name, kind_of
from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.collections import TYPES, Collection, Collections, check_paper
from hubforge.hub.storage.facts import iso
from hubforge.hub.wire.access import Access
from hubforge.hub.wire.repos import paged
from hubforge.hub.wire.request import access, part, text_of, with_json

_REPOSITORIES = tuple(SINGULAR[kind] for kind in KINDS)


def shelf_of(request: Request) -> Collections:
    return Collections(request.app.state.shelf.folder)


def can_see(who: Access, collection: Collection) -> bool:
    return not collection["private"] or who.may_collect(collection["owner"], write=False)


def found(request: Request, *, write: bool = False) -> Collection:
    """The collection an address names, if the asker may see it (and, for `write`, change it)."""
    who, slug = access(request), f"{part(request, 'ns')}/{part(request, 'slug')}"
    collection = shelf_of(request).get(slug)
    if not can_see(who, collection):
        raise Refusal(404, f"Collection not found: {slug}")
    if write and not who.may_collect(collection["owner"], write=True):
        raise Refusal(403, f"Forbidden: {who.user}'s token may not change collections of {collection['owner']}")
    return collection


def visible_items(request: Request, collection: Collection) -> list[dict[str, Any]]:
    """The items the asker may see, by their present names. What was deleted or is hidden is left out."""
    who, shelf, shown = access(request), request.app.state.shelf, []
    for item in collection["items"]:
        id = item["id"]
        try:
            if item["type"] in _REPOSITORIES:
                id = who.check(shelf, kind_of(item["type"]), id).id
            elif item["type"] == "collection":
                inner = shelf_of(request).get(id)
                id = inner["slug"]
                if not can_see(who, inner):
                    continue
        except Refusal:
            continue
        shown.append({**item, "id": id})
    return shown


def shown(request: Request, collection: Collection, *, limit: int | None = None) -> dict[str, Any]:
    """A collection as the Hub's JSON. limit: of items, as listings show the first few."""
    items = []
    for position, item in enumerate(visible_items(request, collection)[:limit]):
        seen = {"_id": item["_id"], "id": item["id"], "type": item["type"], "position": position}
        if item["type"] == "collection":
            seen["slug"] = item["id"]
        if item["note"]:
            seen["note"] = {"text": item["note"], "html": None}
        items.append(seen)
    return {
        "slug": collection["slug"],
        "title": collection["title"],
        "description": collection["description"] or None,
        "owner": collection["owner"],
        "items": items,
        "lastUpdated": iso(collection["updated"]),
        "position": collection["position"],
        "private": collection["private"],
        "theme": collection["theme"],
        "upvotes": 0,
        "isUpvotedByUser": False,
        "gating": False,
    }


def create(request: Request, data: dict[str, Any]) -> Response:
    who = access(request)
    owner = check_name(data.get("namespace") or who.user, "namespace")
    if not who.may_collect(owner, write=True):
        raise Refusal(403, f"Forbidden: {who.user}'s token may not make collections of {owner}")
    made = shelf_of(request).create(
        owner, text_of(data, "title"), text_of(data, "description"), private=bool(data.get("private"))
    )
    return JSONResponse(shown(request, made))


def listing(request: Request) -> Response:
    """Collections the asker may see: of `owner`, holding `item` (`models/ns/name`), as `sort` has it."""
    query, who = request.query_params, access(request)
    owners, wanted = query.getlist("owner"), query.getlist("item")
    seen = []
    for collection in shelf_of(request).all():
        if (owners and collection["owner"] not in owners) or not can_see(who, collection):
            continue
        if query.get("q", "").lower() not in collection["title"].lower():
            continue
        held = {f"{item['type']}s/{item['id']}" for item in visible_items(request, collection)}
        if set(wanted) <= held:
            seen.append(shown(request, collection, limit=4))
            del seen[-1]["position"]  # The client counts positions in a listing itself, and fails when told.
    return paged(request, seen, request.app.state.settings.page_size)


def show(request: Request) -> Response:
    return JSONResponse(shown(request, found(request)))


def change(request: Request, data: dict[str, Any]) -> Response:
    changed = shelf_of(request).change(found(request, write=True)["slug"], data)
    return JSONResponse({"success": True, "data": shown(request, changed)})


def delete(request: Request) -> Response:
    shelf_of(request).delete(found(request, write=True)["slug"])
    return JSONResponse({"success": True})


def add_item(request: Request, data: dict[str, Any]) -> Response:
    collection = found(request, write=True)
    item = data.get("item")
    if not isinstance(item, dict) or item.get("type") not in TYPES:
        raise Refusal(400, f"item needs an id and a type: one of {', '.join(TYPES)}")
    kind, id = str(item["type"]), text_of(item, "id")
    if kind in _REPOSITORIES:
        id = access(request).check(request.app.state.shelf, kind_of(kind), id).id
    elif kind == "paper":
        check_paper(id)
    else:
        inner = shelf_of(request).get(id)
        if inner["slug"] == collection["slug"] or not can_see(access(request), inner):
            raise Refusal(404, f"Collection not found: {id}")
        id = inner["slug"]
    return JSONResponse(shown(request, shelf_of(request).add(collection["slug"], kind, id, text_of(data, "note"))))


def change_item(request: Request, data: dict[str, Any]) -> Response:
    changed = shelf_of(request).change_item(found(request, write=True)["slug"], part(request, "item"), data)
    return JSONResponse({"success": True, "data": shown(request, changed)})


def drop_item(request: Request) -> Response:
    shelf_of(request).drop_item(found(request, write=True)["slug"], part(request, "item"))
    return JSONResponse({"success": True})


_ONE = "/api/collections/{ns}/{slug}"
routes = [
    Route("/api/collections", listing),
    Route("/api/collections", with_json(create), methods=["POST"]),
    Route(_ONE, show),
    Route(_ONE, with_json(change), methods=["PATCH"]),
    Route(_ONE, delete, methods=["DELETE"]),
    Route(_ONE + "/items", with_json(add_item), methods=["POST"]),
    Route(_ONE + "/items/{item}", with_json(change_item), methods=["PATCH"]),
    Route(_ONE + "/items/{item}", drop_item, methods=["DELETE"]),
]
