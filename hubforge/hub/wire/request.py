"""From a request to a repository one may use, and from a refusal to an answer."""

from __future__ import annotations

import functools
import inspect
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from hubforge.hub.names import KINDS, Kind
from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.repository import Repository
from hubforge.hub.wire.access import Access

Handler = Callable[[Request], Response | Awaitable[Response]]
COOKIE = "hub_token"


def access(request: Request) -> Access:
    """Who is asking. A token that is not known is refused at once, as the real Hub does."""
    found: Access | None = getattr(request.state, "access", None)
    if found is None:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secret.strip():
            found = Access.of(secret.strip(), request.app.state.settings, request.app.state.signer)
        elif request.method in ("GET", "HEAD") and COOKIE in request.cookies:
            # Only for looking: a page elsewhere can make a browser send cookies, but not a bearer token.
            settings, signer = request.app.state.settings, request.app.state.signer
            found = Access.of(request.cookies[COOKIE], settings, signer, lenient=True)
        else:
            found = Access(None)
        request.state.access = found
    return found


def part(request: Request, name: str) -> str:
    """A piece of the address, unquoted. Routes match the raw path, so a revision may hold `%2F`."""
    try:
        return unquote(str(request.path_params.get(name, "")), errors="strict")
    except UnicodeDecodeError:
        raise Refusal(400, "The address is not UTF-8") from None


def kind_in(request: Request) -> Kind:
    kind = str(request.path_params.get("kind", "models"))
    for each in KINDS:
        if each == kind:
            return each
    raise Refusal(404, "Not found")


class Moved(Exception):
    """The repository has another name now: its address there."""


def repository(request: Request, *, write: bool = False) -> Repository:
    """The repository an address names, if the asker may see it (and, for `write`, change it).

    One that was moved is found by its old name: who reads is sent to the new one, who writes need not notice.
    """
    who, ns, name = access(request), part(request, "ns"), part(request, "name")
    repo = who.check(request.app.state.shelf, kind_in(request), f"{ns}/{name}", write)
    if repo.id != f"{ns}/{name}" and request.method in ("GET", "HEAD"):
        old = f"/{request.path_params['ns']}/{request.path_params['name']}"
        path = str(request.scope["path"]).replace(old, f"/{repo.id}", 1)
        raise Moved(f"{path}?{request.url.query}" if request.url.query else path)
    return repo


def moved(request: Request, error: Exception) -> Response:
    """307, and relative, as the client follows it with its token."""
    return RedirectResponse(str(error), 307)


def endpoint(request: Request) -> str:
    """This Hub's address as the asker knows it."""
    named: str | None = request.app.state.settings.endpoint
    return named.rstrip("/") if named else f"{request.url.scheme}://{request.headers.get('host') or request.url.netloc}"


async def body(request: Request, limit: int) -> bytes:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise Refusal(413, f"The request is larger than {limit} bytes")
    return bytes(data)


def with_json(handler: Callable[[Request, dict[str, Any]], Response]) -> Handler:
    """A handler of a JSON object (an empty body counts as `{}`), run in a thread."""

    async def handle(request: Request) -> Response:
        data = await body(request, request.app.state.settings.max_json)
        try:
            value = json.loads(data) if data.strip() else {}
        except (ValueError, RecursionError):
            raise Refusal(400, "The request is not JSON") from None
        if not isinstance(value, dict):
            raise Refusal(400, "The request is not a JSON object")
        return await run_in_threadpool(handler, request, value)

    return handle


def text_of(data: dict[str, Any], key: str, default: str = "") -> str:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise Refusal(400, f"{key!r} must be a string")
    return value


def repo_api(verb: str, handler: Handler, *methods: str) -> Route:
    """A route below `/api/models/ns/name`, for every kind of repository."""
    return Route("/api/{kind}/{ns}/{name}" + verb, handler, methods=list(methods) or ["GET"])


def repo_pages(rest: str, handler: Handler, *methods: str) -> list[Route]:
    """Routes below `/ns/name`, and the same with `/datasets` and so on before it."""
    wanted = list(methods) or ["GET"]
    return [
        *(
            Route("/{kind}/{ns}/{name}".replace("{kind}", kind) + rest, _of(kind, handler), methods=wanted)
            for kind in KINDS[1:]
        ),
        Route("/{ns}/{name}" + rest, handler, methods=wanted),
    ]


def _of(kind: Kind, handler: Handler) -> Handler:
    if inspect.iscoroutinefunction(handler):

        @functools.wraps(handler)
        async def waiting(request: Request) -> Response:
            request.path_params["kind"] = kind
            answer: Response = await handler(request)
            return answer

        return waiting

    @functools.wraps(handler)
    def plain(request: Request) -> Response:
        request.path_params["kind"] = kind
        answer = handler(request)
        assert isinstance(answer, Response)
        return answer

    return plain


def refused(request: Request, error: Exception) -> Response:
    """The answer the client maps to its exceptions: JSON, X-Error-Code and X-Error-Message."""
    assert isinstance(error, Refusal)
    # A header holds one line of printable ASCII; the whole sentence is in the body.
    line = "".join(letter if " " <= letter <= "~" else "?" for letter in " ".join(error.message.split())[:400])
    headers = {**error.headers, "X-Error-Message": line.strip()}  # A space at its end is no header.
    if error.code:
        headers["X-Error-Code"] = error.code
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.message, **error.more}, error.status, headers)


def gone(request: Request, error: Exception) -> Response:
    """A client that left in the middle of its upload: nobody reads this answer."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=400)


def lost(request: Request, error: Exception) -> Response:
    """A stored file is not there: its repository was deleted meanwhile, or someone took it from the folder."""
    try:
        if "ns" in request.path_params:  # Addresses of uploads name no repository, and may be tried again.
            repository(request)
    except Refusal as refusal:
        return refused(request, refusal)
    except Moved as error:
        return moved(request, error)
    return JSONResponse({"error": "A stored file is missing from the Hub's folder"}, 500)


def request_id() -> str:
    return f"Root=1-{secrets.token_hex(12)}"
