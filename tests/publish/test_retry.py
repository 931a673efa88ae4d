"""Limits, faults and lost answers: what is waited for, what is sent again, and what is not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubforge.errors import PublishError
from hubforge.events import Event, Progress, Warned, silent
from hubforge.hub import HubSettings
from hubforge.publish._explain import HubError
from hubforge.publish._retry import Retry
from hubforge.publish.hub import push
from hubforge.publisher import Hub, Upload
from hubforge.verify import verify
from tests.fixtures_publish import TOKEN, MakeUpload, Requests
from tests.publish.faulty import Fault, FaultyHub

BIG = b"w" * 300_000


@pytest.fixture(autouse=True)
def lfs(lfs_transport: None) -> None:
    """The test's own calls go through LFS too."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that we, or the client, would have slept."""
    slept: list[float] = []
    monkeypatch.setattr("hubforge.publish._retry.time.sleep", slept.append)
    return slept


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyHub]:
    with FaultyHub(tmp_path / "hub", HubSettings(tokens={TOKEN: "me"}, lfs_from=2000)) as server:
        yield server


def once(method: str, part: str, *faults: Fault) -> Callable[[str, str], Fault | None]:
    """These faults, one after another, for requests with that method whose path holds that part."""
    left = list(faults)

    def fault(asked: str, path: str) -> Fault | None:
        return left.pop(0) if left and asked == method and part in path else None

    return fault


def commits(server: FaultyHub) -> list[str]:
    return [commit.title for commit in HfApi(server.endpoint, token=TOKEN).list_repo_commits("me/model")]


def error(**fields: object) -> HubError:
    return HubError("x", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        pytest.param(error(status=429, wait=56.0), [56.0, 56.0, 56.0], id="429 that says when"),
        pytest.param(error(status=429), [30.0, 60.0, 120.0, 240.0, 480.0, 600.0, 600.0], id="429 that does not"),
        pytest.param(error(status=503), [1.0, 2.0, 4.0, 8.0, 16.0, None], id="503"),
        pytest.param(error(trouble="dropped"), [1.0, 2.0, 4.0, 8.0, 16.0, None], id="dropped"),
        pytest.param(error(trouble="unreachable"), [1.0, 2.0, None], id="refused connection"),
        pytest.param(error(status=412), [None], id="412"),
        pytest.param(error(status=403), [None], id="403"),
        pytest.param(error(trouble="nonsense"), [None], id="nonsense"),
    ],
)
def test_the_table_of_waits(failure: HubError, expected: list[float | None]) -> None:
    assert [Retry().wait_for(failure, tries) for tries in range(len(expected))] == expected


def test_what_the_client_has_retried_is_not_retried_again_but_for_limits() -> None:
    assert Retry().wait_for(error(status=503), 0, client_retries=True) is None
    assert Retry().wait_for(error(status=429), 0, client_retries=True) == 30.0


def test_waiting_is_counted_on_the_progress_line() -> None:
    heard: list[Event] = []
    Retry(heard.append, "publish.weights").wait(2.3, "waiting for the Hub")
    shown = [(event.what, event.done, event.total) for event in heard if isinstance(event, Progress)]
    assert shown == [("waiting for the Hub", 1.0, 2.3), ("waiting for the Hub", 2.0, 2.3)]


def test_patience_that_ends_says_how_to_give_more() -> None:
    retry = Retry(patience=10, sleep=lambda seconds: None)
    with pytest.raises(HubError, match="it would take another 30 s, and all waiting is to stay below 10 s") as caught:
        retry.pause(error(status=429), 0)
    assert "--patience 2h" in str(caught.value)


def test_waiting_ends_with_patience() -> None:
    slept: list[float] = []
    retry = Retry(patience=100, sleep=slept.append)

    def limited() -> None:
        raise error(status=429)

    with pytest.raises(HubError):
        retry.call(limited)
    assert slept == [30.0, 60.0]  # the third, of 120 s, would have passed 100


def test_a_hub_in_trouble_is_waited_for_and_says_so(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float]
) -> None:
    faulty.faults = once("GET", "/revision/", 503, 502)
    heard: list[Event] = []
    push(make_upload({"model.safetensors": BIG}), Hub(faulty.endpoint, TOKEN), heard.append)
    assert waits == [1.0, 2.0]
    told = [event.text for event in heard if isinstance(event, Warned)]
    assert "in trouble (HTTP 503)" in told[0] and told[0].endswith("trying again in 1 s")


