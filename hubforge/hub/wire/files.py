"""Reading: trees, chosen paths, history, and the files themselves."""

from __future__ import annotations

import mimetypes
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from hubforge.hub.refusal import Refusal, no_entry
from hubforge.hub.storage.facts import iso
from hubforge.hub.storage.repository import Commit, Repository
from hubforge.hub.storage.scans import Scan
from hubforge.hub.storage.tree import Tree
from hubforge.hub.wire.repos import paged
from hubforge.hub.wire.request import access, body, part, repo_api, repo_pages, repository

# What a file of a repository may do in a browser: be looked at. No script, no form, no other origin's cookies.
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_SHOWN = {".svg": "image/svg+xml", ".webp": "image/webp", ".pdf": "application/pdf"}


def tree(request: Request) -> Response:
    repo, commit = _at(request)
    files = repo.tree(commit)
    folder = part(request, "path").strip("/")
    recursive = _yes(request.query_params.get("recursive"))
    try:
        paths = files.below(folder, recursive=recursive)
    except KeyError:
        if folder in files.files:
            paths = [folder]
        else:
            raise no_entry(folder, commit.id) from None
    expand = _yes(request.query_params.get("expand"))
    answer = paged(request, paths, request.app.state.settings.page_size)
    shown = entries(repo, commit, files, _window(request, paths), expand)
    return JSONResponse(shown, headers={key: value for key, value in answer.headers.items() if key == "link"})


def _window(request: Request, paths: list[str]) -> list[str]:
    """The same page of paths that `paged` showed."""
    size = request.app.state.settings.page_size
    start = max(0, int(request.query_params.get("cursor", "0")))
    return paths[start : start + min(size, max(1, int(request.query_params.get("limit", size))))]


def entries(repo: Repository, commit: Commit, files: Tree, paths: list[str], expand: bool) -> list[dict[str, Any]]:
    """Files and folders as the Hub lists them. expand: with the last commit that touched each, and what a scan said."""
    last = repo.last_changes(commit, paths) if expand else {}
    scan = Scan(repo) if expand else None
    shown = []
    for path in paths:
        if path in files.files:
            entry: dict[str, Any] = files.files[path].as_json()
            if scan:
                entry["securityFileStatus"] = scan.of_file(path)
        elif path and path in files.folders:
            entry = {"type": "directory", "oid": files.folders[path], "size": 0, "path": path}
        else:
            continue
        if path in last:
            entry["lastCommit"] = {"id": last[path].id, "title": last[path].title, "date": iso(last[path].date)}
        shown.append(entry)
    return shown


async def paths_info(request: Request) -> Response:
    data = await body(request, request.app.state.settings.max_json)
    if request.headers.get("content-type", "").startswith("application/json"):
        import json

        try:
            form = json.loads(data)
            paths, expand = [str(path) for path in form["paths"]], bool(form.get("expand"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Refusal(400, "paths must be a list") from None
    else:
        fields = parse_qs(data.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20000)
        paths, expand = fields.get("paths", []), _yes(fields.get("expand", [""])[0])

    def answer() -> Response:
        repo, commit = _at(request)
        wanted = [path.strip("/") for path in dict.fromkeys(paths)]
        return JSONResponse(entries(repo, commit, repo.tree(commit), wanted, expand))

    return await run_in_threadpool(answer)


def commits(request: Request) -> Response:
    repo, commit = _at(request)
    shown = [
        {
            "id": each.id,
            "title": each.title,
            "message": each.message,
            "authors": [{"user": each.author}],
            "date": iso(each.date),
        }
        for each in repo.history(commit)
    ]
    return paged(request, shown, min(request.app.state.settings.page_size, 100))


def resolve(request: Request) -> Response:
    """A file's bytes, whole or by range, with the headers downloads are checked against."""
    repo, commit = _at(request)
    access(request).check_gate(repo)
    path = part(request, "path")
    entry = repo.tree(commit).files.get(path)
    if entry is None:
        raise no_entry(path, commit.id)
    headers = {
        "ETag": f'"{entry.etag}"',
        "X-Repo-Commit": commit.id,
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": FILE_POLICY,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
        "Cache-Control": "no-cache",
    }
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    if f'"{entry.etag}"' == request.headers.get("if-none-match"):
        return Response(status_code=304, headers=headers)
    stored = repo.path_of(entry)
    return _FileAnswer(
        stored, headers=headers, media_type=_media_type(path, repo, entry.sha256 is None), stat_result=stored.stat()
    )


class _FileAnswer(FileResponse):
    chunk_size = 1 << 20  # Each piece is a hop to a thread; 64 KiB pieces halve the speed.


def _media_type(path: str, repo: Repository, regular: bool) -> str:
    """Pictures as what they are, text as text, never HTML; anything else as bytes."""
    ending = "." + path.rpartition(".")[2].lower()
    guess = _SHOWN.get(ending) or mimetypes.guess_type(path)[0] or ""
    if guess.startswith(("image/", "audio/", "video/")) or guess == "application/pdf":
        return guess
    if ending == ".json":
        return "application/json"
    return "text/plain; charset=utf-8" if regular else "application/octet-stream"


def _at(request: Request) -> tuple[Repository, Commit]:
    repo = repository(request)
    return repo, repo.find(part(request, "rev"))


def _yes(value: str | None) -> bool:
    return (value or "").lower() in ("true", "1")


routes = [
    repo_api("/tree/{rev}", tree),
    repo_api("/tree/{rev}/{path:path}", tree),
    repo_api("/paths-info/{rev}", paths_info, "POST"),
    repo_api("/commits/{rev}", commits),
    *repo_pages("/resolve/{rev}/{path:path}", resolve),
    *repo_pages("/raw/{rev}/{path:path}", resolve),
]
