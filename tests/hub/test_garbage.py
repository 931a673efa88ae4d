"""Collecting garbage removes what nothing leads to, and nothing else, whoever pushes meanwhile."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from hubforge.errors import StoreError
from hubforge.hub import Collected, LocalHub, collect
from hubforge.hub.storage import garbage
from hubforge.hub.storage.shelf import Shelf
from tests.hub.test_crash import check_whole

OLD = time.time() - 3 * 86400


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


def contents(folder: Path, repo: str = "me/model") -> set[str]:
    root = folder / "repos/models" / repo
    return {path.name for part in ("blobs", "lfs") for path in (root / part).glob("*/*")}


def age(folder: Path) -> None:
    """As if nothing had been touched for days."""
    for path in (folder / "repos").rglob("*"):
        os.utime(path, (OLD, OLD))


def upload_lfs(hub: LocalHub, data: bytes, repo: str = "me/model") -> bool:
    """An LFS object without a commit. False: the Hub said that it has it."""
    object = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    url = f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch"
    body = {"operation": "upload", "objects": [object], "ref": {"name": "main"}}
    answer = get_session().post(url, json=body, headers={"Authorization": "Bearer x"}).json()["objects"][0]
    if "actions" in answer:
        assert get_session().put(answer["actions"]["upload"]["href"], content=data).status_code == 200
    return "actions" in answer


def test_what_is_reached_stays_and_what_is_not_goes(local_hub: LocalHub, api: HfApi, repo: str):
    api.create_commit(repo, [add("a.txt", b"squashed away"), add("w.bin", b"\0one")], commit_message="1")
    lost = api.create_commit(repo, [add("a.txt", b"kept"), add("w.bin", b"\0two")], commit_message="2").oid
    api.super_squash_history(repo)
    api.create_commit(repo, [add("pr.bin", b"\0proposed")], commit_message="pr", create_pr=True)
    api.create_branch(repo, branch="dev")
    api.create_commit(repo, [add("dev.txt", b"on a branch")], commit_message="dev", revision="dev")
    api.create_tag(repo, tag="v1", revision="dev")
    api.delete_branch(repo, branch="dev")  # The tag still holds it.
    upload_lfs(local_hub, b"never committed")
    age(local_hub.folder)
    before = contents(local_hub.folder)

    assert collect(local_hub.folder, dry_run=True) == Collected(1, 3, 3, len(b"squashed away\0onenever committed"))
    assert contents(local_hub.folder) == before
    assert collect(local_hub.folder) == Collected(1, 3, 3, len(b"squashed away\0onenever committed"))
    assert len(before - contents(local_hub.folder)) == 3
    check_whole(local_hub.folder)
    assert collect(local_hub.folder) == Collected(repositories=1)

    assert api.list_repo_files(repo, revision="v1") == [".gitattributes", "a.txt", "dev.txt", "w.bin"]
    assert "pr.bin" in api.list_repo_files(repo, revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="404"):
        api.repo_info(repo, revision=lost)
    api.merge_pull_request(repo, 1) if api.get_discussion_details(repo, 1).status == "open" else None
    assert upload_lfs(local_hub, b"never committed")  # It is told to send it again.


def test_what_is_young_stays(local_hub: LocalHub, repo: str):
    upload_lfs(local_hub, b"for a commit that is to come")
    assert collect(local_hub.folder) == Collected(repositories=1)
    assert not upload_lfs(local_hub, b"for a commit that is to come")


def test_what_the_hub_said_it_has_is_young_again(local_hub: LocalHub, api: HfApi, repo: str):
    upload_lfs(local_hub, b"\0weights")
    age(local_hub.folder)
    assert not upload_lfs(local_hub, b"\0weights")  # A second publisher counts on it,
    assert collect(local_hub.folder).files == 0  # and may.
    api.create_commit(repo, [add("w.bin", b"\0weights")], commit_message="w")
    check_whole(local_hub.folder)


def test_touched_while_it_was_put_aside_it_comes_back(local_hub: LocalHub, repo: str, monkeypatch: pytest.MonkeyPatch):
    """The one moment that matters: between the look at a file's age and its removal."""
    upload_lfs(local_hub, b"contended")
    age(local_hub.folder)
    rename = Path.rename

    def touched_just_before(path: Path, target: Path) -> Path:
        if target.name.endswith(".dead"):
            os.utime(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", touched_just_before)
    assert collect(local_hub.folder).files == 0
    assert hashlib.sha256(b"contended").hexdigest() in contents(local_hub.folder)


def test_a_killed_collection_is_finished_by_the_next(local_hub: LocalHub, api: HfApi, repo: str):
    api.create_commit(repo, [add("w.bin", b"\0weights")], commit_message="w")
    sha = hashlib.sha256(b"\0weights").hexdigest()
    path = local_hub.folder / "repos/models/me/model/lfs" / sha[:2] / sha
    path.rename(path.with_name(f".{sha}.dead"))
    collect(local_hub.folder)
    check_whole(local_hub.folder)


def test_pushing_while_garbage_is_collected_tears_nothing(local_hub: LocalHub, api: HfApi, repo: str):
    """older=0 takes even what was just uploaded: a push may then be refused, but what is acknowledged is whole."""
    stop, rounds, refused, chance = threading.Event(), [0], 0, random.Random(3)

    def collecting() -> None:
        while not stop.is_set():
            collect(local_hub.folder, older=0)
            rounds[0] += 1
            time.sleep(chance.random() * 0.2)

    thread = threading.Thread(target=collecting)
    thread.start()
    acknowledged = []
    try:
        for number in range(300):
            if number >= 30 and rounds[0] >= 8:
                break
            adds = [add("n.txt", str(number % 3).encode()), add("w.bin", b"\0" + bytes([number % 4]))]
            try:
                acknowledged.append(api.create_commit(repo, adds, commit_message=str(number)).oid)
            except (HfHubHTTPError, RuntimeError) as error:  # The client wraps what an upload meets.
                answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
                assert isinstance(answer, HfHubHTTPError) and answer.response.status_code in (400, 404, 409), error
                refused += 1
    finally:
        stop.set()
        thread.join()
    assert rounds[0] >= 8 and len(acknowledged) > 3, refused
    check_whole(local_hub.folder)
    kept = {commit.id for commit in Shelf(local_hub.folder).get("models", repo).history(
        Shelf(local_hub.folder).get("models", repo).find("main"))}  # fmt: skip
    assert set(acknowledged) <= kept


def test_copies_share_contents_and_each_keeps_its_own(local_hub: LocalHub, api: HfApi, repo: str):
    api.create_commit(repo, [add("w.bin", b"\0weights")], commit_message="w")
    api.duplicate_repo(repo, "me/copy")
    api.delete_file("w.bin", repo)
    api.super_squash_history(repo)
    age(local_hub.folder)
    assert collect(local_hub.folder).files == 1
    check_whole(local_hub.folder)
    assert "w.bin" in api.list_repo_files("me/copy")


def test_only_a_hubs_folder_is_touched(tmp_path: Path):
    (tmp_path / "scratch").mkdir()
    with pytest.raises(StoreError, match="not a Hub's"):
        collect(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "scratch"]


def test_unfinished_files_go_when_they_are_old(local_hub: LocalHub, repo: str):
    part = local_hub.folder / "repos/models/me/model/commits/.0123.part"
    part.write_bytes(b"half")
    collect(local_hub.folder)
    assert part.exists()
    os.utime(part, (OLD, OLD))
    collect(local_hub.folder)
    assert not part.exists()
    assert garbage.DAY == 86400
