"""The preflight: what a token may do, from what the Hub says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hubforge.errors import PublishError
from hubforge.events import silent
from hubforge.hub import HubSettings, LocalHub, Scope, Token
from hubforge.places import open_hub
from hubforge.publish.hub import check_access, may_publish, push, sends_token_in_clear
from hubforge.publisher import Hub
from tests.fixtures_publish import TOKEN, MakeUpload, Requests


def me(role: str, scoped: list[Any] | None = None) -> dict[str, Any]:
    """A whoami-v2 answer in the shape the Hub gives it."""
    token: dict[str, Any] = {"displayName": "ci", "role": role}
    if scoped is not None:
        token["fineGrained"] = {"canReadGatedRepos": True, "global": ["post.write"], "scoped": scoped}
    orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    return {"type": "user", "name": "me", "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


def scope(kind: str, name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"_id": "1", "type": kind, "name": name}, "permissions": list(permissions)}


@pytest.mark.parametrize(
    ("answer", "repo", "exists", "may"),
    [
        (me("write"), "me/model", False, True),
        (me("write"), "team/model", False, True),
        (me("write"), "readers/model", True, False),
        (me("write"), "others/model", True, False),
        (me("read"), "me/model", True, False),
        (me("fineGrained", [scope("user", "me", "repo.content.read", "repo.write")]), "me/model", False, True),
        (me("fineGrained", [scope("org", "team", "repo.write")]), "team/model", False, True),
        (me("fineGrained", [scope("model", "me/model", "repo.write")]), "me/model", True, True),
        (me("fineGrained", [scope("model", "me/model", "repo.write")]), "me/model", False, False),
        (me("fineGrained", [scope("model", "me/other", "repo.write")]), "me/model", True, False),
        (me("fineGrained", [scope("user", "me", "repo.content.read")]), "me/model", True, False),
        (me("fineGrained"), "me/model", True, None),
        (me("newKind"), "me/model", True, None),
        ({"name": "me"}, "me/model", True, None),
        ({"name": "me", "auth": "x", "orgs": [1, None]}, "me/model", True, None),
        (me("fineGrained", [1, {"entity": 2, "permissions": None}]), "me/model", True, False),
    ],
)
def test_what_a_token_may_follows_from_its_role_and_scopes(
    answer: dict[str, Any], repo: str, exists: bool, may: bool | None
) -> None:
    assert may_publish(answer, repo, exists=exists)[0] is may


def test_existing_and_new_repositories_are_told_apart(hub: Hub, make_upload: MakeUpload, sent: Requests) -> None:
    push(make_upload({"config.json": b"1"}, private=True), hub, silent)
    sent.clear()
    there, new = check_access(hub, ["me/model", "me/new", "me/model"])
    assert (there.exists, there.private, there.may_write) == (True, True, True)
    assert (new.exists, new.private, new.may_write) == (False, None, True)
    assert sent == [
        "GET /api/whoami-v2",
        "GET /api/models/me/model/revision/main",
        "GET /api/models/me/new/revision/main",
    ]


def test_all_refused_repositories_are_named_at_once(tmp_path: Path) -> None:
    tokens = {TOKEN: Token("me", role="read"), "hf_other": Token("me", orgs=("team",))}
    with LocalHub(tmp_path / "hub", settings=HubSettings(tokens=tokens)) as local:
        with pytest.raises(PublishError) as caught:
            check_access(Hub(local.endpoint, TOKEN), ["me/a", "me/b"])
        assert "me/a: the token's role is 'read'; nor to me/b: the token's role is 'read'" in str(caught.value)
        with pytest.raises(PublishError, match="others is neither me nor one of its organizations"):
            check_access(Hub(local.endpoint, "hf_other"), ["team/a", "others/b"])


def test_no_token_and_a_wrong_token_are_told_apart(hub: Hub) -> None:
    with pytest.raises(PublishError, match="there is no token to publish with"):
        check_access(Hub(hub.endpoint, None), ["me/a"])
    with pytest.raises(PublishError, match="does not accept the token"):
        check_access(Hub(hub.endpoint, "hf_wrong"), ["me/a"])


def test_a_hub_at_another_address_names_the_variable_of_its_own_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HUBFORGE_HUB_TOKEN", raising=False)
    with open_hub(hub.endpoint) as other, pytest.raises(PublishError, match="Set HUBFORGE_HUB_TOKEN to a token of"):
        check_access(other, ["me/a"])
    monkeypatch.setenv("HUBFORGE_HUB_TOKEN", "hf_wrong")
    with open_hub(hub.endpoint) as other, pytest.raises(PublishError) as caught:
        check_access(other, ["me/a"])
    assert "does not accept the token" in str(caught.value) and "Set HUBFORGE_HUB_TOKEN" in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "token", "clear"),
    [
        ("https://huggingface.co", "hf_x", False),
        ("http://127.0.0.1:8000", "hf_x", False),
        ("http://hub.example", "hf_x", True),
        ("http://hub.example", None, False),
    ],
)
def test_a_token_over_plain_http_is_noticed(endpoint: str, token: str | None, clear: bool) -> None:
    assert sends_token_in_clear(Hub(endpoint, token)) is clear


@pytest.mark.parametrize(
    ("scopes", "collection", "fault"),
    [
        ((Scope("user", "me", ("repo.write", "collection.write")),), "Ours", None),
        ((Scope("user", "me", ("repo.write",)),), "Ours", "grants collection.write for me"),
        ((Scope("user", "me", ("repo.write",)),), "team/ours-" + "0" * 24, "grants collection.write for team"),
    ],
    ids=["granted", "missing", "of another"],
)
def test_a_fine_grained_token_needs_the_scope_for_a_collection(
    tmp_path: Path, scopes: tuple[Scope, ...], collection: str, fault: str | None
) -> None:
    tokens = {TOKEN: Token("me", role="fineGrained", scopes=scopes)}
    with LocalHub(tmp_path / "hub", settings=HubSettings(tokens=tokens)) as local:
        hub = Hub(local.endpoint, TOKEN)
        if fault is None:
            assert check_access(hub, ["me/a"], {"me/a": collection})[0].may_write
        else:
            with pytest.raises(PublishError, match=fault):
                check_access(hub, ["me/a"], {"me/a": collection})


def test_an_open_hub_takes_any_namespace(tmp_path: Path) -> None:
    """As the demo needs it: `lab/storyteller` on the Hub of whoever runs it."""
    with LocalHub(tmp_path / "open") as local:
        (access,) = check_access(Hub(local.endpoint, "local"), ["anybody/model"])
        assert access.may_write is True and "no tokens" in access.reason
