"""Repositories and commits, written by the real client."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from hubforge.hub import HubSettings, LocalHub
from hubforge.hub.storage.gitids import blob_id


def put(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)


def files(api: HfApi, repo: str, **where: str) -> list[str]:
    return sorted(api.list_repo_files(repo, **where))


def test_a_new_repository_has_one_commit(api: HfApi):
    url = api.create_repo("me/model")
    assert (url.repo_id, url.namespace, url.repo_type) == ("me/model", "me", "model")
    assert [commit.title for commit in api.list_repo_commits("me/model")] == ["initial commit"]
    assert files(api, "me/model") == [".gitattributes"]


def test_without_a_namespace_a_repository_belongs_to_the_user(api: HfApi):
    assert api.create_repo("model").repo_id == "local/model"


def test_creating_twice_is_refused_unless_it_may_exist(api: HfApi, repo: str):
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo


@pytest.mark.parametrize("name", ["me/../x", "api/x", "datasets/x"])
def test_a_repository_id_that_means_something_else_is_refused(local_hub: LocalHub, name: str):
    namespace, _, rest = name.partition("/")
    answer = get_session().post(
        f"{local_hub.endpoint}/api/repos/create",
        json={"name": rest, "organization": namespace},
        headers={"Authorization": "Bearer x"},
    )
    assert answer.status_code == 400
    assert not list((local_hub.folder / "repos").glob("**/repo.json"))


def test_delete_and_move(api: HfApi, repo: str):
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=repo)
    api.move_repo(repo, "me/other")
    assert "a.txt" in files(api, "me/other")
    assert api.repo_info(repo).id == "me/other"  # The old name leads to it,
    api.delete_repo("me/other")
    assert not api.repo_exists(repo)  # as long as it is there.
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("me/other")
    api.create_repo("me/other")
    assert files(api, "me/other") == [".gitattributes"]


def test_one_commit_adds_replaces_and_deletes(api: HfApi, repo: str):
    weights = os.urandom(1000)
    api.create_commit(
        repo, [put("a.txt", b"1"), put("gone.txt", b"x"), put("old/b", b"y"), put("old/c", b"z")], commit_message="one"
    )
    head = api.model_info(repo).sha
    commit = api.create_commit(
        repo,
        [
            put("a.txt", b"2"),
            put("w.safetensors", weights),
            CommitOperationDelete("gone.txt"),
            CommitOperationDelete("old/"),
        ],
        commit_message="two",
        commit_description="because",
        parent_commit=head,
    )
    assert files(api, repo) == [".gitattributes", "a.txt", "w.safetensors"]
    newest = api.list_repo_commits(repo)[0]
    assert (newest.commit_id, newest.title, newest.message) == (commit.oid, "two", "because")
    info = {entry.path: entry for entry in api.get_paths_info(repo, ["a.txt", "w.safetensors"])}
    assert info["a.txt"].blob_id == blob_id(b"2")
    lfs = info["w.safetensors"].lfs
    assert lfs and (lfs.sha256, lfs.size) == (hashlib.sha256(weights).hexdigest(), 1000)


def test_a_stale_parent_is_refused(api: HfApi, repo: str):
    head = api.model_info(repo).sha
    api.create_commit(repo, [put("a", b"1")], commit_message="a", parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, [put("b", b"1")], commit_message="b", parent_commit=head)
    assert "b" not in files(api, repo)


def test_uploading_the_same_again_makes_no_commit(api: HfApi, repo: str, tmp_path: Path):
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "a.txt").write_text("same")
    (tmp_path / "up" / "w.bin").write_bytes(b"\0" * 100)
    first = api.upload_folder(repo_id=repo, folder_path=tmp_path / "up")
    again = api.upload_folder(repo_id=repo, folder_path=tmp_path / "up")
    assert first.oid == again.oid
    assert len(api.list_repo_commits(repo)) == 2


def test_a_commit_that_changes_nothing_is_the_head(api: HfApi, repo: str):
    api.upload_file(path_or_fileobj=b"\0" * 100, path_in_repo="w.bin", repo_id=repo)
    before = api.model_info(repo).sha
    made = api.create_commit(repo, [CommitOperationCopy("w.bin", "w.bin")], commit_message="copy onto itself")
    assert made.oid == before


def test_a_copy_needs_no_upload(api: HfApi, repo: str):
    api.create_commit(repo, [put("a.txt", b"text"), put("w.bin", b"\0\1")], commit_message="x")
    api.create_commit(
        repo, [CommitOperationCopy("a.txt", "b.txt"), CommitOperationCopy("w.bin", "v.bin")], commit_message="copy"
    )
    entries = {entry.path: entry.blob_id for entry in api.get_paths_info(repo, ["a.txt", "b.txt", "w.bin", "v.bin"])}
    assert entries["a.txt"] == entries["b.txt"]
    assert entries["w.bin"] == entries["v.bin"]


def test_deleting_what_is_not_there_is_refused_and_changes_nothing(api: HfApi, repo: str):
    with pytest.raises(HfHubHTTPError, match="doesn't exist"):
        api.create_commit(repo, [put("a", b"1"), CommitOperationDelete("nope")], commit_message="x")
    assert files(api, repo) == [".gitattributes"]


def test_a_file_cannot_also_be_a_folder(api: HfApi, repo: str):
    with pytest.raises(BadRequestError, match="cannot be a file and the folder"):
        api.create_commit(repo, [put("a", b"1"), put("a/b", b"1")], commit_message="x")


def raw_commit(hub: LocalHub, repo: str, *lines: dict[str, object]) -> tuple[int, str]:
    body = "\n".join(json.dumps(line) for line in ({"key": "header", "value": {"summary": "raw"}}, *lines))
    answer = get_session().post(
        f"{hub.endpoint}/api/models/{repo}/commit/main",
        content=body.encode(),
        headers={"Authorization": "Bearer x", "Content-Type": "application/x-ndjson"},
    )
    return answer.status_code, answer.text


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a\\b", "a\0b", ".git/config", "a//b", ""])
def test_a_commit_cannot_leave_the_repository(local_hub: LocalHub, api: HfApi, repo: str, path: str):
    before = {each for each in local_hub.folder.parent.rglob("*") if "incoming" not in each.parts}
    status, text = raw_commit(
        local_hub, repo, {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}}
    )
    assert status == 400 and "Invalid path" in text
    assert {each for each in local_hub.folder.parent.rglob("*") if "incoming" not in each.parts} == before


@pytest.mark.parametrize(
    "line",
    [
        {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}},
        {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "../../x", "size": 3}},
        {"key": "file", "value": {"path": "a", "content": "%%%", "encoding": "base64"}},
        {"key": "what", "value": {"path": "a"}},
        {"key": "file", "value": []},
        {"nothing": 1},
    ],
    ids=["never uploaded", "oid is a path", "not base64", "unknown key", "not an object", "no key"],
)
def test_a_malformed_commit_is_refused(local_hub: LocalHub, api: HfApi, repo: str, line: dict[str, object]):
    status, _ = raw_commit(local_hub, repo, line)
    assert status == 400
    assert len(api.list_repo_commits(repo)) == 1


def batch(hub: LocalHub, repo: str, data: bytes, size: int | None = None) -> dict[str, dict[str, str]]:
    answer = get_session().post(
        f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch",
        json={
            "operation": "upload",
            "transfers": ["basic"],
            "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data) if size is None else size}],
        },
        headers={"Authorization": "Bearer x"},
    )
    actions: dict[str, dict[str, str]] = answer.json()["objects"][0]["actions"]
    return actions


def test_an_upload_with_another_sha256_is_refused_and_not_kept(local_hub: LocalHub, api: HfApi, repo: str):
    href = batch(local_hub, repo, b"announced")["upload"]["href"]
    assert get_session().put(href, content=b"delivered").status_code == 422
    assert get_session().put(href, content=b"announced and more").status_code == 422
    assert get_session().put(href, content=b"announ").status_code == 422
    root = local_hub.folder / "repos" / "models" / repo
    assert not list(root.glob("lfs/*/*")) and not list(root.glob("incoming/*"))
    assert get_session().put(href, content=b"announced").status_code == 200


def test_an_upload_address_that_was_tampered_with_is_refused(local_hub: LocalHub, api: HfApi, repo: str):
    href = batch(local_hub, repo, b"announced")["upload"]["href"]
    head, _, mac = href.rpartition(".")
    assert get_session().put(f"{head[:-2]}AA.{mac}", content=b"announced").status_code == 403
    assert get_session().put(f"{head}.{'0' * 64}", content=b"announced").status_code == 403


@pytest.mark.parametrize("size", [2500, 3000, 1001])
def test_a_large_file_goes_up_in_parts(tmp_path: Path, lfs_transport: None, size: int):
    settings = HubSettings(multipart_from=1000, part_size=1000)
    data = os.urandom(size)
    with LocalHub(tmp_path / "hub", settings=settings) as hub:
        api = hub.api()
        api.create_repo("me/model")
        api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id="me/model")
        got = api.hf_hub_download("me/model", "w.bin", cache_dir=tmp_path / "cache")
        assert Path(got).read_bytes() == data
        assert not list(hub.folder.glob("repos/*/*/*/incoming/*"))


def test_parts_that_do_not_make_the_announced_file_are_refused(tmp_path: Path):
    from hubforge.hub.refusal import Refusal
    from hubforge.hub.storage.objects import Objects

    objects = Objects(tmp_path)
    with objects.write_part("u", 0) as handle:
        handle.write(b"abc")
    with pytest.raises(Refusal, match="not the announced"):
        objects.join_parts("u", hashlib.sha256(b"abd").hexdigest(), 3)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_committers_at_once_lose_nothing(local_hub: LocalHub, repo: str):
    def push(who: int) -> list[str]:
        api = local_hub.api()
        return [
            api.create_commit(repo, [put(f"{who}/{n}.txt", f"{n}".encode())], commit_message=f"{who}-{n}").oid
            for n in range(10)
        ]

    with ThreadPoolExecutor(4) as pool:
        made = [oid for oids in pool.map(push, range(4)) for oid in oids]
    api = local_hub.api()
    assert sorted(made) == sorted(commit.commit_id for commit in api.list_repo_commits(repo)[:-1])
    assert len(files(api, repo)) == 41


def test_of_two_committers_on_one_parent_one_wins(local_hub: LocalHub, repo: str):
    head = local_hub.api().model_info(repo).sha

    def push(who: int) -> bool:
        try:
            local_hub.api().create_commit(repo, [put("a", f"{who}".encode())], commit_message="a", parent_commit=head)
        except HfHubHTTPError as error:
            assert error.response.status_code == 412
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(push, range(4))) == 1


def test_a_card_with_bad_yaml_is_refused(api: HfApi, repo: str):
    with pytest.raises(ValueError, match=r"Invalid YAML"):
        api.upload_file(path_or_fileobj=b"---\ntags: [a\n---\n# x", path_in_repo="README.md", repo_id=repo)
    assert files(api, repo) == [".gitattributes"]


def test_gitignore_leaves_files_out(api: HfApi, repo: str, tmp_path: Path):
    (tmp_path / "up").mkdir()
    for name in (".gitignore", "a.txt", "b.log"):
        (tmp_path / "up" / name).write_text("*.log\n")
    api.upload_folder(repo_id=repo, folder_path=tmp_path / "up")
    assert files(api, repo) == [".gitattributes", ".gitignore", "a.txt"]


def test_an_upload_that_went_through_xet_by_mistake_is_told_so(local_hub: LocalHub, api: HfApi, repo: str):
    answer = get_session().get(f"{local_hub.endpoint}/api/models/{repo}/xet-write-token/main")
    assert answer.status_code == 404 and "HF_HUB_DISABLE_XET=1" in answer.headers["X-Error-Message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/collections", {"title": "x", "namespace": ["me"] * 50}, 400),
        ("/{repo}.git/info/lfs/objects/batch", {"operation": "upload", "transfers": 3, "objects": [{"size": 3}]}, 200),
    ],
    ids=["a message cut at a space", "transfers that are a number"],
)
def test_a_rude_request_is_answered(local_hub: LocalHub, repo: str, path: str, body: dict[str, object], status: int):
    address = local_hub.endpoint + path.format(repo=repo)
    answer = get_session().post(address, json=body, headers={"Authorization": "Bearer local"})
    assert answer.status_code == status
