"""A repository that moved is found by its old name; messages of tags are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from hubforge.hub import HubSettings, LocalHub
from hubforge.hub.storage.shelf import Shelf


@pytest.fixture
def moved(api: HfApi, repo: str) -> str:
    adds = [CommitOperationAdd("a b.txt", b"text"), CommitOperationAdd("w.bin", b"\0weights")]
    api.create_commit(repo, adds, commit_message="first")
    api.move_repo(repo, "me/renamed")
    return repo


def test_the_old_name_leads_to_the_new(local_hub: LocalHub, api: HfApi, moved: str, cache: Path):
    assert api.repo_info(moved).id == "me/renamed"
    assert Path(api.hf_hub_download(moved, "w.bin", cache_dir=cache)).read_bytes() == b"\0weights"
    assert (Path(api.snapshot_download(moved, cache_dir=cache)) / "a b.txt").read_bytes() == b"text"
    api.upload_file(path_or_fileobj=b"\0more", path_in_repo="more.bin", repo_id=moved)
    assert "more.bin" in api.list_repo_files("me/renamed")
    for path in (f"/{moved}", f"/{moved}/tree/main", f"/{moved}/resolve/main/a%20b.txt?download=1"):
        answer = get_session().get(local_hub.endpoint + path, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, path.replace(moved, "me/renamed"))


def test_a_chain_of_names_is_followed_and_a_new_owner_of_a_name_keeps_it(api: HfApi, moved: str):
    api.move_repo("me/renamed", "me/again")
    assert api.repo_info(moved).id == "me/again"
    api.create_repo(moved)
    assert api.repo_info(moved).id == moved
    assert api.repo_info("me/renamed").id == "me/again"
    api.move_repo("me/again", "me/renamed")  # Back: a circle leads nowhere wrong.
    assert api.repo_info("me/again").id == "me/renamed"


def test_an_old_name_removes_nothing(api: HfApi, moved: str):
    with pytest.raises(HfHubHTTPError, match="404"):
        api.delete_repo(moved)
    assert api.repo_exists("me/renamed")
    api.delete_repo("me/renamed")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(moved)


def test_a_refused_move_leaves_no_trace(local_hub: LocalHub, api: HfApi, repo: str):
    api.create_repo("me/taken")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.move_repo(repo, "me/taken")
    api.delete_repo(repo)
    assert not api.repo_exists(repo)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", settings=HubSettings(tokens={"hf_a": "ann", "hf_b": "bob"})) as hub:
        yield hub


def test_a_move_tells_strangers_nothing(hub: LocalHub):
    hub.api("hf_a").create_repo("ann/old", private=True)
    hub.api("hf_a").move_repo("ann/old", "ann/new")
    headers = {"Authorization": "Bearer hf_b"}
    old, never = (
        get_session().get(f"{hub.endpoint}/api/models/ann/{name}", headers=headers) for name in ("old", "never")
    )
    assert (old.status_code, old.text) == (never.status_code, never.text)


def test_messages_of_tags_are_kept(local_hub: LocalHub, api: HfApi, repo: str):
    api.create_tag(repo, tag="v1", tag_message="The <b>first</b> that rhymes")
    api.create_tag(repo, tag="v2")
    stored = Shelf(local_hub.folder).get("models", repo)
    assert stored.tag_notes()["v1"]["message"] == "The <b>first</b> that rhymes"
    assert set(stored.tag_notes()) == {"v1"}
    for page in ("", "/commits/main"):
        text = get_session().get(f"{local_hub.endpoint}/{repo}{page}").text
        assert "The &lt;b&gt;first&lt;/b&gt; that rhymes" in text, page
    api.delete_tag(repo, tag="v1")
    assert stored.tag_notes() == {}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v2", tag_message="other")
    assert stored.tag_notes() == {}
