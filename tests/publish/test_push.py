"""What a push leaves on a Hub, and what it takes to do so: the real client, real HTTP, the embedded Hub."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hubforge.errors import PublishError, VerifyError
from hubforge.events import Event, Progress, Warned, silent
from hubforge.publish.hub import HubPublisher, plan_push, push
from hubforge.publisher import Hub, Upload, UploadFile
from tests.fixtures_publish import TOKEN, MakeUpload, Requests, digest, json_answer

BIG = b"w" * 5000  # large enough for large-file storage in the `hub` fixture
SMALL = b'{"hidden_size": 64}'


def files_at(hub: Hub, repo: str = "me/model", revision: str = "main") -> dict[str, bytes]:
    """Every file of a repository but .gitattributes, downloaded."""
    api = HfApi(hub.endpoint, token=hub.token)
    found = {}
    with httpx2.Client(follow_redirects=True, headers={"Authorization": f"Bearer {hub.token}"}) as client:
        for path in api.list_repo_files(repo, revision=revision):
            answer = client.get(f"{hub.endpoint}/{repo}/resolve/{revision}/{path}")
            found[path] = answer.raise_for_status().content
    found.pop(".gitattributes")
    return found


def foreign_commit(hub: Hub, path: str, content: bytes, repo: str = "me/model") -> str:
    """Somebody commits a file without hubforge; the new commit."""
    api = HfApi(hub.endpoint, token=hub.token)
    return api.create_commit(repo, [CommitOperationAdd(path, content)], commit_message="by hand").oid


def is_commit(request: httpx2.Request) -> bool:
    return "/commit/" in request.url.path


def commits(hub: Hub, repo: str = "me/model") -> int:
    return len(HfApi(hub.endpoint, token=hub.token).list_repo_commits(repo))


@pytest.fixture(autouse=True)
def lfs(lfs_transport: None) -> None:
    """The test's own commits go through LFS too."""


def test_first_push_makes_one_commit_with_large_and_small_files_and_a_tag(hub: Hub, make_upload: MakeUpload) -> None:
    upload = make_upload({"model.safetensors": BIG, "config.json": SMALL}, tag="v1.0")
    told = push(upload, hub, silent)
    assert {path: digest(data) for path, data in files_at(hub).items()} == {
        file.path: file.sha256 for file in upload.files
    }
    assert commits(hub) == 2  # the Hub's own, with .gitattributes, and ours
    refs = HfApi(hub.endpoint, token=hub.token).list_repo_refs("me/model")
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1.0", told["commit"])]
    assert told == {
        "repo": "me/model",
        "commit": refs.branches[0].target_commit,
        "url": f"{hub.endpoint}/me/model",
        "pushed": [file.path for file in upload.files],
        "deleted": [],
        "unchanged": 0,
        "bytes": sum(file.size for file in upload.files),
        "tag": "v1.0",
        "created": True,
        "private": False,
    }


def test_pushing_again_makes_no_commit_and_sends_three_requests(
    hub: Hub, make_upload: MakeUpload, sent: Requests
) -> None:
    upload = make_upload({"model.safetensors": BIG, "config.json": SMALL}, tag="v1.0")
    first = push(upload, hub, silent)
    sent.clear()
    again = push(upload, hub, silent)
    head = first["commit"]
    assert sent == [
        "GET /api/models/me/model/revision/main",
        f"GET /api/models/me/model/tree/{head}?recursive=true&expand=false",
        "GET /api/models/me/model/refs",
    ]
    assert again["commit"] == head and again["pushed"] == [] and again["unchanged"] == 5 and again["bytes"] == 0


def test_only_what_changed_is_sent(hub: Hub, make_upload: MakeUpload, sent: Requests) -> None:
    push(make_upload({"a.safetensors": BIG, "b.safetensors": BIG + b"b", "config.json": SMALL}), hub, silent)
    sent.clear()
    changed = BIG[:-1] + b"x"  # the same size
    told = push(make_upload({"a.safetensors": changed, "b.safetensors": BIG + b"b", "config.json": b"{}"}), hub, silent)
    assert told["pushed"] == ["a.safetensors", "config.json", "hubforge.release.json", "SHA256SUMS"]
    assert told["unchanged"] == 2
    assert len([line for line in sent if line.startswith("PUT")]) == 1
    assert files_at(hub)["a.safetensors"] == changed


def test_a_large_file_under_a_new_name_is_not_sent_again(hub: Hub, make_upload: MakeUpload, sent: Requests) -> None:
    push(make_upload({"old.safetensors": BIG}), hub, silent)
    sent.clear()
    told = push(make_upload({"new.safetensors": BIG}), hub, silent)
    assert told["deleted"] == ["old.safetensors"]
    assert not [line for line in sent if line.startswith("PUT")]
    assert files_at(hub)["new.safetensors"] == BIG


