"""whoami, and the life of repositories: made, described, moved, copied, removed."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hubforge.hub.names import Kind, check_name, kind_of, prefix_of
from hubforge.hub.refusal import Refusal, no_repository
from hubforge.hub.storage import facts
from hubforge.hub.storage.front_matter import check_front_matter
from hubforge.hub.storage.scans import Scan
from hubforge.hub.storage.shelf import Shelf
from hubforge.hub.wire.request import access, endpoint, kind_in, part, repo_api, repository, text_of, with_json

_VISIBILITIES = ("public", "private", "protected")


def whoami(request: Request) -> Response:
    who = access(request)
    name, token = who.user, who.token
    assert token is not None
    granted = token.granted()
    shown: dict[str, Any] = {"displayName": token.name, "role": token.role if granted is None else "fineGrained"}
    if granted is not None:
        scoped = [scope.as_json() for scope in granted]
        shown["fineGrained"] = {"canReadGatedRepos": False, "global": list(token.anywhere), "scoped": scoped}
    auth: dict[str, Any] = {"type": "access_token", "accessToken": shown}
    if token.publisher:
        auth |= {"resource": {"sub": token.publisher}}
    if token.until is not None:
        auth |= {"expiresAt": facts.iso(token.until)}
    return JSONResponse(
        {
            "type": "user",
            "id": name,
            "name": name,
            "fullname": name,
            "canPay": False,
            "anyNamespace": not request.app.state.settings.tokens,  # ours alone: whoever is here may create anywhere
            "orgs": [{"type": "org", "id": org, "name": org, "roleInOrg": "write"} for org in token.orgs],
            "auth": auth,
        }
    )


def create(request: Request, data: dict[str, Any]) -> Response:
    who = access(request)
    kind = kind_of(data.get("type"))
    id = f"{data.get('organization') or who.user}/{check_name(data.get('name'), 'repository name')}"
    who.check_create(kind, id)
    url = f"{endpoint(request)}/{prefix_of(kind)}{id}"
    sdk = text_of(data, "sdk") or None
    try:
        request.app.state.shelf.create(kind, id, who.user, _visibility(data), sdk)
    except Refusal as error:
        if error.status == 409:
            error.more["url"] = url  # The client reads it with exist_ok.
        raise
    return JSONResponse({"url": url, "name": id, "id": id})


def _visibility(data: dict[str, Any], default: str = "public") -> str:
    value = data.get("visibility") or ("private" if data.get("private") else default)
    if value not in _VISIBILITIES:
        raise Refusal(400, f"Invalid visibility {value!r}: {', '.join(_VISIBILITIES)}")
    return str(value)


def delete(request: Request, data: dict[str, Any]) -> Response:
    who = access(request)
    id = f"{data.get('organization') or who.user}/{data.get('name')}"
    shelf: Shelf = request.app.state.shelf
    repo = who.check(shelf, kind_of(data.get("type")), id, write=True)
    if repo.id != id:  # An old name: what is called otherwise now is not removed by mistake.
        raise no_repository()
    shelf.delete(repo)
    return JSONResponse({})


def move(request: Request, data: dict[str, Any]) -> Response:
    who = access(request)
    kind = kind_of(data.get("type"))
    shelf: Shelf = request.app.state.shelf
    target = text_of(data, "toRepo")
    repo = who.check(shelf, kind, text_of(data, "fromRepo"), write=True)
    who.check_create(kind, target)
    shelf.move(repo, target)
    return JSONResponse({"url": f"{endpoint(request)}/{prefix_of(kind)}{target}"})


def settings(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request, write=True)
    changes: dict[str, Any] = {}
    if "gated" in data:
        if data["gated"] not in ("auto", "manual", False):
            raise Refusal(400, "gated must be 'auto', 'manual' or false")
        changes["gated"] = data["gated"]
    if data.get("visibility") is not None or "private" in data:
        changes["visibility"] = _visibility(data)
    repo.set_about(changes)
    return JSONResponse({key: repo.about()[key] for key in ("visibility", "gated")} | {"private": repo.private})


def duplicate(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request)
    who = access(request)
    who.check_gate(repo)
    target = text_of(data, "repository")
    who.check_create(repo.kind, target)
    # A copy of what is hidden stays hidden unless its owner says otherwise.
    visibility = _visibility(data, "private" if repo.private else "public")
    request.app.state.shelf.duplicate(repo, target, visibility)
    return JSONResponse({"url": f"{endpoint(request)}/{prefix_of(repo.kind)}{target}"})


def validate_yaml(request: Request, data: dict[str, Any]) -> Response:
    errors, warnings = check_front_matter(text_of(data, "content"))
    shown = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return JSONResponse(shown, 400 if errors else 200)


def info(request: Request) -> Response:
    repo = repository(request)
    commit = repo.find(part(request, "rev") or "main")
    asked = {key for key, value in request.query_params.items() if value.lower() in ("true", "1")}
    seen = facts.info(repo, commit, blobs="blobs" in asked)
    scan = (
        Scan(repo)
        if "securityStatus" in asked or "securityRepoStatus" in request.query_params.getlist("expand")
        else None
    )
    if scan:
        seen["securityRepoStatus"] = scan.of_repository(repo.tree(commit))
    return JSONResponse(seen)


def listing(request: Request) -> Response:
    """Repositories the asker may see: `search`, `author`, `filter` (tags), `limit`, and a page at a time."""
    query = request.query_params
    kind: Kind = kind_in(request)
    who = access(request)
    found = []
    for repo in request.app.state.shelf.all(kind):
        if query.get("author") not in (None, repo.namespace) or query.get("search", "").lower() not in repo.id.lower():
            continue
        if not who.can_read(repo):
            continue
        seen = facts.info(repo, repo.find("main"))
        if not set(query.getlist("filter")) <= set(seen["tags"]):
            continue
        if "full" not in query:
            for key in ("siblings", "cardData", "config", "model-index"):
                seen.pop(key, None)
        found.append(seen)
    found.sort(key=lambda seen: str(seen["lastModified"]), reverse=True)
    return paged(request, found, request.app.state.settings.page_size)


def paged(request: Request, items: list[Any], size: int) -> Response:
    """One page of a JSON list, with the address of the next in `Link`."""
    query = request.query_params
    try:
        start = max(0, int(query.get("cursor", "0")))
        size = min(size, max(1, int(query.get("limit", size))))
    except ValueError:
        raise Refusal(400, "cursor and limit must be numbers") from None
    headers = {}
    if start + size < len(items):
        rest = [(key, value) for key, value in query.multi_items() if key != "cursor"]
        following = f"{endpoint(request)}{request.scope['path']}?{urlencode([*rest, ('cursor', start + size)])}"
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(items[start : start + size], headers=headers)


routes = [
    Route("/api/whoami-v2", whoami),
    Route("/api/repos/create", with_json(create), methods=["POST"]),
    Route("/api/repos/delete", with_json(delete), methods=["DELETE"]),
    Route("/api/repos/move", with_json(move), methods=["POST"]),
    Route("/api/validate-yaml", with_json(validate_yaml), methods=["POST"]),
    Route("/api/{kind}", listing),
    repo_api("", info),
    repo_api("/revision/{rev}", info),
    repo_api("/settings", with_json(settings), "PUT"),
    repo_api("/duplicate", with_json(duplicate), "POST"),
]
