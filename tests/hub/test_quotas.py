"""Quotas: what is left is told, what is used up is refused, and commits have a quota that nothing tells of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session
from huggingface_hub.utils._http import parse_ratelimit_headers

from hubforge.hub import HubSettings, LocalHub, Quota
from hubforge.hub.refusal import Refusal
from hubforge.hub.wire.quotas import Quotas

Start = Callable[[HubSettings], LocalHub]


@pytest.fixture
def start(tmp_path: Path, lfs_transport: None) -> Iterator[Start]:
    hubs: list[LocalHub] = []

    def begin(settings: HubSettings) -> LocalHub:
        hubs.append(LocalHub(tmp_path / f"hub{len(hubs)}", settings=settings).start())
        return hubs[-1]

    yield begin
    for hub in hubs:
        hub.close()


def test_every_answer_tells_what_is_left(start: Start):
    hub = start(HubSettings(api_quota=Quota(3, 300)))
    asked = [get_session().get(f"{hub.endpoint}/api/models") for _ in range(4)]
    limits = [parse_ratelimit_headers(answer.headers) for answer in asked]
    assert [limit and limit.remaining for limit in limits] == [2, 1, 0, 0]
    assert [answer.status_code for answer in asked] == [200, 200, 200, 429]
    assert asked[0].headers["ratelimit-policy"] == '"fixed window";"api";q=3;w=300'
    assert limits[0] and limits[0].limit == 3 and 299 <= limits[0].reset_in_seconds <= 300
    assert "used up the 3 api requests" in asked[3].json()["error"]


def test_without_a_quota_nothing_is_said(local_hub: LocalHub):
    answer = get_session().get(f"{local_hub.endpoint}/api/models")
    assert "ratelimit" not in answer.headers


def test_each_token_and_each_kind_of_request_has_a_quota_of_its_own(start: Start):
    hub = start(HubSettings(api_quota=Quota(2, 300), resolve_quota=Quota(1, 300)))
    for token in ("one", "two"):
        assert hub.api(token).whoami() and hub.api(token).whoami()
        with pytest.raises(HfHubHTTPError, match=r"429 .*your 'api' rate limit(?s:.*)in current 300s window"):
            hub.api(token).repo_info("me/model")
    file = f"{hub.endpoint}/me/model/resolve/main/a"
    assert [get_session().get(file).status_code for _ in range(2)] == [401, 429]
    assert get_session().get(hub.endpoint).status_code == 200  # Pages are not counted.


def test_the_client_waits_for_the_next_window(start: Start):
    from huggingface_hub.utils import http_backoff

    hub = start(HubSettings(api_quota=Quota(1, 1)))
    url = f"{hub.endpoint}/api/models"
    assert http_backoff("GET", url).status_code == 200
    assert http_backoff("GET", url, retry_on_status_codes=429).status_code == 200


def test_a_large_commit_over_quota_hears_so_instead_of_a_reset(start: Start):
    hub = start(HubSettings(api_quota=Quota(2, 300)))
    api = hub.api()
    api.create_repo("me/model")
    add = CommitOperationAdd("big.txt", os.urandom(3_000_000).hex().encode())  # Regular: all of it in the request.
    with pytest.raises(HfHubHTTPError, match="429"):
        api.create_commit("me/model", [add], commit_message="big")


def test_the_quota_of_commits_is_in_no_header(start: Start):
    hub = start(HubSettings(api_quota=Quota(1000, 300), commit_quota=Quota(2, 3600)))
    api = hub.api()

    def push(repo: str, number: int) -> None:
        api.create_commit(repo, [CommitOperationAdd("n.txt", str(number).encode())], commit_message="n")

    for repo in ("me/one", "me/two"):  # Each has its own.
        api.create_repo(repo)
        for number in range(2):
            push(repo, number)
        with pytest.raises(HfHubHTTPError, match=r"repository commits \(2 per hour\)") as caught:
            push(repo, 3)
        assert caught.value.response.status_code == 429
        limit = parse_ratelimit_headers(caught.value.response.headers)
        assert limit and limit.remaining > 0 and "retry-after" not in caught.value.response.headers
    assert [commit.title for commit in api.list_repo_commits("me/one")] == ["n", "n", "initial commit"]


def test_a_refused_commit_costs_nothing(start: Start):
    hub = start(HubSettings(commit_quota=Quota(1, 3600)))
    api = hub.api()
    api.create_repo("me/model")
    add = [CommitOperationAdd("n.txt", b"1")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/model", add, commit_message="n", parent_commit="0" * 40)
    api.create_commit("me/model", [CommitOperationAdd("n.txt", b"1")], commit_message="n")


def test_the_commits_of_the_last_hour_slide():
    now = [0.0]
    quotas = Quotas(HubSettings(commit_quota=Quota(2, 3600)), clock=lambda: now[0])

    def taken() -> bool:
        try:
            with quotas.commit("me/model"):
                return True
        except Refusal as refusal:
            assert refusal.status == 429
            return False

    seen = []
    for minute in (0, 30, 59, 61, 89, 91):
        now[0] = minute * 60
        seen.append(taken())
    assert seen == [True, True, False, True, False, True]
