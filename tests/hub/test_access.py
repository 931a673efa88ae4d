"""Tokens: who is who, who may write where, and what strangers are told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from hubforge.errors import HubforgeError
from hubforge.hub import HubSettings, LocalHub, Publisher, Quota, Scope, Token, read_settings, read_tokens

TOKENS = {
    "hf_ann": "ann",
    "hf_bob": Token("bob", orgs=("team",)),
    "hf_see": Token("ann", role="read"),
    "hf_one": Token("ann", repos=("ann/one",)),
    "hf_fine": Token("ann", role="fineGrained", scopes=(Scope("user", "ann", ("repo.content.read",)),)),
    "hf_make": Token("bob", role="fineGrained", orgs=("team",), scopes=(Scope("org", "team", ("repo.write",)),)),
}


@pytest.fixture
def hub(tmp_path: Path, lfs_transport: None) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", settings=HubSettings(tokens=TOKENS)) as hub:
        hub.api("hf_ann").create_repo("ann/one")
        hub.api("hf_ann").create_repo("ann/secret", private=True)
        yield hub


def test_a_token_says_who_it_is(hub: LocalHub):
    me = hub.api("hf_bob").whoami()
    assert (me["name"], me["orgs"][0]["name"], me["auth"]["accessToken"]["role"]) == ("bob", "team", "write")


@pytest.mark.parametrize("token", ["hf_wrong", False])
def test_an_unknown_or_missing_token_is_nobody(hub: LocalHub, token: str | bool):
    with pytest.raises(HfHubHTTPError, match="401"):
        hub.api(token).create_repo("ann/x")


@pytest.mark.parametrize(
    ("token", "repo", "may"),
    [
        ("hf_ann", "ann/new", True),
        ("hf_ann", "bob/new", False),
        ("hf_bob", "team/new", True),
        ("hf_see", "ann/new", False),
        ("hf_one", "ann/new", False),
        ("hf_fine", "ann/new", False),
        ("hf_make", "team/new", True),
        ("hf_make", "bob/new", False),
    ],
)
def test_who_may_create_where(hub: LocalHub, token: str, repo: str, may: bool):
    if may:
        hub.api(token).create_repo(repo)
    else:
        with pytest.raises(HfHubHTTPError, match="403"):
            hub.api(token).create_repo(repo)
    assert hub.api("hf_ann").repo_exists(repo) is may


WHO_MAY_PUSH = [("hf_ann", True), ("hf_one", True), ("hf_see", False), ("hf_bob", False), ("hf_fine", False)]


@pytest.mark.parametrize(("token", "may"), WHO_MAY_PUSH)
def test_who_may_push(hub: LocalHub, token: str, may: bool):
    def push() -> None:
        hub.api(token).upload_file(path_or_fileobj=b"\0", path_in_repo="w.bin", repo_id="ann/one")

    if may:
        push()
    else:
        with pytest.raises(HfHubHTTPError, match="403"):
            push()


@pytest.mark.parametrize(("token", "may"), [("hf_bob", True), ("hf_see", False)])
def test_whoever_may_read_can_propose_a_change_with_a_writing_token(hub: LocalHub, token: str, may: bool):
    def propose() -> None:
        hub.api(token).upload_file(path_or_fileobj=b"\0", path_in_repo="w.bin", repo_id="ann/one", create_pr=True)

    if may:
        propose()
        assert hub.api("hf_ann").file_exists("ann/one", "w.bin", revision="refs/pr/1")
        with pytest.raises(HfHubHTTPError, match="403"):
            hub.api(token).merge_pull_request("ann/one", 1)
    else:
        with pytest.raises(HfHubHTTPError, match="403"):
            propose()
    assert not hub.api("hf_ann").file_exists("ann/one", "w.bin")


def test_without_tokens_a_browser_signs_in_with_one_click(local_hub: LocalHub):
    local_hub.api().create_repo("me/sealed", private=True)
    browser = type(get_session())()
    assert "sealed" not in browser.get(local_hub.endpoint).text
    browser.post(f"{local_hub.endpoint}/login")
    assert "sealed" in browser.get(local_hub.endpoint).text


WHO_SEES = [("hf_ann", True), ("hf_see", True), ("hf_bob", False), ("hf_one", False), ("hf_fine", True)]


@pytest.mark.parametrize(("token", "sees"), WHO_SEES)
def test_who_sees_a_private_repository(hub: LocalHub, token: str, sees: bool):
    listed = {model.id for model in hub.api(token).list_models()}
    assert ("ann/secret" in listed) is sees
    if sees:
        assert hub.api(token).model_info("ann/secret").private
    else:
        with pytest.raises(RepositoryNotFoundError):
            hub.api(token).model_info("ann/secret")


def test_what_is_hidden_answers_like_what_is_missing(hub: LocalHub):
    def answer(path: str) -> tuple[int, str]:
        got = get_session().get(f"{hub.endpoint}{path}", headers={"Authorization": "Bearer hf_bob"})
        return got.status_code, got.text

    for path in ("/api/models/{}", "/api/models/{}/tree/main", "/{}/resolve/main/a", "/api/models/{}/refs"):
        assert answer(path.format("ann/secret")) == answer(path.format("ann/nothing"))


def test_a_name_that_points_here_from_elsewhere_is_not_answered(hub: LocalHub):
    answer = get_session().get(f"{hub.endpoint}/api/models", headers={"Host": "evil.example"})
    assert answer.status_code == 421
    assert get_session().get(hub.endpoint.replace("127.0.0.1", "localhost") + "/api/models").status_code == 200


def test_a_cookie_lets_one_look_but_not_write(hub: LocalHub):
    cookie = {"Cookie": "hub_token=hf_ann"}
    assert get_session().get(f"{hub.endpoint}/api/models/ann/secret", headers=cookie).status_code == 200
    made = get_session().post(f"{hub.endpoint}/api/repos/create", json={"name": "x"}, headers=cookie)
    assert made.status_code == 401


def test_tokens_come_from_a_file(tmp_path: Path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"a": "ann", "b": {"user": "bob", "orgs": ["team"]}}))
    assert read_tokens(path) == {"a": "ann", "b": Token("bob", orgs=("team",))}
    path.write_text('{"secret-value": 3}')
    command = [sys.executable, "-m", "hubforge.hub", str(tmp_path / "hub"), "--tokens", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "tokens.json: the file of tokens is not understood" in done.stderr
    assert "secret-value" not in done.stderr and "Traceback" not in done.stderr


def test_a_fine_grained_token_tells_its_scopes_as_the_real_hub_does(hub: LocalHub):
    token = hub.api("hf_one").whoami()["auth"]["accessToken"]
    entity = {"_id": "model:ann/one", "type": "model", "name": "ann/one"}
    assert token["role"] == "fineGrained"
    assert token["fineGrained"] == {
        "canReadGatedRepos": False,
        "global": [],
        "scoped": [{"entity": entity, "permissions": ["repo.content.read", "repo.write", "discussion.write"]}],
    }
    assert "fineGrained" not in hub.api("hf_ann").whoami()["auth"]["accessToken"]


@pytest.mark.parametrize(
    ("token", "repo"),
    [("hf_one", "ann/one"), ("hf_one", "ann/secret"), ("hf_one", "ann/new"), ("hf_fine", "ann/one"),
     ("hf_make", "team/new"), ("hf_make", "ann/one"), ("hf_see", "ann/one")],
)  # fmt: skip
def test_what_the_preflight_reads_from_the_scopes_is_what_the_hub_does(hub: LocalHub, token: str, repo: str):
    from hubforge.publish._access import may_publish

    api = hub.api(token)
    exists = hub.api("hf_ann").repo_exists(repo)
    predicted, _ = may_publish(api.whoami(), repo, exists=exists)

    def push() -> None:
        if not exists:
            api.create_repo(repo)
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo)

    if predicted:
        push()
    else:
        with pytest.raises(HfHubHTTPError, match=r"40[34]"):
            push()


@pytest.mark.parametrize(("token", "may"), [("hf_make", False), ("hf_talk", True), ("hf_see", False), ("hf_bob", True)])
def test_who_may_propose_to_others(tmp_path: Path, token: str, may: bool):
    tokens = {**TOKENS, "hf_talk": Token("bob", role="fineGrained", anywhere=("discussion.write",))}
    with LocalHub(tmp_path / "hub", settings=HubSettings(tokens=tokens)) as hub:
        hub.api("hf_ann").create_repo("ann/one")
        if may:
            assert hub.api(token).create_discussion("ann/one", title="An idea").num == 1
        else:
            with pytest.raises(HfHubHTTPError, match="403"):
                hub.api(token).create_discussion("ann/one", title="An idea")


def test_the_owner_reads_a_gated_repository_with_a_reading_token(hub: LocalHub, tmp_path: Path):
    ann = hub.api("hf_ann")
    ann.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ann/one")
    ann.update_repo_settings("ann/one", gated="manual")
    assert Path(hub.api("hf_see").hf_hub_download("ann/one", "x", cache_dir=tmp_path / "c")).read_bytes() == b"x"
    with pytest.raises(HfHubHTTPError, match="403"):
        hub.api("hf_bob").hf_hub_download("ann/one", "x", cache_dir=tmp_path / "d")


def test_settings_come_from_a_file(tmp_path: Path):
    path = tmp_path / "hub.json"
    (tmp_path / "keys.json").write_text('{"keys": []}')
    scope = {"entity": {"type": "model", "name": "ann/a"}, "permissions": ["repo.write"]}
    written = {
        "tokens": {"hf_secret": {"user": "ann", "role": "fineGrained", "scopes": [scope]}},
        "issuers": {"https://issuer.example": "keys.json"},
        "publishers": [{"repo": "ann/a", "claims": {"repository": "ann/b"}}],
        "commit_quota": {"number": 128, "seconds": 3600},
    }
    path.write_text(json.dumps(written))
    scopes = (Scope("model", "ann/a", ("repo.write",)),)
    assert read_settings(path) == HubSettings(
        tokens={"hf_secret": Token("ann", role="fineGrained", scopes=scopes)},
        issuers={"https://issuer.example": {"keys": []}},
        publishers=(Publisher("ann/a", {"repository": "ann/b"}),),
        commit_quota=Quota(128, 3600),
    )
    for wrong in ({"tokenz": {}}, {"tokens": {"hf_secret": {"usr": "ann"}}}, {"commit_quota": 3}, {"publishers": 1}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(HubforgeError, match=r"hub\.json: the file of settings is not") as caught:
            read_settings(path)
        assert "hf_secret" not in str(caught.value)
