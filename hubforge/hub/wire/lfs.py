"""Git LFS: large files, uploaded whole or in parts, straight to disk."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hubforge.hub.names import is_sha256, kind_of
from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.objects import Objects
from hubforge.hub.wire.request import access, endpoint, part, repo_api, repo_pages, repository, with_json

_PIECE = 1 << 20
_MEDIA = "application/vnd.git-lfs+json"


def batch(request: Request, data: dict[str, Any]) -> Response:
    """Where to upload each object, or nothing to do for those that are stored already."""
    upload = data.get("operation") == "upload"
    repo = repository(request)
    who = access(request)
    if upload and "ref" in data:
        who.check_write(repo.kind, repo.id)
    elif upload:
        who.check_may_propose(repo)  # Without `ref` it is for a pull request, which whoever may read can open.
    if not upload:
        who.check_gate(repo)
    objects = data.get("objects")
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise Refusal(400, "'objects' must be a list")
    transfers = data.get("transfers")
    multipart = isinstance(transfers, list) and "multipart" in transfers
    settings = request.app.state.settings
    transfer = "basic"
    shown = []
    for each in objects:
        oid, size = each.get("oid"), each.get("size")
        answer: dict[str, Any] = {"oid": oid, "size": size}
        shown.append(answer)
        if not is_sha256(oid) or not isinstance(size, int) or size < 0:
            answer["error"] = {"code": 422, "message": "An object needs a sha256 and a size"}
            continue
        stored = repo.objects.keep_lfs(oid) if upload else repo.objects.lfs_size(oid)
        if not upload:
            if stored is None:
                answer["error"] = {"code": 404, "message": "Object does not exist"}
            else:
                href = f"{endpoint(request)}/_lfs/{_grant(request, 'download', repo.kind, repo.id, oid, stored)}"
                answer["actions"] = {"download": {"href": href}}
        elif size > settings.max_lfs:
            answer["error"] = {"code": 413, "message": f"More than {settings.max_lfs} bytes"}
        elif stored is not None:
            if stored != size:
                answer["error"] = {"code": 422, "message": f"This sha256 is stored with {stored} bytes, not {size}"}
        elif multipart and size > settings.multipart_from:
            answer["actions"] = _in_parts(request, repo.kind, repo.id, oid, size)
            transfer = "multipart"
        else:
            href = f"{endpoint(request)}/_lfs/{_grant(request, 'upload', repo.kind, repo.id, oid, size)}"
            answer["actions"] = {"upload": {"href": href}, "verify": {"href": _verify_at(request)}}
    if transfer == "multipart" and any(
        "header" not in each["actions"]["upload"] for each in shown if "actions" in each
    ):
        transfer = "basic"  # Mixed answers; the client tells them apart by the presence of chunk_size.
    return JSONResponse({"transfer": transfer, "objects": shown}, media_type=_MEDIA)


def _verify_at(request: Request) -> str:
    return f"{endpoint(request)}{str(request.scope['path']).removesuffix('/batch')}/verify"


def _grant(request: Request, action: str, kind: str, id: str, oid: str, size: int, **more: Any) -> str:
    grant = {"action": action, "kind": kind, "id": id, "oid": oid, "size": size, **more}
    signed: str = request.app.state.signer.sign(grant)
    return signed


def _in_parts(request: Request, kind: str, id: str, oid: str, size: int) -> dict[str, Any]:
    part_size = request.app.state.settings.part_size
    grant = _grant(request, "parts", kind, id, oid, size, upload=secrets.token_hex(16), part_size=part_size)
    href = f"{endpoint(request)}/_lfs/{grant}"
    header = {"chunk_size": str(part_size)}
    header |= {f"{number:05d}": f"{href}/{number}" for number in range(1, math.ceil(size / part_size) + 1)}
    return {"upload": {"href": href, "header": header}, "verify": {"href": _verify_at(request)}}


def _opened(request: Request, action: str) -> tuple[Objects, dict[str, Any]]:
    grant: dict[str, Any] = request.app.state.signer.open(part(request, "grant"))
    if grant["action"] != action:
        raise Refusal(403, f"This address is not for {action}")
    return request.app.state.shelf.get(kind_of(grant["kind"]), grant["id"]).objects, grant


async def upload(request: Request) -> Response:
    """A whole file. It gets its name only if size and sha256 are what the batch announced."""
    objects, grant = _opened(request, "upload")
    with objects.receive(grant["oid"], grant["size"]) as receiving:
        held = bytearray()
        async for piece in request.stream():
            held += piece
            if len(held) >= _PIECE:
                await run_in_threadpool(receiving.write, held)
                held = bytearray()
        await run_in_threadpool(receiving.write, held)
        await run_in_threadpool(receiving.finish)
    return Response()


def download(request: Request) -> Response:
    from starlette.responses import FileResponse

    objects, grant = _opened(request, "download")
    return FileResponse(objects.lfs(grant["oid"]))


_writing: Counter[str] = Counter()  # Parts being written now, by upload; touched only on the event loop.


async def upload_part(request: Request) -> Response:
    """One part, written to its place in the file."""
    objects, grant = _opened(request, "parts")
    number = int(part(request, "number"))
    start = (number - 1) * grant["part_size"]
    length = min(grant["part_size"], grant["size"] - start)
    if number < 1 or length <= 0:
        raise Refusal(404, f"No part {number}")
    upload = grant["upload"]
    _writing[upload] += 1
    received = 0
    try:
        with await run_in_threadpool(objects.write_part, upload, start) as handle:
            async for piece in request.stream():
                received += len(piece)
                if received > length:
                    raise Refusal(422, f"Part {number} has more than {length} bytes")
                await run_in_threadpool(handle.write, piece)
    finally:
        _writing[upload] -= 1
        if not _writing[upload]:
            del _writing[upload]
    if received != length:
        raise Refusal(422, f"Part {number} has {received} bytes, not {length}")
    return Response(headers={"ETag": f'"{upload}-{number}"'})


async def complete(request: Request) -> Response:
    """All parts are there: check the whole and name it."""
    objects, grant = _opened(request, "parts")
    if _writing[grant["upload"]]:
        raise Refusal(409, "A part is still being written")
    await run_in_threadpool(objects.join_parts, grant["upload"], grant["oid"], grant["size"])
    return JSONResponse({"success": True})


def verify(request: Request, data: dict[str, Any]) -> Response:
    repo = repository(request)
    stored = repo.objects.lfs_size(data["oid"]) if is_sha256(data.get("oid")) else None
    if stored is None or stored != data.get("size"):
        raise Refusal(404, "Object does not exist or has another size")
    return JSONResponse({}, media_type=_MEDIA)


def no_xet(request: Request) -> Response:
    """This Hub stores no xet chunks; the client shows this sentence instead of a bare 404."""
    raise Refusal(404, "This Hub takes large files through LFS: set HF_HUB_DISABLE_XET=1")


# The client asks for `me/model.git/info/...`, so the repository's name ends at `.git`.
routes = [
    *repo_pages(".git/info/lfs/objects/batch", with_json(batch), "POST"),
    *repo_pages(".git/info/lfs/objects/verify", with_json(verify), "POST"),
    Route("/_lfs/{grant}", upload, methods=["PUT"]),
    Route("/_lfs/{grant}", complete, methods=["POST"]),
    Route("/_lfs/{grant}", download, methods=["GET"]),
    Route("/_lfs/{grant}/{number:int}", upload_part, methods=["PUT"]),
    repo_api("/xet-write-token/{rev}", no_xet),
    repo_api("/xet-read-token/{rev}", no_xet),
]
