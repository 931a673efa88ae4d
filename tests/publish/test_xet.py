"""To huggingface.co files go by xet. Here the real hf_xet uploads into a folder; the Hub only takes the commit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hubforge.errors import PublishError
from hubforge.events import Event, Progress
from hubforge.hub import HubSettings
from hubforge.publish._client import has_xet
from hubforge.publish.hub import push
from hubforge.publisher import Hub
from tests.fixtures_publish import MakeUpload, digest
from tests.publish.faulty import FaultyHub, Scope


class XetHub(FaultyHub):
    """Hands out a store of xet's own testing scheme, a folder; keeps what is committed and then refuses it."""

    committed: bytes = b""

    async def _serve(self, scope: Scope, receive: Any, send: Any) -> None:
        if "/xet-write-token/" in scope["path"]:
            until = int(time.time()) + 3600
            answer: dict[str, Any] = {"accessToken": "x", "exp": until, "casUrl": f"local://{self.folder}/cas"}
        elif "/commit/" in scope["path"]:
            more = True
            while more:
                message = await receive()
                self.committed += message["body"]
                more = message.get("more_body", False)
            answer = {}
        else:
            await super()._serve(scope, receive, send)
            return
        status = 200 if answer else 400
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


@pytest.fixture
def xet_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[XetHub]:
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("hubforge.publish._push.has_xet", lambda endpoint: True)
    monkeypatch.setattr("hubforge.publish._client.has_xet", lambda endpoint: True)
    monkeypatch.setattr("hubforge.publish._push._ALONE", 4000)
    with XetHub(tmp_path / "hub", HubSettings(lfs_from=2000)) as server:
        yield server


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("https://huggingface.co", True),
        ("https://HuggingFace.co/", True),
        ("https://hub-ci.huggingface.co", True),
        ("http://127.0.0.1:8000", False),
        ("https://hub.example", False),
        ("https://huggingface.co.example", False),
    ],
)
def test_only_huggingface_co_is_taken_to_have_xet(endpoint: str, expected: bool) -> None:
    assert has_xet(endpoint) is expected


def test_by_xet_the_commit_names_the_digests_and_progress_goes_file_by_file(
    xet_hub: XetHub, make_upload: MakeUpload
) -> None:
    one, two = b"1" * 5000, b"2" * 6000
    heard: list[Event] = []
    with pytest.raises(PublishError, match="HTTP 400"):
        push(make_upload({"a.bin": one, "b.bin": two, "c.json": b"{}"}), Hub(xet_hub.endpoint, "any"), heard.append)
    lines = [json.loads(line) for line in xet_hub.committed.splitlines()]
    large = {line["value"]["path"]: line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}
    assert large == {"a.bin": digest(one), "b.bin": digest(two)}
    told = [event.what for event in heard if isinstance(event, Progress)]
    assert told[-2:] == ["a.bin", "b.bin"]


def test_by_xet_a_file_that_changed_on_disk_is_not_committed(xet_hub: XetHub, make_upload: MakeUpload) -> None:
    upload = make_upload({"a.bin": b"1" * 5000})
    path = next(file.content for file in upload.files if file.path == "a.bin")
    assert isinstance(path, Path)
    path.write_bytes(b"1" * 4999 + b"2")
    with pytest.raises(PublishError, match=r"a\.bin is not what was made"):
        push(upload, Hub(xet_hub.endpoint, "any"), lambda event: None)
    assert xet_hub.committed == b""