def test_a_limit_on_commits_is_waited_out_as_long_as_the_hub_says(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float]
) -> None:
    faulty.faults = once("POST", "/commit/", 429)
    faulty.headers = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=1000;w=300'}
    push(make_upload({"config.json": b"1"}), Hub(faulty.endpoint, TOKEN), silent)
    assert waits == [56.0]
    assert commits(faulty)[0] == "Publish test"


def test_a_quota_that_the_header_does_not_show_is_waited_for_longer(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float]
) -> None:
    faulty.faults = once("POST", "/commit/", 429, 429)
    faulty.headers = {"RateLimit": '"api";r=900;t=55'}  # there are requests left: this is not why
    push(make_upload({"config.json": b"1"}), Hub(faulty.endpoint, TOKEN), silent)
    assert waits == [30.0, 60.0]


def test_the_client_may_not_sleep_beyond_patience(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float]
) -> None:
    """The client itself would wait an hour for this upload, without a word."""
    faulty.faults = once("POST", "/preupload/", 429)
    faulty.headers = {"RateLimit": '"api";r=0;t=3600'}
    with pytest.raises(PublishError, match="takes no more requests from this account for 3601 s"):
        push(make_upload({"config.json": b"1"}), Hub(faulty.endpoint, TOKEN), silent)
    assert waits == []


@pytest.mark.parametrize("fault", ["lost", "deaf", "cut", 502, 504])
def test_a_commit_in_doubt_is_looked_for_and_made_once(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float], fault: Fault
) -> None:
    faulty.faults = once("POST", "/commit/", fault)
    upload = make_upload({"model.safetensors": BIG, "config.json": b"1"}, tag="v1")
    told = push(upload, Hub(faulty.endpoint, TOKEN), silent)
    assert commits(faulty).count("Publish test") == 1
    sent = [path for method, path, _ in faulty.seen if method == "POST" and "/commit/" in path]
    assert len(sent) == (1 if fault in ("lost", "cut") else 2)
    assert verify("me/model", Hub(faulty.endpoint, TOKEN), revision="v1").commit == told["commit"]


@pytest.mark.parametrize("fault", ["lost", "deaf", 500, 503])
def test_an_upload_that_fails_half_way_is_sent_again_whole(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float], fault: Fault
) -> None:
    faulty.faults = once("PUT", "/", fault)
    push(make_upload({"model.safetensors": BIG}), Hub(faulty.endpoint, TOKEN), silent)
    verify("me/model", Hub(faulty.endpoint, TOKEN), deep=True)
    assert len([1 for method, _, _ in faulty.seen if method == "PUT"]) == 2