def test_what_the_release_no_longer_has_is_deleted_and_what_others_put_there_stays(
    hub: Hub, make_upload: MakeUpload
) -> None:
    push(make_upload({"model.safetensors": BIG, "old.json": b"1", "old.bin": BIG + b"1"}), hub, silent)
    foreign_commit(hub, "notes.md", b"by hand")
    told = push(make_upload({"model.safetensors": BIG}), hub, silent)
    assert sorted(told["deleted"]) == ["old.bin", "old.json"]
    assert sorted(files_at(hub)) == [
        "README.md",
        "SHA256SUMS",
        "hubforge.release.json",
        "model.safetensors",
        "notes.md",
    ]


def test_a_file_of_ours_that_somebody_changed_is_not_deleted(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"model.safetensors": BIG, "chat_template.jinja": b"one"}), hub, silent)
    foreign_commit(hub, "chat_template.jinja", b"two")
    upload = make_upload({"model.safetensors": BIG})
    assert plan_push(upload, hub).kept == ("chat_template.jinja",)
    assert push(upload, hub, silent)["deleted"] == []
    assert files_at(hub)["chat_template.jinja"] == b"two"


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(b"not json", id="not JSON"),
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(b'{"hubforge": "1"}', id="incomplete"),
    ],
)
def test_an_earlier_release_file_that_cannot_be_read_deletes_nothing(
    hub: Hub, make_upload: MakeUpload, lie: bytes
) -> None:
    push(make_upload({"model.safetensors": BIG, "old.json": b"1"}), hub, silent)
    foreign_commit(hub, "hubforge.release.json", lie)
    heard: list[Event] = []
    told = push(make_upload({"model.safetensors": BIG}), hub, heard.append)
    assert told["deleted"] == [] and "old.json" in files_at(hub)
    assert any(isinstance(event, Warned) and "nothing is deleted" in event.text for event in heard)


def test_an_earlier_release_file_cannot_name_files_outside_its_folder(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"fisher.safetensors": BIG}, folder="one"), hub, silent)
    victim = digest(files_at(hub)["one/fisher.safetensors"])
    evil = make_upload({"x.json": b"1"}, folder="two")
    push(evil, hub, silent)
    text = next(file for file in evil.files if file.path == "two/hubforge.release.json").content
    assert isinstance(text, bytes)
    listed = b'"files": [{"path": "one/fisher.safetensors", "size": 5000, "sha256": "' + victim.encode() + b'"},'
    foreign_commit(hub, "two/hubforge.release.json", text.replace(b'"files": [', listed, 1))
    told = push(make_upload({"y.json": b"1"}, folder="two"), hub, silent)
    assert told["deleted"] == ["two/x.json"]
    assert "one/fisher.safetensors" in files_at(hub)


def test_two_folders_of_a_mask_repository_do_not_touch_each_other(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"fisher.safetensors": BIG, "old.json": b"1"}, folder="g4-e4b"), hub, silent)
    push(make_upload({"fisher.safetensors": BIG + b"2"}, folder="g4-31b", card="# Both\n"), hub, silent)
    told = push(make_upload({"fisher.safetensors": BIG + b"3"}, folder="g4-e4b", card="# Both\n"), hub, silent)
    assert told["deleted"] == ["g4-e4b/old.json"]
    found = files_at(hub)
    assert found["g4-e4b/fisher.safetensors"] == BIG + b"3"
    assert found["g4-31b/fisher.safetensors"] == BIG + b"2"
    assert sorted(found) == [
        "README.md",
        *(f"g4-31b/{name}" for name in ("SHA256SUMS", "fisher.safetensors", "hubforge.release.json")),
        *(f"g4-e4b/{name}" for name in ("SHA256SUMS", "fisher.safetensors", "hubforge.release.json")),
    ]


def test_a_tag_that_marks_another_release_stops_the_push_before_anything_is_sent(
    hub: Hub, make_upload: MakeUpload, sent: Requests
) -> None:
    first = push(make_upload({"config.json": b"1"}, tag="v1.0"), hub, silent)
    sent.clear()
    with pytest.raises(PublishError, match=r"the tag v1\.0 already marks commit") as caught:
        push(make_upload({"config.json": b"2"}, tag="v1.0"), hub, silent)
    assert first["commit"] in str(caught.value) and "me/model" in str(caught.value)
    assert not [line for line in sent if not line.startswith("GET")]


