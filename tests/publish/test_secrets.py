"""The token is in no output, whatever fails: not in errors, tracebacks, events, logs, or what is printed."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hubforge.errors import HubforgeError
from hubforge.events import Event
from hubforge.hub import HubSettings
from hubforge.publish.hub import check_access, push
from hubforge.publisher import Hub
from hubforge.verify import verify
from tests.fixtures_publish import TOKEN, MakeUpload
from tests.publish.faulty import Fault, FaultyHub, Scope


def at(part: str, fault: Fault) -> Callable[[str, str], Fault | None]:
    return lambda method, path: fault if part in path else None


@pytest.mark.parametrize("part", ["/revision/", "/repos/create", "/tree/", "/preupload/", "/objects/batch", "/commit/"])
@pytest.mark.parametrize("fault", [400, 401, 403, 404, 409, 429, 500, "lost"])
def test_a_hub_that_echoes_the_request_does_not_make_us_print_the_token(
    tmp_path: Path,
    make_upload: MakeUpload,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    part: str,
    fault: Fault,
) -> None:
    monkeypatch.setattr("hubforge.publish._retry.time.sleep", lambda seconds: None)
    heard: list[Event] = []
    errors: list[HubforgeError] = []
    with (
        caplog.at_level(logging.DEBUG),
        FaultyHub(tmp_path / "hub", HubSettings(tokens={TOKEN: "me"}, lfs_from=2000), at(part, fault)) as server,
    ):
        hub = Hub(server.endpoint, TOKEN)
        upload = make_upload({"model.safetensors": b"w" * 5000}, tag="v1")
        for action in (
            lambda: push(upload, hub, heard.append),
            lambda: verify("me/model", hub, report=heard.append),
            lambda: check_access(hub, ["me/model"]),
        ):
            try:
                action()
            except HubforgeError as error:
                errors.append(error)
    assert errors or (fault, part) == ("lost", "/commit/")  # every answer lost, and yet it is done
    assert all(error.what and error.where for error in errors)
    printed = capfd.readouterr()
    written = [text for error in errors for text in (str(error), repr(error), *traceback.format_exception(error))]
    for text in [*written, *map(repr, heard), repr(hub), caplog.text, printed.out, printed.err]:
        assert TOKEN not in text


def test_without_a_token_none_is_sent(tmp_path: Path, make_upload: MakeUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one saved on this machine belongs to another Hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_machine")
    seen: list[str] = []

    class Listening(httpx2.Client):
        def send(self, request: httpx2.Request, **options: object) -> httpx2.Response:
            if request.url.host == "127.0.0.1":
                seen.append(request.headers.get("authorization", ""))
            return super().send(request, **options)  # type: ignore[arg-type]

    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(lambda: Listening(follow_redirects=True))
    try:
        with (
            FaultyHub(tmp_path / "hub", HubSettings(tokens={TOKEN: "me"})) as server,
            pytest.raises(HubforgeError, match="there is no token"),
        ):
            push(make_upload({"config.json": b"1"}), Hub(server.endpoint, None), lambda event: None)
    finally:
        set_client_factory(default_client_factory)
    assert seen and set(seen) == {""}


def test_a_download_that_is_sent_elsewhere_does_not_take_the_token_along(
    tmp_path: Path, make_upload: MakeUpload
) -> None:
    """As the real Hub does with large files, which lie on another host."""

    class Storage(FaultyHub):
        async def _serve(self, scope: Scope, receive: Any, send: Any) -> None:
            self.asked = {name.decode(): value.decode() for name, value in scope["headers"]}
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"w" * 5000})

    class Redirecting(FaultyHub):
        async def _serve(self, scope: Scope, receive: Any, send: Any) -> None:
            if scope["path"].endswith("/model.safetensors"):
                headers = [(b"location", f"{storage.endpoint}/blob".encode())]
                await send({"type": "http.response.start", "status": 302, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
            else:
                await super()._serve(scope, receive, send)

    settings = HubSettings(tokens={TOKEN: "me"}, lfs_from=2000)
    with Storage(tmp_path / "other", settings) as storage, Redirecting(tmp_path / "hub", settings) as server:
        hub = Hub(server.endpoint, TOKEN)
        push(make_upload({"model.safetensors": b"w" * 5000}), hub, lambda event: None)
        assert verify("me/model", hub, deep=True).folders[0].downloaded == 2
        assert "authorization" not in storage.asked
