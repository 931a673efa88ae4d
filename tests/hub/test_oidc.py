"""Keyless publishing, through the client's own path: a job's identity opens one repository for a while."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub._oidc import exchange_oidc_token
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from huggingface_hub.utils import get_session

from hubforge.errors import HubforgeError
from hubforge.hub import HubSettings, LocalHub, Publisher
from hubforge.hub.settings import check_bind
from tests.fixtures_oidc import GitHubActions, private_key

MAIN = {"repository": "me/recipes", "ref": "refs/heads/main"}
PUBLISHERS = (
    Publisher("me/model", MAIN),
    Publisher("datasets/me/data", MAIN),
    Publisher("me/private", MAIN, read_only=True),
    Publisher("me/later", MAIN),
    Publisher("team/tagged", {"repository": "me/recipes", "ref_type": "tag"}),
)


def settings_of(github: GitHubActions, **more: Any) -> HubSettings:
    return HubSettings(
        tokens={"hf_me": "me"}, issuers={github.issuer: github.jwks}, publishers=PUBLISHERS, lfs_from=1000, **more
    )


@pytest.fixture
def hub(
    tmp_path: Path, lfs_transport: None, github_oidc: GitHubActions, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", settings=settings_of(github_oidc)) as hub:
        api = hub.api("hf_me")
        api.create_repo("me/model")
        api.create_repo("me/other")
        api.create_repo("me/private", private=True)
        api.create_repo("me/data", repo_type="dataset")
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        yield hub


def exchange(hub: LocalHub, identity: str, resource: str = "me/model") -> str:
    answer = exchange_oidc_token(subject_token=identity, resource=resource, endpoint=hub.endpoint)
    assert (answer["token_type"], answer["expires_in"]) == ("bearer", 3600)
    return str(answer["access_token"])


@pytest.mark.parametrize(("resource", "repo_type"), [("me/model", "model"), ("datasets/me/data", "dataset")])
def test_a_job_publishes_without_any_stored_token(
    hub: LocalHub, github_oidc: GitHubActions, monkeypatch: pytest.MonkeyPatch, resource: str, repo_type: str
):
    github_oidc.enter(monkeypatch, resource=resource)
    api = HfApi(endpoint=hub.endpoint)  # No token: the client finds out by itself.
    adds = [CommitOperationAdd("a.txt", b"x"), CommitOperationAdd("w.bin", b"\0" * 5000)]
    repo = resource.removeprefix("datasets/")
    api.create_commit(repo, adds, commit_message="release", repo_type=repo_type)
    api.create_tag(repo, tag="v1", repo_type=repo_type)
    assert get_token().startswith("hf_jwt_")
    assert api.list_repo_files(repo, repo_type=repo_type) == [".gitattributes", "a.txt", "w.bin"]
    assert github_oidc.minted == 1  # One exchange, kept for the hour.


def test_its_token_opens_nothing_else(hub: LocalHub, github_oidc: GitHubActions):
    api = hub.api(exchange(hub, github_oidc.mint(hub.endpoint)))
    me = api.whoami()
    assert me["name"] == "me" and me["auth"]["resource"]["sub"] == github_oidc.claims["sub"]
    assert me["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"]["name"] == "me/model"
    for attempt in (
        lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/other"),
        lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/data", repo_type="dataset"),
        lambda: api.create_repo("me/new"),
        lambda: api.move_repo("me/model", "me/stolen"),
        lambda: api.create_collection("Mine", namespace="me"),
        lambda: api.repo_info("me/private"),
    ):
        with pytest.raises(HfHubHTTPError, match=r"40[34]"):
            attempt()


def test_a_read_only_publisher_only_reads(hub: LocalHub, github_oidc: GitHubActions):
    api = hub.api(exchange(hub, github_oidc.mint(hub.endpoint), "me/private"))
    assert api.repo_info("me/private").private
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/private")


def test_tokens_signed_with_es256_are_taken_too(hub: LocalHub, github_oidc: GitHubActions):
    assert exchange(hub, github_oidc.mint(hub.endpoint, algorithm="ES256"))


NOW = int(time.time())
REFUSED = {
    "another audience": {"audience": "https://huggingface.co"},
    "no audience": {"aud": None},
    "run out": {"exp": NOW - 60},
    "never runs out": {"exp": None},
    "not yet good": {"nbf": NOW + 600},
    "another issuer": {"iss": "https://evil.example"},
    "no issuer": {"iss": None},
    "no subject": {"sub": None},
    "another branch": {"ref": "refs/heads/dev"},
    "another repository": {"repository": "me/recipes-fork"},
    "a claim that is not text": {"repository": ["me/recipes"]},
    "an unknown key": {"kid": "zz"},
    "another key's id": {"kid": "es"},
    "a missing claim": {"ref": None},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_an_identity_that_does_not_hold_gets_nothing(
    hub: LocalHub, github_oidc: GitHubActions, changes: dict[str, Any]
):
    changes = dict(changes)
    identity = github_oidc.mint(changes.pop("audience", hub.endpoint), **changes)
    with pytest.raises(BadRequestError) as caught:
        exchange(hub, identity)
    answer = caught.value.response
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
    assert identity not in answer.text


def _forged(kind: str, github: GitHubActions, audience: str) -> str:
    good = github.mint(audience)
    head, body, signature = good.split(".")
    claims = jwt.decode(good, options={"verify_signature": False})
    if kind == "unsigned":
        return jwt.encode(claims, None, algorithm="none", headers={"kid": "rs"})
    if kind == "public key as a secret":  # The classic confusion of RS256 with HS256.
        from cryptography.hazmat.primitives import hashes, hmac, serialization

        public = private_key("RS256", 0).public_key()
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        encode = jwt.utils.base64url_encode
        text = encode(json.dumps({"alg": "HS256", "kid": "rs"}).encode()) + b"." + body.encode()
        mac = hmac.HMAC(pem, hashes.SHA256())
        mac.update(text)
        return (text + b"." + encode(mac.finalize())).decode()
    if kind == "another key":
        return jwt.encode(claims, private_key("RS256", 1), algorithm="RS256", headers={"kid": "rs"})
    if kind == "changed claims":
        changed = jwt.utils.base64url_encode(json.dumps({**claims, "repository": "me/recipes"}).encode()).decode()
        return f"{head}.{changed}x.{signature}"
    return {"no token": "", "not a token": "hello", "nested": "e30." + "W1tb" * 9000 + ".e30"}[kind]


@pytest.mark.parametrize(
    "kind",
    ["unsigned", "public key as a secret", "another key", "changed claims", "no token", "not a token", "nested"],
)
def test_a_forged_identity_gets_nothing(hub: LocalHub, github_oidc: GitHubActions, kind: str):
    with pytest.raises(BadRequestError) as caught:
        exchange(hub, _forged(kind, github_oidc, hub.endpoint))
    assert caught.value.response.json()["error"] == "invalid_grant"


@pytest.mark.parametrize("resource", ["me/other", "me/nothing", "me", "team/tagged", ""])
def test_what_nobody_trusts_a_job_with_is_not_told_apart(hub: LocalHub, github_oidc: GitHubActions, resource: str):
    with pytest.raises(BadRequestError, match="No trusted publisher"):
        exchange(hub, github_oidc.mint(hub.endpoint), resource)


def test_a_repository_must_exist_before_its_jobs_can_publish(hub: LocalHub, github_oidc: GitHubActions):
    with pytest.raises(BadRequestError, match="me/later does not exist yet: create it once with an access token"):
        exchange(hub, github_oidc.mint(hub.endpoint), "me/later")
    hub.api("hf_me").create_repo("me/later")
    assert exchange(hub, github_oidc.mint(hub.endpoint), "me/later")


def test_a_token_runs_out_and_the_client_takes_another(
    tmp_path: Path, lfs_transport: None, github_oidc: GitHubActions, monkeypatch: pytest.MonkeyPatch
):
    with LocalHub(tmp_path / "hub", settings=settings_of(github_oidc, publisher_seconds=1)) as hub:
        hub.api("hf_me").create_repo("me/model", private=True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        github_oidc.enter(monkeypatch, resource="me/model")
        first = get_token()
        assert first and hub.api(first).repo_info("me/model").private
        time.sleep(2.1)
        with pytest.raises(HfHubHTTPError, match="401"):
            hub.api(first).repo_info("me/model")
        assert HfApi(endpoint=hub.endpoint).repo_info("me/model").private
        assert github_oidc.minted == 2


def test_a_token_ends_with_the_trust_in_its_publisher(tmp_path: Path, github_oidc: GitHubActions):
    hub = LocalHub(tmp_path / "hub", settings=settings_of(github_oidc))
    with hub:
        hub.api("hf_me").create_repo("me/model")
        token = exchange(hub, github_oidc.mint(hub.endpoint))
        assert hub.api(token).whoami()
    hub.settings = HubSettings(tokens={"hf_me": "me"})
    with hub, pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.api(token).whoami()


def test_a_made_up_token_opens_nothing_even_where_any_token_does(local_hub: LocalHub):
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        local_hub.api("hf_jwt_e30.00").whoami()


def test_an_upload_address_is_no_token_and_a_token_no_upload_address(hub: LocalHub, github_oidc: GitHubActions):
    token = exchange(hub, github_oidc.mint(hub.endpoint))
    grant = token.removeprefix("hf_jwt_")
    assert get_session().put(f"{hub.endpoint}/_lfs/{grant}", content=b"x").status_code == 403
    batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 1}], "ref": {"name": "main"}}
    headers = {"Authorization": f"Bearer {token}"}
    answer = get_session().post(f"{hub.endpoint}/me/model.git/info/lfs/objects/batch", json=batch, headers=headers)
    href = answer.json()["objects"][0]["actions"]["upload"]["href"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.api("hf_jwt_" + href.rpartition("/")[2]).whoami()


def test_the_exchange_takes_a_form_as_the_standard_has_it(hub: LocalHub, github_oidc: GitHubActions):
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
        "subject_token": github_oidc.mint(hub.endpoint),
        "resource": "me/model",
    }
    assert get_session().post(f"{hub.endpoint}/oauth/token", data=form).status_code == 200
    answer = get_session().post(f"{hub.endpoint}/oauth/token", data={**form, "grant_type": "password"})
    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported_grant_type")
    assert get_session().post(f"{hub.endpoint}/oauth/token", content=b"[" * 50_000).status_code == 400


def test_a_publisher_must_say_whose_jobs_it_trusts():
    for claims in ({}, {"ref": "refs/heads/main"}):
        with pytest.raises(HubforgeError, match="whose jobs"):
            Publisher("me/model", claims)
    assert Publisher("me/model", {"ref": "main"}, issuer="https://ci.example")


def test_in_public_a_hub_with_publishers_needs_its_address(github_oidc: GitHubActions):
    with pytest.raises(HubforgeError, match="made out to an address"):
        check_bind("0.0.0.0", settings_of(github_oidc))
    check_bind("0.0.0.0", settings_of(github_oidc, endpoint="https://hub.example"))


def test_the_named_address_is_the_audience(tmp_path: Path, github_oidc: GitHubActions):
    with LocalHub(tmp_path / "hub", settings=settings_of(github_oidc, endpoint="https://hub.example/")) as hub:
        body, headers = {"name": "model"}, {"Authorization": "Bearer hf_me"}
        made = get_session().post(f"{hub.endpoint}/api/repos/create", json=body, headers=headers)
        assert made.json()["url"] == "https://hub.example/me/model"
        assert exchange(hub, github_oidc.mint("https://hub.example"))
        with pytest.raises(BadRequestError, match="InvalidAudience"):
            exchange(hub, github_oidc.mint(hub.endpoint))