def test_a_tag_stays_where_it_is_when_others_moved_main_and_our_files_did_not_change(
    hub: Hub, make_upload: MakeUpload
) -> None:
    upload = make_upload({"config.json": b"1"}, tag="v1.0")
    first = push(upload, hub, silent)
    moved = foreign_commit(hub, "notes.md", b"by hand")
    assert plan_push(upload, hub).changes is False
    assert push(upload, hub, silent)["commit"] == moved
    tags = HfApi(hub.endpoint, token=hub.token).list_repo_refs("me/model").tags
    assert [tag.target_commit for tag in tags] == [first["commit"]]


def test_a_tag_that_is_missing_after_an_interrupted_push_is_set(hub: Hub, make_upload: MakeUpload) -> None:
    first = push(make_upload({"config.json": b"1"}), hub, silent)
    upload = make_upload({"config.json": b"1"}, tag="v1.0")
    assert plan_push(upload, hub).tag_change == "create"
    push(upload, hub, silent)
    tags = HfApi(hub.endpoint, token=hub.token).list_repo_refs("me/model").tags
    assert [(tag.name, tag.target_commit) for tag in tags] == [("v1.0", first["commit"])]


def test_private_repositories_are_made_private_and_public_ones_refuse_private_releases(
    hub: Hub, make_upload: MakeUpload
) -> None:
    assert push(make_upload({"config.json": b"1"}, private=True), hub, silent)["private"] is True
    assert HfApi(hub.endpoint, token=hub.token).model_info("me/model").private is True
    push(make_upload({"config.json": b"1"}, repo="me/open"), hub, silent)
    before = commits(hub, "me/open")
    with pytest.raises(PublishError, match="says `private: true`, but the repository is public"):
        push(make_upload({"config.json": b"2"}, repo="me/open", private=True), hub, silent)
    assert commits(hub, "me/open") == before


def test_the_hubs_own_gitattributes_survives(hub: Hub, make_upload: MakeUpload) -> None:
    upload = make_upload({"config.json": b"1"})
    attributes = UploadFile(".gitattributes", b"", 0, digest(b""))
    with pytest.raises(PublishError, match=r"\.gitattributes would replace"):
        push(Upload("weights", "me/model", (*upload.files, attributes), "m"), hub, silent)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("../x", "holds the part '..'"),
        ("/etc/passwd", "is absolute"),
        ("a/.git/config", "holds the part '.git'"),
        ("a\\b", "holds a backslash"),
        ("a\x00b", "control character"),
    ],
)
def test_paths_that_leave_the_repository_are_refused(hub: Hub, path: str, fault: str) -> None:
    upload = Upload("weights", "me/model", (UploadFile(path, b"", 0, digest(b"")),), "m")
    with pytest.raises(PublishError, match=re.escape(fault)):
        push(upload, hub, silent)


def test_a_folder_upload_may_not_write_outside_its_folder(hub: Hub) -> None:
    upload = Upload("masks", "me/masks", (UploadFile("other/x", b"", 0, digest(b"")),), "m", folder="mine")
    with pytest.raises(PublishError, match="other/x lies outside the folder mine"):
        push(upload, hub, silent)


def test_progress_counts_bytes_up_to_the_whole(hub: Hub, make_upload: MakeUpload) -> None:
    heard: list[Event] = []
    upload = make_upload({"model.safetensors": b"w" * (3 << 20), "config.json": SMALL})
    push(upload, hub, heard.append)
    progress = [event for event in heard if isinstance(event, Progress)]
    total = sum(file.size for file in upload.files)
    assert {event.total for event in progress} == {total} and {event.unit for event in progress} == {"B"}
    assert progress[-1].done == total
    within = [event.done for event in progress if event.what == "model.safetensors"]
    assert len(within) >= 3  # while it is sent, not only at its end


def test_a_card_the_hub_refuses_stops_the_push_before_large_files_are_sent(
    hub: Hub, make_upload: MakeUpload, sent: Requests
) -> None:
    with pytest.raises(PublishError, match=r"front matter of README\.md"):
        push(make_upload({"model.safetensors": BIG}, card="---\nlicense: [\n---\n"), hub, silent)
    assert not [line for line in sent if line.startswith("PUT") or "/commit/" in line]


def test_a_file_the_repository_ignores_is_named(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"config.json": b"1"}), hub, silent)
    foreign_commit(hub, ".gitignore", b"*.log\n")
    with pytest.raises(PublishError, match=r"train\.log is named in the \.gitignore"):
        push(make_upload({"config.json": b"1", "train.log": b"1"}), hub, silent)


