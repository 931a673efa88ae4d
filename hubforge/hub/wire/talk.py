"""Discussions and pull requests."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubforge.hub.refusal import Refusal
from hubforge.hub.storage import discussions
from hubforge.hub.storage.repository import Repository
from hubforge.hub.wire.request import access, repo_api, repository, text_of, with_json

_PAGE = 50


def listing(request: Request) -> Response:
    repo = repository(request)
    query = request.query_params
    found = [discussions.read(repo, number) for number in reversed(discussions.numbers(repo))]
    kind, status, author = query.get("type", "all"), query.get("status", "all"), query.get("author")
    if kind != "all":
        found = [each for each in found if each["pull_request"] == (kind == "pull_request")]
    if status != "all":
        found = [each for each in found if (each["status"] in ("open", "draft")) == (status == "open")]
    if author:
        found = [each for each in found if each["author"] == author]
    page = query.get("p", "0")
    start = int(page) * _PAGE if page.isdigit() else 0
    shown = [discussions.brief(repo, each) for each in found[start : start + _PAGE]]
    return JSONResponse({"discussions": shown, "count": len(found), "start": start})


def create(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request)
    title = text_of(data, "title").strip()
    if len(title) < 3:
        raise Refusal(400, "The title needs at least 3 letters")
    made = discussions.open_discussion(
        repo, _writer(request, repo), title, text_of(data, "description"), pull_request=bool(data.get("pullRequest"))
    )
    return JSONResponse({"num": made["num"], "url": f"/{repo.name}/discussions/{made['num']}"})


def _writer(request: Request, repo: Repository) -> str:
    return access(request).check_may_propose(repo)


def show(request: Request) -> Response:
    repo = repository(request)
    found = discussions.read(repo, _number(request))
    return JSONResponse(discussions.details(repo, found, with_diff="diff" in request.query_params))


def _number(request: Request) -> int:
    return int(request.path_params["number"])


def comment(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request)
    event = discussions.comment(repo, _number(request), _writer(request, repo), text_of(data, "comment"))
    return JSONResponse({"newMessage": event})


def status(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request)
    user = _writer(request, repo)
    if discussions.read(repo, _number(request))["author"] != user:
        access(request).check_write(repo.kind, repo.id)
    event = discussions.set_status(repo, _number(request), user, text_of(data, "status"), text_of(data, "comment"))
    return JSONResponse({"newStatus": event})


def title(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request, write=True)
    event = discussions.set_title(repo, _number(request), access(request).user, text_of(data, "title"))
    return JSONResponse({"newTitle": event})


def merge(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request, write=True)
    commit = discussions.merge(repo, _number(request), access(request).user, text_of(data, "comment"))
    return JSONResponse({"mergeCommitId": commit.id})


routes = [
    repo_api("/discussions", listing),
    repo_api("/discussions", with_json(create), "POST"),
    repo_api("/discussions/{number:int}", show),
    repo_api("/discussions/{number:int}/comment", with_json(comment), "POST"),
    repo_api("/discussions/{number:int}/status", with_json(status), "POST"),
    repo_api("/discussions/{number:int}/title", with_json(title), "POST"),
    repo_api("/discussions/{number:int}/merge", with_json(merge), "POST"),
]