def test_an_upload_that_stalls_is_broken_off_and_sent_again(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub takes the first bytes of a file larger than all buffers on the way, and then no more."""
    monkeypatch.setattr("hubforge.publish._client.STALLED", 0.2)
    faulty.faults = once("PUT", "/", "stall")
    heard: list[Event] = []
    push(make_upload({"model.safetensors": b"w" * (24 << 20)}), Hub(faulty.endpoint, TOKEN), heard.append)
    verify("me/model", Hub(faulty.endpoint, TOKEN))
    assert [fault for method, _, fault in faulty.seen if method == "PUT"] == ["stall", None]
    (told,) = [event.text for event in heard if isinstance(event, Warned)]  # one line a retry
    assert " thrown while requesting PUT http://" in told and told.endswith("; Retrying in 1s [Retry 1/5].")


@pytest.mark.parametrize("fault", ["lost", 503])
def test_a_tag_in_doubt_is_on_the_commit(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float], fault: Fault
) -> None:
    faulty.faults = once("POST", "/tag/", fault)
    told = push(make_upload({"config.json": b"1"}, tag="v1"), Hub(faulty.endpoint, TOKEN), silent)
    (tag,) = HfApi(faulty.endpoint, token=TOKEN).list_repo_refs("me/model").tags
    assert tag.target_commit == told["commit"]


def test_a_hub_that_always_says_stale_is_given_up_with_one_clear_error(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float]
) -> None:
    faulty.faults = lambda method, path: 412 if "/commit/" in path else None
    with pytest.raises(PublishError, match="somebody else committed in the meantime") as caught:
        push(make_upload({"config.json": b"1"}), Hub(faulty.endpoint, TOKEN), silent)
    assert "Run the same command again" in str(caught.value)


def test_nothing_answers(make_upload: MakeUpload, waits: list[float]) -> None:
    with pytest.raises(PublishError, match=r"nothing answers at http://127\.0\.0\.1:9") as caught:
        push(make_upload({"config.json": b"1"}), Hub("http://127.0.0.1:9", TOKEN), silent)
    assert "hubforge hub serve" in str(caught.value) and waits == [1.0, 2.0]


def test_a_hub_that_takes_the_request_and_never_answers_is_given_up(
    make_upload: MakeUpload, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr("hubforge.publish._client._SILENCE", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as silence:
        address = f"http://127.0.0.1:{silence.getsockname()[1]}"
        with pytest.raises(PublishError, match="the Hub took too long to answer"):
            push(make_upload({"config.json": b"1"}), Hub(address, TOKEN), silent)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


_OTHER = """
import json, sys
from pathlib import Path
from hubforge.events import silent
from hubforge.publisher import Hub, Upload, UploadFile
from hubforge.publish.hub import push
endpoint, token, files = json.loads(sys.argv[1])
listed = tuple(UploadFile(path, Path(content), size, sha256) for path, content, size, sha256 in files)
push(Upload("weights", "me/model", listed, "Publish test"), Hub(endpoint, token), silent)
"""


def test_two_publishers_of_one_release_make_one_commit(
    faulty: FaultyHub, make_upload: MakeUpload, sent: Requests, tmp_path: Path
) -> None:
    """The second finds, when its commit is refused as stale, that everything is there already."""
    hub = Hub(faulty.endpoint, TOKEN)
    push(make_upload({"config.json": b"0"}), hub, silent)
    upload = make_upload({"model.safetensors": BIG})
    files = []
    for file in upload.files:
        path = tmp_path / "same" / file.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.content if isinstance(file.content, bytes) else file.content.read_bytes())
        files.append((file.path, str(path), file.size, file.sha256))

    def other() -> None:
        argument = json.dumps([faulty.endpoint, TOKEN, files])
        subprocess.run([sys.executable, "-c", _OTHER, argument], check=True, timeout=60)

    sent.then(lambda request: "/preupload/" in request.url.path, other)
    push(upload, hub, silent)
    assert [fault for _, path, fault in faulty.seen if "/commit/" in path] == [None] * 3  # first, theirs, ours refused
    assert commits(faulty).count("Publish test") == 2
    verify("me/model", hub)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_schedules_of_faults_of_one_push_straight_to_main(
    faulty: FaultyHub, make_upload: MakeUpload, waits: list[float], seed: int
) -> None:
    publish_under_faults(faulty, make_upload, seed)


def publish_under_faults(server: FaultyHub, make_upload: MakeUpload, seed: int) -> None:
    """Two releases, one after the other, while a quarter of all requests fail in ways drawn from the seed.

    What push calls done is there and verifies; main only ever holds whole releases; running again converges; no
    release is committed twice; and no file that arrived is sent again.
    """
    draw = random.Random(seed)
    hub = Hub(server.endpoint, TOKEN)
    releases = [
        make_upload({"model.safetensors": BIG, "old.json": b"1"}, tag="v1"),
        make_upload({"model.safetensors": BIG[:-1] + b"x", "new.bin": BIG + b"2"}, tag="v2"),
    ]
    kinds: list[Fault] = ["lost", "deaf", "cut", 429, 500, 502, 503, 504, 412]
    for release in releases:
        for attempt in range(20):
            rate = 0.25 if attempt < 6 else 0.0
            server.faults = lambda method, path, rate=rate: draw.choice(kinds) if draw.random() < rate else None
            try:
                push(release, hub, silent)
                done = True
            except PublishError:
                done = False
            server.faults = lambda method, path: None
            if done:
                verify("me/model", hub, revision=release.tag, deep=True)
                break
            _main_is_whole(server, releases)
        else:
            pytest.fail(f"seed {seed}: did not converge")
    assert commits(server).count("Publish test") == 2, seed
    arrived = [path for method, path, fault in server.seen if method == "PUT" and fault in (None, "lost", "cut")]
    assert len(arrived) <= 3 + sum(method == "PUT" and fault in ("lost", "cut") for method, _, fault in server.seen), (
        seed
    )


def _main_is_whole(server: FaultyHub, releases: list[Upload]) -> None:
    """At main is nothing yet, or all of one release and nothing of another."""
    api = HfApi(server.endpoint, token=TOKEN)
    if not api.repo_exists("me/model"):
        return
    found = set(api.list_repo_files("me/model")) - {".gitattributes"}
    assert found in [set(), *({file.path for file in release.files} for release in releases)]
