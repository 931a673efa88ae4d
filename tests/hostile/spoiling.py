"""An embedded Hub that holds one published release, `me/toy`, and whose answers can be spoiled on their way out."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubforge.hub.app import make_app
from hubforge.hub.server import _listen
from hubforge.hub.settings import HubSettings

Headers = list[tuple[bytes, bytes]]
Body = Callable[[str, bytes], bytes]


class SpoilingHub:
    """`spoil` rewrites bodies, headers and statuses of all answers while its block lasts. Files from 300 bytes: LFS."""

    def __init__(self, folder: Path) -> None:
        import uvicorn

        self.folder = folder
        self._app = make_app(folder, HubSettings(lfs_from=300), host="127.0.0.1")
        self._body: Body | None = None
        self._headers: Callable[[Headers], Headers] | None = None
        self._status: int | None = None
        listening = _listen("127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(self._serve, log_level="critical", lifespan="off", ws="none", interface="asgi3")
        self._server = uvicorn.Server(config)
        run = functools.partial(self._server.run, sockets=[listening])
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def publish(self, world: Path) -> None:
        """Publish the good world as `me/toy`; make `me/other` for those who only talk to the Hub."""
        from huggingface_hub import HfApi

        from hubforge.release import Release
        from tests.hostile.attacks import hubforge

        HfApi(endpoint=self.endpoint, token="local").create_repo("me/other")
        with self._pointed():
            command = ["publish", str(world / "recipe.yaml"), "--to", self.endpoint]
            hubforge("--store", str(world / "store"), "--quiet", *command)
        self.release = Release.model_validate_json(self.file("hubforge.release.json"))

    def file(self, path: str) -> bytes:
        """A file of the release as it was published."""
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", int(self.endpoint.rpartition(":")[2]))
        connection.request("GET", f"/me/toy/resolve/main/{path}")
        data = connection.getresponse().read()
        connection.close()
        return data

    @contextmanager
    def spoil(
        self,
        body: Body | None = None,
        *,
        headers: Callable[[Headers], Headers] | None = None,
        status: int | None = None,
    ) -> Iterator[None]:
        """body(path asked for, true body) -> what is sent. status: of some of the answers."""
        self._body, self._headers, self._status = body, headers, status
        try:
            with self._pointed():
                yield
        finally:
            self._body, self._headers, self._status = None, None, None

    @contextmanager
    def _pointed(self) -> Iterator[None]:
        """The client's own settings name this Hub, and nothing waits long for it."""
        from hubforge import places
        from hubforge.publisher import Hub

        names = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": "hf_local", "HUBFORGE_HUB_TOKEN": "hf_local"}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        places.Hub = functools.partial(Hub, patience=0.2)  # type: ignore[misc, assignment]
        try:
            yield
        finally:
            places.Hub = Hub  # type: ignore[misc]
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def use(self, world: Path, how: str) -> None:
        """One use of this Hub, through the command."""
        from hubforge import masks
        from hubforge.publish._access import check_access
        from hubforge.publisher import Hub
        from tests.hostile.attacks import hubforge

        store = ("--store", str(world / "store"), "--quiet")
        recipe = str(world / "recipe.yaml")
        if how == "verify":
            hubforge(*store, "verify", "me/toy", "--to", self.endpoint)
        elif how == "reproduce":
            hubforge(*store, "--offline", "reproduce", "me/toy", "--to", self.endpoint, "--into", str(world / "again"))
        elif how == "push":
            text = (world / "recipe.yaml").read_text().replace("me/toy", "me/pushed", 1)
            (world / "recipe.yaml").write_text(text.replace("{model: me/pushed}", "{model: ./tuned}"))
            hubforge(*store, "publish", recipe, "--to", self.endpoint)
        elif how == "masks":
            with masks.load("me/toy", endpoint=self.endpoint) as found:
                list(found)
        elif how == "access":
            check_access(Hub(self.endpoint, "hf_local", patience=0.2), ["me/toy", "you/other"])
        else:
            hubforge(*store, "lock", recipe)
            if how == "fetch":
                hubforge(*store, "run", recipe, "blend")

    async def _serve(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if self._body is None and self._headers is None:
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        start: dict[str, Any] = {}

        async def keep(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, keep)
        whole = b"".join(parts)
        head: Headers = [(name.lower(), value) for name, value in start["headers"]]
        body = self._body(scope["path"], whole) if self._body and whole else whole
        if self._headers:
            head = self._headers(head)
        if self._status and len(whole) % 3 == 0:
            start["status"] = self._status
        if scope["method"] != "HEAD":
            head = [pair for pair in head if pair[0] != b"content-length"]
            head.append((b"content-length", str(len(body)).encode()))
        try:
            await send({**start, "headers": head})
            await send({"type": "http.response.body", "body": body})
        except RuntimeError:
            pass  # a header that no server can send