@pytest.mark.parametrize("content", [b"v" * 5000, b"v" * 100], ids=["large", "small"])
def test_a_file_that_changed_on_disk_since_it_was_made_is_not_published(
    hub: Hub, make_upload: MakeUpload, content: bytes
) -> None:
    upload = make_upload({"model.safetensors": content})
    path = next(file.content for file in upload.files if file.path == "model.safetensors")
    assert isinstance(path, Path)
    path.write_bytes(b"X" + content[1:])
    with pytest.raises(PublishError, match=r"model\.safetensors is not what was made"):
        push(upload, hub, silent)
    assert commits(hub) == 1


def test_a_wrong_answer_of_the_tree_after_the_commit_names_the_file_and_sets_no_tag(
    hub: Hub, make_upload: MakeUpload, sent: Requests
) -> None:
    seen: list[int] = []

    def second_tree(request: httpx2.Request) -> bool:
        if "/tree/" in request.url.path:
            seen.append(1)
        return "/tree/" in request.url.path and len(seen) == 2

    upload = make_upload({"model.safetensors": BIG, "config.json": SMALL}, tag="v1")
    lying = [
        {"type": "file", "path": file.path, "size": file.size, "oid": "0" * 40, "lfs": None}
        if file.path != "model.safetensors"
        else {
            "type": "file",
            "path": file.path,
            "size": file.size,
            "oid": "0" * 40,
            "lfs": {"oid": "f" * 64, "size": file.size, "pointerSize": 130},
        }
        for file in upload.files
        if file.path != "SHA256SUMS"
    ]
    sent.answer(second_tree, json_answer(200, lying))
    with pytest.raises(VerifyError) as caught:
        push(upload, hub, silent)
    text = str(caught.value)
    assert "model.safetensors: sha256 " + "f" * 64 in text
    assert "SHA256SUMS: missing" in text and "config.json: " in text
    assert HfApi(hub.endpoint, token=hub.token).list_repo_refs("me/model").tags == []


def test_somebody_else_committing_another_file_meanwhile_is_no_matter(
    hub: Hub, make_upload: MakeUpload, sent: Requests
) -> None:
    push(make_upload({"config.json": b"1"}), hub, silent)
    sent.then(lambda request: "/preupload/" in request.url.path, lambda: _outside(hub, "notes.md", b"by hand"))
    told = push(make_upload({"config.json": b"2"}), hub, silent)
    found = files_at(hub)
    assert found["config.json"] == b"2" and found["notes.md"] == b"by hand"
    assert commits(hub) == 4 and told["commit"] == HfApi(hub.endpoint, token=TOKEN).model_info("me/model").sha
    assert len([line for line in sent if "POST" in line and "/commit/" in line]) == 3  # first, refused, second


def test_somebody_else_publishing_the_same_file_meanwhile_stops_the_push(
    hub: Hub, make_upload: MakeUpload, sent: Requests
) -> None:
    push(make_upload({"config.json": b"1", "extra.json": b"1"}), hub, silent)
    sent.then(lambda request: "/preupload/" in request.url.path, lambda: _outside(hub, "extra.json", b"theirs"))
    with pytest.raises(PublishError, match=r"somebody else published .* at the same time: extra\.json") as caught:
        push(make_upload({"config.json": b"2", "extra.json": b"1"}), hub, silent)
    assert "run the same command again" in str(caught.value)
    assert files_at(hub)["extra.json"] == b"theirs" and files_at(hub)["config.json"] == b"1"


def _outside(hub: Hub, path: str, content: bytes) -> None:
    """A commit over a connection of its own, so that the recorded client is not reentered."""
    import base64
    import json

    lines = [
        {"key": "header", "value": {"summary": "by hand", "description": ""}},
        {"key": "file", "value": {"content": base64.b64encode(content).decode(), "path": path, "encoding": "base64"}},
    ]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-ndjson"}
    answer = httpx2.post(f"{hub.endpoint}/api/models/me/model/commit/main", content=body, headers=headers)
    answer.raise_for_status()


def test_the_op_pushes(hub: Hub, make_upload: MakeUpload) -> None:
    op = HubPublisher.model_validate({"repo": "me/model", "model": "healed"})
    assert op.push(make_upload({"config.json": b"1"}), hub, silent)["pushed"]


def test_settings_of_the_client_are_as_before(
    hub: Hub, make_upload: MakeUpload, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    from huggingface_hub import constants
    from huggingface_hub.utils import _http, are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    logger = logging.getLogger("huggingface_hub")
    before = (_http._GLOBAL_CLIENT_FACTORY, list(logger.handlers), logger.propagate)
    push(make_upload({"model.safetensors": BIG}), hub, silent)
    assert constants.HF_HUB_DISABLE_XET is False and not are_progress_bars_disabled()
    assert (_http._GLOBAL_CLIENT_FACTORY, list(logger.handlers), logger.propagate) == before
