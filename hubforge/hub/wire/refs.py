"""Branches, tags, and the squashing of history."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubforge.hub.names import check_ref_name
from hubforge.hub.refusal import Refusal, no_revision
from hubforge.hub.storage.committing import squash
from hubforge.hub.storage.repository import HEADS, MAIN, PULLS, TAGS
from hubforge.hub.wire.request import access, part, repo_api, repository, text_of, with_json


def refs(request: Request) -> Response:
    found = repository(request).refs()

    def below(start: str) -> list[dict[str, str]]:
        return [
            {"name": name.removeprefix(start), "ref": name, "targetCommit": commit}
            for name, commit in found.items()
            if name.startswith(start)
        ]

    shown: dict[str, Any] = {"branches": below(HEADS), "converts": [], "tags": below(TAGS)}
    if "include_prs" in request.query_params:
        shown["pullRequests"] = [{**each, "name": each["ref"]} for each in below(PULLS)]
    return JSONResponse(shown)


def _add(request: Request, name: str, revision: str, what: str) -> Response:
    repo = repository(request, write=True)
    with repo.lock():
        if name in repo.refs():
            raise Refusal(409, f"{what} {name.partition('/')[2].partition('/')[2]} already exists")
        commit = repo.find(revision)
        repo.set_refs({name: commit.id})
    return JSONResponse({"ref": name, "targetCommit": commit.id})


def _drop(request: Request, name: str) -> Response:
    repo = repository(request, write=True)
    with repo.lock():
        if name not in repo.refs():
            raise no_revision(name)
        repo.set_refs({name: None})
    return JSONResponse({})


def add_tag(request: Request, data: dict[str, Any]) -> Response:
    return _add(request, TAGS + check_ref_name(data.get("tag")), part(request, "rev"), "Tag")


def add_branch(request: Request, data: dict[str, Any]) -> Response:
    start = text_of(data, "startingPoint") or "main"
    return _add(request, HEADS + check_ref_name(part(request, "rev")), start, "Branch")


def drop_tag(request: Request) -> Response:
    return _drop(request, TAGS + part(request, "rev"))


def drop_branch(request: Request) -> Response:
    name = HEADS + part(request, "rev")
    if name == MAIN:
        raise Refusal(403, "The main branch cannot be deleted")
    return _drop(request, name)


def super_squash(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request, write=True)
    commit = squash(repo, part(request, "rev"), access(request).user, text_of(data, "message") or None)
    return JSONResponse({"commitOid": commit.id})


routes = [
    repo_api("/refs", refs),
    repo_api("/tag/{rev}", with_json(add_tag), "POST"),
    repo_api("/tag/{rev}", drop_tag, "DELETE"),
    repo_api("/branch/{rev}", with_json(add_branch), "POST"),
    repo_api("/branch/{rev}", drop_branch, "DELETE"),
    repo_api("/super-squash/{rev}", with_json(super_squash), "POST"),
]
