"""Preupload and commit: which way each file goes, and all of them becoming one commit."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubforge.hub.names import check_path, is_sha256
from hubforge.hub.refusal import Refusal
from hubforge.hub.storage import discussions
from hubforge.hub.storage.committing import Change, Delete, DeleteFolder, Put, commit, lfs_entry
from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.tree import Entry
from hubforge.hub.storage.uploadmode import ignored, upload_mode
from hubforge.hub.wire.request import access, endpoint, part, repo_api, repository, text_of, with_json

_MAX_REGULAR = 10 << 20  # As on the real Hub: larger files must be in LFS.
_MAX_LINE = _MAX_REGULAR * 4 // 3 + (64 << 10)
_MAX_CHANGES = 50_000


def _writable(request: Request) -> Repository:
    """A pull request may be opened by anyone who is signed in and may read; all else takes the right to write."""
    if _is_pull_request(request):
        repo = repository(request)
        access(request).check_may_propose(repo)
        return repo
    return repository(request, write=True)


def _is_pull_request(request: Request) -> bool:
    return request.query_params.get("create_pr", "").lower() in ("1", "true")


def preupload(request: Request, data: dict[str, Any]) -> Response:
    repo = _writable(request)
    present = repo.tree(repo.find(part(request, "rev"))).files
    rules = text_of(data, "gitIgnore")
    if not rules and (entry := present.get(".gitignore")):
        rules = repo.read(entry, 64 << 10).decode("utf-8", "replace")
    files = data.get("files")
    if not isinstance(files, list):
        raise Refusal(400, "'files' must be a list")
    shown = []
    for file in files:
        try:
            path = check_path(file["path"])
            sample = base64.b64decode(file.get("sample") or "", validate=True)
            mode = upload_mode(path, int(file["size"]), sample, request.app.state.settings.lfs_from)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise Refusal(400, "Each file needs path, size and a base64 sample") from None
        answer: dict[str, Any] = {"path": path, "uploadMode": mode, "shouldIgnore": ignored(path, rules)}
        if path in present:
            answer["oid"] = present[path].etag
        shown.append(answer)
    return JSONResponse({"files": shown, "commitOid": repo.find(part(request, "rev")).id})


async def _lines(request: Request) -> AsyncIterator[bytes]:
    """The lines of a body, each held only while it is read."""
    rest = bytearray()
    async for piece in request.stream():
        rest += piece
        if b"\n" in piece:
            *whole, last = rest.split(b"\n")
            for line in whole:
                yield bytes(line)
            rest = bytearray(last)
        if len(rest) > _MAX_LINE:
            raise Refusal(413, f"A file of more than {_MAX_REGULAR >> 20} MiB must be uploaded through LFS")
    yield bytes(rest)


async def make_commit(request: Request) -> Response:
    repo = await run_in_threadpool(_writable, request)
    header: dict[str, Any] = {}
    changes: list[Change] = []
    async for line in _lines(request):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refusal(400, "Each line must be a JSON object with key and value") from None
        if not isinstance(value, dict):
            raise Refusal(400, f"The value of {key!r} must be an object")
        if key == "header":
            header = value
        else:
            changes.append(await run_in_threadpool(_change, repo, key, value))
        if len(changes) > _MAX_CHANGES:
            raise Refusal(413, f"More than {_MAX_CHANGES} changes in one commit")
    if not text_of(header, "summary").strip():
        raise Refusal(400, "The commit needs a summary")
    return await run_in_threadpool(_finish, request, repo, header, changes)


def _change(repo: Repository, key: str, value: dict[str, Any]) -> Change:
    """One line of a commit; a regular file's content is on disk when this returns."""
    if key == "deletedFolder":
        return DeleteFolder(check_path(str(value.get("path", "")).rstrip("/")))
    path = check_path(value.get("path"))
    if key == "deletedFile":
        return Delete(path)
    if key == "lfsFile":
        size = value.get("size")
        if value.get("algo", "sha256") != "sha256" or not is_sha256(value.get("oid")):
            raise Refusal(400, f"{path}: an LFS file needs a sha256")
        if not (size is None or isinstance(size, int)):
            raise Refusal(400, f"{path}: size must be a number")
        return Put(lfs_entry(repo, path, value["oid"], size))
    if key != "file":
        raise Refusal(400, f"Unknown key {key!r} in a commit")
    content = value.get("content")
    if not isinstance(content, str):
        raise Refusal(400, f"{path}: content must be a string")
    try:
        data = base64.b64decode(content, validate=True) if value.get("encoding") == "base64" else content.encode()
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{path}: content is not base64") from None
    if len(data) > _MAX_REGULAR:
        raise Refusal(413, f"{path}: files of more than {_MAX_REGULAR >> 20} MiB must be uploaded through LFS")
    return Put(Entry(path, len(data), repo.objects.add_blob(data)))


def _finish(request: Request, repo: Repository, header: dict[str, Any], changes: list[Change]) -> Response:
    details: dict[str, Any] = {
        "author": access(request).user,
        "title": text_of(header, "summary").strip().splitlines()[0],
        "message": text_of(header, "description"),
        "expected": text_of(header, "parentCommit") or None,
    }
    base = f"{endpoint(request)}/{repo.name}"
    with request.app.state.quotas.commit(repo.name):
        if _is_pull_request(request):
            made, number = discussions.commit_as_pull_request(repo, part(request, "rev"), changes, **details)
        else:
            made, number = commit(repo, part(request, "rev"), changes, **details), 0
    shown = {"success": True, "commitOid": made.id, "commitUrl": f"{base}/commit/{made.id}", "hookOutput": ""}
    if number:
        shown["pullRequestUrl"] = f"{base}/discussions/{number}"
    return JSONResponse(shown)


routes = [
    repo_api("/preupload/{rev}", with_json(preupload), "POST"),
    repo_api("/commit/{rev}", make_commit, "POST"),
]
