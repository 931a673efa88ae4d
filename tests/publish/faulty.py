"""A Hub that fails on purpose: an ASGI wrapper around the embedded one, with a schedule of faults.

Faults: a status (an answer in place of the real one, nothing done); "reset" (the connection is gone before anything was
taken); "deaf" (it breaks after half of the request's body was taken); "stall" (no more of the body is taken); "spoilt"
(one byte of it is another); "lost" (done, but the answer never arrives); "cut" (the answer stops half way); "drip" (it
comes a few bytes at a time); "lie" (every digest in it is wrong).
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hubforge.hub import HubSettings
from hubforge.hub.app import make_app

Fault = int | Literal["reset", "deaf", "stall", "spoilt", "lost", "cut", "drip", "lie"]
DONE = (None, "lost", "cut", "drip", "lie")  # with these the Hub did what was asked
Scope = MutableMapping[str, Any]


@dataclass
class FaultyHub:
    """`faults(method, path)` says what goes wrong with a request, or None. `seen` lists them all."""

    folder: Path
    settings: HubSettings
    faults: Callable[[str, str], Fault | None] = lambda method, path: None
    headers: Mapping[str, str] = field(default_factory=dict)  # of answers that are a fault
    seen: list[tuple[str, str, Fault | None]] = field(default_factory=list)
    watch: Callable[[str, str, Fault | None], None] = lambda method, path, fault: None  # after every request
    endpoint: str = ""

    def __enter__(self) -> FaultyHub:
        self.stalled = asyncio.Event()
        self._app = make_app(self.folder, self.settings, host="127.0.0.1")
        connections: dict[Any, asyncio.Transport] = {}

        class Protocol(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                connections[transport.get_extra_info("peername")] = transport
                super().connection_made(transport)

        self._connections = connections
        config = uvicorn.Config(
            self._serve, log_level="critical", lifespan="off", ws="none", interface="asgi3", http=Protocol
        )
        self._server = uvicorn.Server(config)
        # With the protocol named, asyncio turns Nagle's algorithm off; else each answer takes 40 ms.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        self.endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stalled.set()
        self._server.should_exit = True
        self._thread.join(10)

    async def _serve(self, scope: Scope, receive: Any, send: Any) -> None:
        method, path = scope["method"], scope["path"]
        fault = self.faults(method, path)
        self.seen.append((method, path, fault))
        try:
            await self._answer(fault, scope, receive, send)
        finally:
            self.watch(method, path, fault)

    async def _answer(self, fault: Fault | None, scope: Scope, receive: Any, send: Any) -> None:
        if fault is None:
            await self._app(scope, receive, send)
        elif isinstance(fault, int):
            headers = {"content-type": "application/json", **self.headers}
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": fault, "headers": pairs})
            # Some servers and proxies show the request that failed, its headers included.
            asked = {name.decode(): value.decode() for name, value in scope["headers"]}
            await send({"type": "http.response.body", "body": json.dumps({"error": f"no luck: {asked}"}).encode()})
        elif fault == "reset":
            self._connections[scope["client"]].abort()
        elif fault == "deaf":
            await receive()
            await _break_off(send)
        elif fault == "stall":
            await receive()
            await self.stalled.wait()
        elif fault == "spoilt":
            await self._app(scope, _spoilt(receive), send)
        elif fault == "lost":

            async def nowhere(message: Any) -> None:
                pass

            await self._app(scope, receive, nowhere)
            await _break_off(send)
        else:
            await self._app(scope, receive, {"cut": _half, "drip": _dripping, "lie": _lying}[fault](send))


def _spoilt(receive: Any) -> Any:
    async def receiving() -> Any:
        message = await receive()
        if message.get("body"):
            body = bytearray(message["body"])
            body[len(body) // 2] ^= 1
            message = {**message, "body": bytes(body)}
        return message

    return receiving


def _dripping(send: Any) -> Any:
    async def sending(message: Any) -> None:
        body = message.get("body") or b""
        if message["type"] != "http.response.body" or len(body) < 2:
            await send(message)
            return
        size = max(1, len(body) // 5)
        for start in range(0, len(body), size):
            more = start + size < len(body) or message.get("more_body", False)
            await send({**message, "body": body[start : start + size], "more_body": more})
            await asyncio.sleep(0.001)

    return sending


def _lying(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.body" and message.get("body", b"")[:1] in (b"[", b"{"):
            wrong = re.sub(
                rb'"(oid|blobId)":"([0-9a-f]+)"', lambda m: b'"%s":"%s"' % (m[1], m[2][::-1]), message["body"]
            )
            message = {**message, "body": wrong}
        await send(message)

    return sending


def _half(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            message = {**message, "body": message["body"][: len(message["body"]) // 2], "more_body": True}
        await send(message)

    return sending


async def _break_off(send: Any) -> None:
    """An answer that promises ten bytes and ends: the client meets a closed connection."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
