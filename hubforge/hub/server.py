"""Starting and stopping a Hub: here until interrupted, in a thread, or in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hubforge.errors import HubforgeError
from hubforge.hub.disk import locked, write_whole
from hubforge.hub.settings import HubSettings, check_bind

if TYPE_CHECKING:
    import uvicorn
    from huggingface_hub import HfApi


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the socket says it is TCP: 2 ms a request instead of 44.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(512)
    except OSError as error:
        listening.close()
        raise HubforgeError(
            f"the embedded Hub cannot listen on {host}:{port}: {error.strerror or error}",
            where="hub serve",
            mend="Name another --port, or 0 for a free one.",
        ) from error
    return listening


def _address(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _server(folder: Path, settings: HubSettings, host: str) -> uvicorn.Server:
    try:
        import uvicorn

        from hubforge.hub.app import make_app
    except ModuleNotFoundError as error:
        raise HubforgeError(
            f"the embedded Hub needs {error.name}, which is not installed",
            where="hub serve",
            mend="pip install 'hubforge[hub]'",
        ) from error
    config = uvicorn.Config(
        make_app(folder, settings, host=host),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        # Longer than the client keeps a connection (5 s): else its next request, a commit perhaps, meets a closed one.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        backlog=512,
    )
    return uvicorn.Server(config)


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    settings: HubSettings | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a folder until interrupted. ready: called with the address once connections are taken."""
    settings = settings or HubSettings()
    check_bind(host, settings)
    server = _server(folder, settings, host)
    listening = _listen(host, port)
    if ready:
        ready(_address(host, listening))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


class LocalHub:
    """A Hub in a thread of this process, on a free port that is known once the block is entered."""

    def __init__(
        self, folder: Path, *, host: str = "127.0.0.1", port: int = 0, settings: HubSettings | None = None
    ) -> None:
        self.folder, self.settings = Path(folder), settings or HubSettings()
        self._host, self._port = host, port
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.endpoint = ""

    def start(self) -> LocalHub:
        check_bind(self._host, self.settings)
        self._server = _server(self.folder, self.settings, self._host)
        listening = _listen(self._host, self._port)
        self._port = listening.getsockname()[1]  # The same after a restart.
        self.endpoint = _address(self._host, listening)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="local-hub", daemon=True
        )
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        return self

    def close(self) -> None:
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join(10)
        self._server = self._thread = None

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def api(self, token: str | bool = "local") -> HfApi:
        """The real client, pointed here. Uploads of large files also need HF_HUB_DISABLE_XET=1."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=token)

    def set_scan(self, repo: str, files: Mapping[str, str] | None, *, done: bool = True) -> None:
        """Say what a security scan found in a repository: path -> `safe`, `unsafe`, `queued` ... See `set_scan`."""
        from hubforge.hub.storage.scans import set_scan

        set_scan(self.folder, repo, files, done=done)


def _answers(endpoint: str, id: str) -> bool:
    """Whether the Hub of that id listens at an address."""
    address = urlsplit(endpoint)
    try:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)
        with contextlib.closing(connection):
            connection.request("GET", "/api/hubforge")
            return bool(json.loads(connection.getresponse().read())["id"] == id)
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return False


def _running(folder: Path) -> dict[str, Any] | None:
    """server.json of the background Hub of a folder, if it still answers."""
    try:
        running: dict[str, Any] = json.loads((folder / "locks" / "server.json").read_bytes())
        id = json.loads((folder / "hub.json").read_bytes())["id"]
        return running if _answers(running["endpoint"], id) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ensure_running(folder: Path, *, port: int = 0, user: str = "local", wait: float = 20.0) -> str:
    """The address of a Hub that serves a folder in a process of its own; starts one unless it runs already.

    It outlives this process; `stop_running` ends it. Its output goes to `locks/server.log` in the folder.
    """
    folder = folder.absolute()
    with locked(folder / "locks" / "server.lock"):
        if running := _running(folder):
            return str(running["endpoint"])
        record, log = folder / "locks" / "server.json", folder / "locks" / "server.log"
        record.unlink(missing_ok=True)
        command = [sys.executable, "-m", "hubforge.hub", str(folder), "--port", str(port), "--user", user]
        with log.open("ab") as output:
            child = subprocess.Popen(
                [*command, "--record", str(record)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C at this terminal does not reach it.
            )
        until = time.monotonic() + wait
        while time.monotonic() < until and child.poll() is None:
            if running := _running(folder):
                return str(running["endpoint"])
            time.sleep(0.02)
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        if child.poll() is None:
            child.kill()
        raise HubforgeError(f"the embedded Hub did not start: {last[0]}", where=str(folder), mend=f"See {log}.")


def stop_running(folder: Path, wait: float = 10.0) -> bool:
    """End the background Hub of a folder; False when none was running."""
    running = _running(folder.absolute())
    if running is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(running["pid"]), signal.SIGTERM)
    until = time.monotonic() + wait
    while time.monotonic() < until and _running(folder.absolute()):
        time.sleep(0.05)
    return True


def write_record(path: Path, endpoint: str) -> None:
    """Leave the address and process id where `ensure_running` looks."""
    write_whole(path, json.dumps({"endpoint": endpoint, "pid": os.getpid()}).encode())
