"""Branches, tags, and the squashing of history."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubforge.hub.names import check_ref_name
from hubforge.hub.refusal import Refusal, no_revision
from hubforge.hub.storage.committing import squash
from hubforge.hub.storage.repository import HEADS, MAIN, PULLS, TAGS, Repository
from hubforge.hub.wire.request import access, part, repo_api, repository, text_of, with_json

_MESSAGE = 10_000  # Letters of a tag's message that are kept.


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


def _check_new(repo: Repository, name: str, what: str) -> None:
    if name in repo.refs():
        raise Refusal(409, f"{what} {name.partition('/')[2].partition('/')[2]} already exists")


def add_tag(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request, write=True)
    tag, message = check_ref_name(data.get("tag")), text_of(data, "message").strip()
    note = {"message": message[:_MESSAGE], "author": access(request).user, "date": int(time.time())}
    with repo.lock():
        _check_new(repo, TAGS + tag, "Tag")
        commit = repo.find(part(request, "rev"))
        repo.set_tag(tag, commit.id, note if message else None)
    return JSONResponse({"ref": TAGS + tag, "targetCommit": commit.id})


def add_branch(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request, write=True)
    name = HEADS + check_ref_name(part(request, "rev"))
    with repo.lock():
        _check_new(repo, name, "Branch")
        commit = repo.find(text_of(data, "startingPoint") or "main")
        repo.set_refs({name: commit.id})
    return JSONResponse({"ref": name, "targetCommit": commit.id})


def drop_tag(request: Request) -> Response:
    repo, tag = repository(request, write=True), part(request, "rev")
    with repo.lock():
        if TAGS + tag not in repo.refs():
            raise no_revision(TAGS + tag)
        repo.set_tag(tag, None)
    return JSONResponse({})


def drop_branch(request: Request) -> Response:
    repo, name = repository(request, write=True), HEADS + part(request, "rev")
    if name == MAIN:
        raise Refusal(403, "The main branch cannot be deleted")
    with repo.lock():
        if name not in repo.refs():
            raise no_revision(name)
        repo.set_refs({name: None})
    return JSONResponse({})


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
