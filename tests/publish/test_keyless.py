"""A CI job without a token: one exchange a repository, renewed in time, and told clearly where it is not trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubforge.errors import PublishError
from hubforge.events import silent
from hubforge.hub import HubSettings, LocalHub, Publisher
from hubforge.places import open_hub
from hubforge.publish._access import check_access
from hubforge.publish._journal import Journal
from hubforge.publish._keyless import Keyless, job_credentials
from hubforge.publish._release import publish_release
from hubforge.publisher import Hub, Upload
from tests.fixtures_oidc import REQUEST_TOKEN, GitHubActions
from tests.fixtures_publish import TOKEN, MakeUpload, Requests, json_answer

CLAIMS = {"repository": "me/recipes", "ref": "refs/heads/main"}


@pytest.fixture
def local(tmp_path: Path, github_oidc: GitHubActions, lfs_transport: None) -> Iterator[LocalHub]:
    """A Hub that trusts the job with me/one and me/two; the former exists."""
    settings = HubSettings(
        tokens={TOKEN: "me"},
        issuers={github_oidc.issuer: github_oidc.jwks},
        publishers=tuple(Publisher(f"me/{name}", CLAIMS) for name in ("one", "two")),
        lfs_from=2000,
    )
    with LocalHub(tmp_path / "hub", settings=settings) as running:
        running.api(TOKEN).create_repo("me/one")
        yield running


@pytest.fixture
def job(local: LocalHub, github_oidc: GitHubActions, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub as such a job opens it."""
    monkeypatch.delenv("HUBFORGE_HUB_TOKEN", raising=False)
    github_oidc.enter(monkeypatch)
    with open_hub(local.endpoint) as hub:
        yield hub


@pytest.fixture
def release(make_upload: MakeUpload) -> Callable[..., list[Upload]]:
    return lambda *names, data=b"w" * 5000: [
        make_upload({"model.safetensors": data}, repo=f"me/{name}", target=name, tag="v1") for name in names
    ]


def test_a_job_publishes_to_two_repositories_with_one_exchange_each(
    local: LocalHub, job: Hub, release: Callable[..., list[Upload]], sent: Requests, tmp_path: Path
) -> None:
    local.api(TOKEN).create_repo("me/two")
    results = publish_release(release("one", "two"), job, silent, Journal(tmp_path / "journal.jsonl", job))
    assert [line for line in sent if "oauth" in line] == ["POST /oauth/token"] * 2
    for one in results:
        assert HfApi(local.endpoint).model_info(one["repo"], revision="v1").sha == one["commit"]
    written = (tmp_path / "journal.jsonl").read_text()
    assert "hf_jwt_" not in written and "hf_jwt_" not in repr(job) and REQUEST_TOKEN not in repr(job)
    assert all(secret not in written for secret in job.secrets())


def test_a_repository_that_does_not_exist_takes_a_token_once(
    local: LocalHub, job: Hub, release: Callable[..., list[Upload]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_REPOSITORY", "me/recipes")
    with pytest.raises(PublishError, match="the Hub gives this job no token for me/two") as caught:
        publish_release(release("one", "two"), job, silent, Journal(None, job))
    text = str(caught.value)
    assert "a token is needed once" in text and f"{local.endpoint}/me/two/settings (repository me/recipes" in text
    assert local.api(TOKEN).list_repo_files("me/one") == [".gitattributes"]  # nothing was published


def test_the_preflight_names_every_repository_that_does_not_trust_the_job(local: LocalHub, job: Hub) -> None:
    assert [one.may_write for one in check_access(job, ["me/one"])] == [True]
    with pytest.raises(PublishError, match=r"no token for me/two.*no token for others/model"):
        check_access(job, ["me/one", "me/two", "others/model"])
    with pytest.raises(PublishError, match="puts me/one into a collection"):
        check_access(job, ["me/one"], {"me/one": "Mine"})


def test_a_token_that_is_refused_in_mid_release_is_exchanged_anew(
    local: LocalHub, job: Hub, release: Callable[..., list[Upload]], sent: Requests
) -> None:
    sent.answer(lambda request: "create_pr" in str(request.url), json_answer(401, {"error": "Invalid credentials"}))
    publish_release(release("one"), job, silent, Journal(None, job))
    assert sent.count("POST /oauth/token") == 2
    assert len(HfApi(local.endpoint).list_repo_commits("me/one")) == 2


def test_a_plain_token_that_ran_out_in_mid_release_is_a_clear_error(
    local: LocalHub, release: Callable[..., list[Upload]], sent: Requests
) -> None:
    hub = Hub(local.endpoint, TOKEN)
    sent.answer(lambda request: "create_pr" in str(request.url), json_answer(401, {"error": "Invalid credentials"}))
    with pytest.raises(PublishError, match="it is unknown, expired or revoked") as caught:
        publish_release(release("one"), hub, silent, Journal(None, hub))
    assert "Make a token with the role 'write'" in str(caught.value)


def test_a_token_is_renewed_before_it_runs_out(local: LocalHub, job: Hub, sent: Requests) -> None:
    now = time.monotonic()
    credentials = Keyless(local.endpoint, clock=lambda: now)
    first = credentials.token("me/one")
    now += 3000
    assert credentials.token("me/one") == first
    now += 400  # 200 s before the end of its hour
    assert credentials.token("me/one") != first or sent.count("POST /oauth/token") == 2
    assert sent.count("POST /oauth/token") == 2


def test_a_job_without_the_permission_is_told_which(local: LocalHub, job: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_URL")
    with pytest.raises(PublishError, match="this job cannot prove who it is") as caught:
        check_access(job, ["me/one"])
    assert "id-token: write" in str(caught.value)


def test_a_token_goes_first_unless_the_job_asks_by_name(
    job: Hub, github_oidc: GitHubActions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_credentials(job.endpoint, has_token=False) is not None
    assert job_credentials(job.endpoint, has_token=True) is None
    github_oidc.enter(monkeypatch, resource="me/one")
    assert job_credentials(job.endpoint, has_token=True) is not None
    monkeypatch.delenv("HF_OIDC_RESOURCE")
    monkeypatch.delenv("GITHUB_ACTIONS")
    assert job_credentials(job.endpoint, has_token=False) is None
