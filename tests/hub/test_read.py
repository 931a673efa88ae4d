"""What the real client reads back: files, trees, history, references, and its own exceptions for what is missing."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import get_session

from hubforge.hub import HubSettings, LocalHub

TENSORS = b'{"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
CARD = b"""---
license: apache-2.0
base_model: [org/base]
base_model_relation: merge
library_name: transformers
pipeline_tag: text-generation
tags: [merge]
datasets: me/data
language: en
---
# Hello
"""


@pytest.fixture
def full(api: HfApi, repo: str) -> str:
    """`me/model` with a card, a configuration, weights and a folder."""
    contents = {
        "README.md": CARD,
        "config.json": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
        "model.safetensors": struct.pack("<Q", len(TENSORS)) + TENSORS + b"\0" * 12,
        "a/b/c d.txt": "grüß".encode(),
    }
    operations = [CommitOperationAdd(path, data) for path, data in contents.items()]
    api.create_commit(repo, operations, commit_message="all")
    return repo


def test_a_snapshot_holds_every_file(api: HfApi, full: str, cache: Path):
    folder = Path(api.snapshot_download(full, cache_dir=cache))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {".gitattributes", "README.md", "config.json", "model.safetensors", "a/b/c d.txt"}
    assert (folder / "a/b/c d.txt").read_text() == "grüß"
    assert folder.name == api.model_info(full).sha


def test_a_download_is_resumed_where_it_stopped(local_hub: LocalHub, api: HfApi, repo: str, tmp_path: Path):
    from huggingface_hub.file_download import http_get

    data = os.urandom(300_000)
    api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id=repo)
    with (tmp_path / "part").open("wb+") as part:
        part.write(b"\0" * 100_000)  # Other bytes than were sent, to see that they are not sent again.
        http_get(f"{local_hub.endpoint}/{repo}/resolve/main/w.bin", part, resume_size=100_000, expected_size=300_000)
    assert (tmp_path / "part").read_bytes() == b"\0" * 100_000 + data[100_000:]


def test_ranges(local_hub: LocalHub, api: HfApi, repo: str):
    data = bytes(range(256)) * 10
    api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id=repo)
    url = f"{local_hub.endpoint}/{repo}/resolve/main/w.bin"

    def get(span: str) -> tuple[int, bytes, str]:
        answer = get_session().get(url, headers={"Range": f"bytes={span}"})
        return answer.status_code, answer.content, answer.headers.get("content-range", "")

    assert get("10-19") == (206, data[10:20], "bytes 10-19/2560")
    assert get("2550-") == (206, data[2550:], "bytes 2550-2559/2560")
    assert get("-5") == (206, data[-5:], "bytes 2555-2559/2560")
    assert get("9999-")[0] == 416


def test_the_headers_that_downloads_are_checked_against(local_hub: LocalHub, api: HfApi, full: str):
    answer = get_session().head(f"{local_hub.endpoint}/{full}/resolve/main/model.safetensors")
    info = api.model_info(full, files_metadata=True)
    weights = next(each for each in info.siblings or [] if each.rfilename == "model.safetensors")
    assert weights.lfs and answer.headers["x-linked-etag"] == f'"{weights.lfs.sha256}"'
    assert answer.headers["x-linked-size"] == str(weights.size) == answer.headers["content-length"]
    assert answer.headers["x-repo-commit"] == info.sha
    assert answer.headers["x-request-id"]
    assert answer.content == b""
    again = get_session().get(answer.url, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


def test_listing_a_tree(api: HfApi, full: str):
    top = {entry.path: type(entry) for entry in api.list_repo_tree(full)}
    assert top["a"] is RepoFolder and top["README.md"] is RepoFile and "a/b" not in top
    deep = {entry.path for entry in api.list_repo_tree(full, "a", recursive=True)}
    assert deep == {"a/b", "a/b/c d.txt"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(full, "nope"))


def test_a_long_listing_comes_in_pages(tmp_path: Path, lfs_transport: None):
    with LocalHub(tmp_path / "hub", settings=HubSettings(page_size=7)) as hub:
        api = hub.api()
        api.create_repo("me/model")
        for start in range(0, 20, 10):
            adds = [CommitOperationAdd(f"{n:02}.txt", b"x") for n in range(start, start + 10)]
            api.create_commit("me/model", adds, commit_message=f"{start}")
        paths = [entry.path for entry in api.list_repo_tree("me/model", expand=True)]
        assert paths == [".gitattributes", *(f"{n:02}.txt" for n in range(20))]
        for n in range(7):
            api.upload_file(path_or_fileobj=b"%d" % n, path_in_repo="a", repo_id="me/model")
        assert len(api.list_repo_commits("me/model")) == 10


def test_expanding_names_the_last_commit_of_each_file_and_folder(api: HfApi, full: str):
    api.upload_file(path_or_fileobj=b"new", path_in_repo="a/b/new.txt", repo_id=full, commit_message="later")
    titles = {
        entry.path: entry.last_commit.title
        for entry in api.list_repo_tree(full, recursive=True, expand=True)
        if entry.last_commit
    }
    assert titles[".gitattributes"] == "initial commit"
    assert titles["a/b/c d.txt"] == "all"
    assert titles["a/b/new.txt"] == titles["a"] == titles["a/b"] == "later"


def test_model_info_is_drawn_from_card_and_files(api: HfApi, full: str):
    info = api.model_info(full)
    assert info.card_data is not None and info.card_data.license == "apache-2.0"
    assert (info.library_name, info.pipeline_tag) == ("transformers", "text-generation")
    wanted = {"safetensors", "llama", "merge", "license:apache-2.0", "base_model:org/base", "base_model:merge:org/base"}
    assert wanted | {"dataset:me/data", "en"} <= set(info.tags or [])
    assert info.safetensors is not None and info.safetensors.parameters == {"BF16": 6}
    assert info.config == {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert [model.id for model in api.list_models(author="me", search="mod")] == [full]
    assert api.get_safetensors_metadata(full).parameter_count == {"BF16": 6}


def test_tags(api: HfApi, full: str):
    api.create_tag(full, tag="v1.0")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(full, tag="v1.0")
    api.create_tag(full, tag="v1.0", exist_ok=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="later.txt", repo_id=full)
    assert not api.file_exists(full, "later.txt", revision="v1.0")
    assert [tag.name for tag in api.list_repo_refs(full).tags] == ["v1.0"]
    api.delete_tag(full, tag="v1.0")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(full, revision="v1.0")


def test_branches(api: HfApi, full: str):
    api.create_branch(full, branch="dev/x")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(full, branch="dev/x")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="dev.txt", repo_id=full, revision="dev/x")
    assert api.file_exists(full, "dev.txt", revision="dev/x")
    assert not api.file_exists(full, "dev.txt")
    api.delete_branch(full, branch="dev/x")
    assert [branch.name for branch in api.list_repo_refs(full).branches] == ["main"]


def test_a_commit_is_named_whole_or_by_its_first_digits(api: HfApi, full: str):
    sha = api.model_info(full).sha
    assert sha
    api.upload_file(path_or_fileobj=b"x", path_in_repo="later.txt", repo_id=full)
    assert api.model_info(full, revision=sha).sha == api.model_info(full, revision=sha[:9]).sha == sha


def test_super_squash_keeps_the_files(api: HfApi, full: str):
    before = {entry.path for entry in api.list_repo_tree(full, recursive=True)}
    api.super_squash_history(full, commit_message="one")
    assert [commit.title for commit in api.list_repo_commits(full)] == ["one"]
    assert {entry.path for entry in api.list_repo_tree(full, recursive=True)} == before


def test_what_is_missing_is_named_by_the_clients_own_exceptions(
    local_hub: LocalHub, api: HfApi, full: str, cache: Path
):
    def download(repo: str, file: str, **more: str) -> None:
        api.hf_hub_download(repo, file, cache_dir=cache, **more)

    with pytest.raises(EntryNotFoundError):
        download(full, "nope.txt")
    with pytest.raises(RevisionNotFoundError):
        download(full, "README.md", revision="nope")
    for missing in ("me/nope", "gpt2"):
        with pytest.raises(RepositoryNotFoundError):
            download(missing, "README.md")
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(missing)
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=missing)
    assert not api.file_exists(full, "nope.txt") and api.file_exists(full, "README.md")
    assert not api.revision_exists(full, "nope") and api.revision_exists(full, "main")
    assert list(cache.glob("models--me--model/.no_exist/*/nope.txt"))


@pytest.mark.parametrize("path", ["..%2F..%2Fhub.json", "%2E%2E/hub.json", "a%00b", "%FF", "..%2F..%2Frefs.json"])
def test_a_download_cannot_leave_the_repository(local_hub: LocalHub, full: str, path: str):
    import http.client

    def status(address: str) -> int:
        connection = http.client.HTTPConnection(local_hub.endpoint.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request("GET", address)  # Unlike the client, sends the address as it is.
            return connection.getresponse().status

    assert status(f"/{full}/resolve/main/{path}") in (400, 404)
    assert status(f"/{full}/resolve/{path.replace('/', '%2F')}/README.md") in (400, 404)
    assert status(f"/api/models/..%2F../x/tree/main/{path}") == 401


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_datasets_and_spaces(api: HfApi, repo: str, cache: Path, kind: str):
    more = {"space_sdk": "static"} if kind == "space" else {}
    url = api.create_repo(repo, repo_type=kind, **more)
    assert (url.repo_type, url.repo_id) == (kind, repo)
    api.upload_file(path_or_fileobj=b"a,b\n", path_in_repo="d/x.csv", repo_id=repo, repo_type=kind)
    api.upload_file(path_or_fileobj=b"\0", path_in_repo="x.bin", repo_id=repo, repo_type=kind)
    assert Path(api.hf_hub_download(repo, "d/x.csv", repo_type=kind, cache_dir=cache)).read_bytes() == b"a,b\n"
    assert Path(api.snapshot_download(repo, repo_type=kind, cache_dir=cache), "x.bin").read_bytes() == b"\0"
    assert api.repo_info(repo, repo_type=kind).sha != api.model_info(repo).sha
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_a_private_repository_is_invisible_without_a_token(local_hub: LocalHub, api: HfApi, cache: Path):
    api.create_repo("me/hidden", private=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="me/hidden")
    stranger = local_hub.api(token=False)
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("me/hidden")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/hidden", "a.txt", endpoint=local_hub.endpoint, token=False, cache_dir=cache)
    assert not list(stranger.list_models())
    api.update_repo_settings("me/hidden", private=False)
    assert stranger.model_info("me/hidden").private is False


def test_a_gated_repository_shows_its_page_but_not_its_files(local_hub: LocalHub, api: HfApi, full: str, cache: Path):
    api.update_repo_settings(full, gated="manual")
    stranger = local_hub.api(token=False)
    assert stranger.model_info(full).gated == "manual"
    with pytest.raises(GatedRepoError):
        stranger.hf_hub_download(full, "config.json", cache_dir=cache)
    assert api.hf_hub_download(full, "config.json", cache_dir=cache)


def test_the_hf_command_downloads(local_hub: LocalHub, full: str, tmp_path: Path):
    done = subprocess.run(
        [Path(sys.executable).with_name("hf"), "download", full, "--local-dir", tmp_path / "down", "--quiet"],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "HF_ENDPOINT": local_hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
        },
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "down" / "a/b/c d.txt").read_text() == "grüß"


def test_a_copy_of_a_repository(api: HfApi, full: str):
    api.duplicate_repo(full, "me/copy")
    assert api.list_repo_files("me/copy") == api.list_repo_files(full)
    api.delete_repo(full)
    assert api.model_info("me/copy").safetensors is not None
