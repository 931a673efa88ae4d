"""For publishing: `hub_of_me`, `make_upload` (a few bytes each), and `sent`, which records and spoils requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from hubforge.front_matter import read_front_matter
from hubforge.hub import HubSettings, LocalHub
from hubforge.publish._sums import sums_text
from hubforge.publisher import Hub, Upload, UploadFile
from hubforge.release import FILE_NAME, SUMS_NAME, CardRecord, File, Release, TargetRecord
from hubforge.sections import sections

TOKEN = "hf_secretsecretsecretsecret"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


MakeUpload = Callable[..., Upload]


@pytest.fixture
def hub_of_me(tmp_path: Path) -> Iterator[Hub]:
    """A Hub of one user, `me`, who has one token; files from 2,000 bytes on are large files."""
    settings = HubSettings(tokens={TOKEN: "me", "hf_somebodyelse": "you"}, lfs_from=2000)
    with LocalHub(tmp_path / "hub", settings=settings) as local:
        yield Hub(local.endpoint, TOKEN)


@pytest.fixture
def make_upload(tmp_path: Path) -> MakeUpload:
    """Builds an Upload: the given files, a card, and the release file and checksums that go with them."""
    made = 0

    def make(
        files: Mapping[str, bytes],
        *,
        repo: str = "me/model",
        folder: str | None = None,
        tag: str | None = None,
        private: bool = False,
        card: str = "---\nlicense: mit\n---\n# A model\n",
        target: str = "weights",
    ) -> Upload:
        nonlocal made
        made += 1
        root = tmp_path / f"made{made}"
        prefix = f"{folder}/" if folder else ""
        contents: dict[str, bytes | Path] = {"README.md": card.encode()}
        for name, data in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            contents[prefix + name] = path

        def listed(path: str, content: bytes | Path) -> UploadFile:
            data = content if isinstance(content, bytes) else content.read_bytes()
            return UploadFile(path, content, len(data), digest(data))

        uploads = [listed(path, content) for path, content in contents.items()]
        release = Release(
            hubforge="0.1.0",
            name="test",
            license="mit",
            recipe_file="test.yaml",
            recipe="name: test\n",
            targets=(
                TargetRecord(
                    name=target,
                    kind="mask" if folder else "model",
                    repo=repo,
                    folder=folder,
                    files=tuple(File(path=one.path, size=one.size, sha256=one.sha256) for one in uploads),
                    card=_record(card),
                ),
            ),
            target=target,
        )
        uploads.append(listed(prefix + FILE_NAME, release.model_dump_json(indent=1).encode()))
        uploads.append(listed(prefix + SUMS_NAME, sums_text(uploads, folder).encode()))
        return Upload(target, repo, tuple(uploads), "Publish test", folder, tag, private)

    return make


def _record(card: str) -> CardRecord | None:
    """What the release file says of a card that has marked sections."""
    found = sections(card)
    return CardRecord(front_matter=dict(read_front_matter(card)), sections=found) if found else None


class Requests(list[str]):
    """What was sent, as "METHOD /path?query", in order."""

    def answer(self, when: Callable[[httpx2.Request], bool], *answers: httpx2.Response | Exception) -> None:
        """Give these answers, one after another, to requests that fit, without sending them."""
        self.planned.append((when, list(answers)))

    def __init__(self) -> None:
        super().__init__()
        self.planned: list[tuple[Callable[[httpx2.Request], bool], list[httpx2.Response | Exception]]] = []
        self.after: list[tuple[Callable[[httpx2.Request], bool], list[Callable[[], None]]]] = []

    def then(self, when: Callable[[httpx2.Request], bool], *actions: Callable[[], None]) -> None:
        """After the first requests that fit were sent and answered, do this, one action each."""
        self.after.append((when, list(actions)))


class _Recording(httpx2.Client):
    def __init__(self, sent: Requests) -> None:
        super().__init__(follow_redirects=True, timeout=None)
        self.sent = sent

    def send(self, request: httpx2.Request, **kwargs: object) -> httpx2.Response:
        if request.url.host != "127.0.0.1":  # the client asks huggingface.co which programs it may run in
            return httpx2.Response(404, request=request)
        self.sent.append(f"{request.method} {request.url.raw_path.decode()}")
        for when, answers in self.sent.planned:
            if answers and when(request):
                answer = answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                answer.request = request
                return answer
        response = super().send(request, **kwargs)
        for when, actions in self.sent.after:
            if actions and when(request):
                actions.pop(0)()
        return response


@pytest.fixture
def sent() -> Iterator[Requests]:
    """Every request of the client from here on; see `Requests` for faults."""
    requests = Requests()
    set_client_factory(lambda: _Recording(requests))
    yield requests
    set_client_factory(default_client_factory)


def json_answer(status: int, body: object, headers: Mapping[str, str] | None = None) -> httpx2.Response:
    return httpx2.Response(status, content=json.dumps(body).encode(), headers=dict(headers or {}))
