"""The whole Hub as one ASGI application: the wire, the pages, and what every answer carries."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hubforge import __version__
from hubforge.hub.refusal import Refusal
from hubforge.hub.settings import HubSettings, is_loopback
from hubforge.hub.storage.shelf import Shelf
from hubforge.hub.wire import collections, commits, files, lfs, oauth, refs, repos, talk
from hubforge.hub.wire.access import Signer
from hubforge.hub.wire.quotas import Quotas, asker_of
from hubforge.hub.wire.request import Moved, gone, lost, moved, refused, request_id

# `refs/pr/1` may also come unquoted, as people write it; routes know it as one segment.
_REFS: Final = re.compile(r"/refs/(pr|heads|tags|convert)/([^/]+)")


def make_app(folder: Path, settings: HubSettings, *, host: str) -> ASGIApp:
    """The application that serves a folder. host: where it will listen; decides which names it answers to."""
    shelf = Shelf(folder)

    def hello(request: Request) -> Response:
        return JSONResponse({"hubforge": __version__, "id": shelf.about["id"]})

    def missing(request: Request) -> Response:
        raise Refusal(404, "Not found")

    wire: list[BaseRoute] = [
        Route("/api/hubforge", hello),
        Route("/api/agent-harnesses", missing),  # Every start of the hf command asks; 404 is what it expects.
        *oauth.routes,
        *talk.routes,
        *collections.routes,
        *refs.routes,
        *commits.routes,
        *lfs.routes,
        *files.routes,
        *repos.routes,
    ]
    app = Starlette(
        routes=[*wire, *_pages(), Route("/{rest:path}", _unknown, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])],
        exception_handlers={Refusal: refused, Moved: moved, ClientDisconnect: gone, FileNotFoundError: lost},
    )
    app.state.shelf, app.state.settings, app.state.signer = shelf, settings, Signer(shelf.about["secret"])
    app.state.quotas = Quotas(settings)
    return _Edge(app, settings, app.state.quotas, any_host=not is_loopback(host))


def _pages() -> list[BaseRoute]:
    """The pages, imported when the first one is asked for: a push needs no template engine."""

    def later(name: str) -> Callable[[Request], Response]:
        def page(request: Request) -> Response:
            from hubforge.hub.pages import views

            view: Callable[[Request], Response] = getattr(views, name)
            return view(request)

        return page

    from hubforge.hub.wire.request import repo_pages

    return [
        Route("/", later("index")),
        Route("/style.css", later("style")),
        Route("/login", later("login_form")),
        Route("/login", _login, methods=["POST"]),
        Route("/collections/{ns}/{slug}", later("collection")),
        *repo_pages("", later("card")),
        *repo_pages("/tree/{rev}", later("folder")),
        *repo_pages("/tree/{rev}/{path:path}", later("folder")),
        *repo_pages("/blob/{rev}/{path:path}", later("blob")),
        *repo_pages("/commits/{rev}", later("history")),
        *repo_pages("/commit/{rev}", later("commit")),
        *repo_pages("/discussions", later("discussion_list")),
        *repo_pages("/discussions/{number:int}", later("discussion")),
        Route("/{ns}", later("index")),
    ]


async def _login(request: Request) -> Response:
    from hubforge.hub.pages import views

    return await views.login(request)


def _unknown(request: Request) -> Response:
    """Nothing here. Below /api and for files of `gpt2`-like ids the client wants to hear which kind of nothing."""
    path = str(request.scope["path"])
    if re.match(r"/api/(models|datasets|spaces|kernels)/", path) or "/resolve/" in path:
        raise Refusal(404, "Repository not found", "RepoNotFound")
    raise Refusal(404, "Not found")


class _Edge:
    """Around everything: raw paths for the router, a request id for people, quotas, no answers to strangers' hosts."""

    def __init__(self, app: ASGIApp, settings: HubSettings, quotas: Quotas, *, any_host: bool) -> None:
        self.app, self.quotas, self.any_host = app, quotas, any_host
        self.hosts = settings.hosts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["path"] = _REFS.sub(r"/refs%2F\1%2F\2", scope["raw_path"].decode("latin-1"))
        headers = dict(scope["headers"])
        every = {"X-Request-Id": request_id()}

        async def send_with_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(every)
            await send(message)

        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if not (self.any_host or is_loopback(name) or name in self.hosts):
            # A page elsewhere whose name was pointed here (DNS rebinding) would read what is on this machine.
            refusal = PlainTextResponse(f"This Hub does not answer to the name {name!r}", 421)
            await refusal(scope, receive, send_with_more)
            return
        limits, over = self.quotas.spend(scope["path"], asker_of(headers, scope.get("client")))
        every |= limits
        if over is not None:
            await refused(Request(scope), over)(scope, receive, send_with_more)
            return
        await self.app(scope, receive, send_with_more)
