"""Killed at any moment, a Hub comes back with every commit it acknowledged and none torn."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubforge.errors import HubforgeError, StoreError
from hubforge.hub import HubSettings, LocalHub, ensure_running, serve, stop_running
from hubforge.hub.storage.gitids import blob_id
from hubforge.hub.storage.shelf import Shelf


def start(folder: Path, port: str = "0") -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "hubforge.hub", str(folder), "--port", port],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    return process, process.stdout.readline().strip()


def check_whole(folder: Path) -> None:
    """Every reference leads to commits, trees and contents that are there and are what their names say."""
    for repo in Shelf(folder).all():
        for revision in repo.refs():
            for commit in repo.history(repo.find(revision)):
                tree = repo.tree(commit)
                assert tree.id == commit.tree
                for entry in tree.files.values():
                    data = repo.path_of(entry).read_bytes()
                    assert len(data) == entry.size
                    assert entry.etag == (hashlib.sha256(data).hexdigest() if entry.sha256 else blob_id(data))


# A client in a process of its own: it goes on through every loss of the server, and prints what was acknowledged.
PUSHER = """
import os, sys, time
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
endpoint, who = sys.argv[1:]
api = HfApi(endpoint=endpoint, token="x")
while True:
    adds = [CommitOperationAdd(f"{who}.txt", os.urandom(9).hex().encode())]
    if who == "a":  # The others never wait: after a lost LFS upload the client pauses for seconds.
        adds.append(CommitOperationAdd(f"{who}.bin", os.urandom(30_000)))
    try:
        print(api.create_commit("me/model", adds, commit_message=who).oid, flush=True)
    except Exception:
        time.sleep(0.05)
"""


def test_kill_9_during_commits_loses_nothing_acknowledged(tmp_path: Path):
    folder = tmp_path / "hub"
    server, endpoint = start(folder)
    HfApi(endpoint=endpoint, token="x").create_repo("me/model")
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    pushers = [
        subprocess.Popen(
            [sys.executable, "-c", PUSHER, endpoint, who],
            stdout=(tmp_path / who).open("wb"), stderr=subprocess.DEVNULL, env=environment,
        )
        for who in "abc"
    ]  # fmt: skip
    chance = random.Random(7)
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until and not all((tmp_path / who).stat().st_size for who in "abc"):
            time.sleep(0.05)
        for _ in range(4):
            time.sleep(0.2 + chance.random() * 0.5)
            server.send_signal(signal.SIGKILL)
            server.wait()
            check_whole(folder)
            server, _ = start(folder, endpoint.rpartition(":")[2])
    finally:
        for process in (*pushers, server):
            process.kill()
            process.wait()
    acknowledged = [oid for who in "abc" for oid in (tmp_path / who).read_text().splitlines()]
    check_whole(folder)
    repo = Shelf(folder).get("models", "me/model")
    kept = {commit.id for commit in repo.history(repo.find("main"))}
    assert len(acknowledged) > 5
    assert set(acknowledged) <= kept


def test_an_upload_left_unfinished_counts_for_nothing(tmp_path: Path):
    with LocalHub(tmp_path) as hub:
        api = hub.api()
        api.create_repo("me/model")
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="me/model")
    incoming = tmp_path / "repos/models/me/model/incoming"
    old, new = incoming / "old.part", incoming / "new.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    with LocalHub(tmp_path) as hub:
        assert hub.api().list_repo_files("me/model") == [".gitattributes", "a"]
    assert not old.exists() and new.exists()


def test_a_repository_deleted_half_way_can_be_made_again(tmp_path: Path):
    with LocalHub(tmp_path) as hub:
        leftover = tmp_path / "repos/models/me/model/blobs/ab"
        leftover.mkdir(parents=True)
        hub.api().create_repo("me/model")
        assert hub.api().list_repo_files("me/model") == [".gitattributes"]


def test_a_background_hub_outlives_its_starter_and_is_found_again(tmp_path: Path):
    endpoint = ensure_running(tmp_path)
    try:
        HfApi(endpoint=endpoint, token="x").create_repo("me/model")
        assert ensure_running(tmp_path) == endpoint
    finally:
        assert stop_running(tmp_path)
    assert not stop_running(tmp_path)
    again = ensure_running(tmp_path)
    try:
        assert HfApi(endpoint=again).repo_exists("me/model")
    finally:
        stop_running(tmp_path)


def test_a_restarted_hub_keeps_its_address(tmp_path: Path):
    hub = LocalHub(tmp_path).start()
    first = hub.endpoint
    hub.close()
    hub.start()
    assert hub.endpoint == first
    hub.close()


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"thesis.tex"):
        LocalHub(tmp_path).start()


def test_a_folder_of_a_later_format_is_refused(tmp_path: Path):
    (tmp_path / "hub.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(StoreError, match="format 2"):
        LocalHub(tmp_path).start()


def test_beyond_loopback_a_hub_needs_tokens(tmp_path: Path):
    with pytest.raises(HubforgeError, match="takes any token"):
        serve(tmp_path, host="0.0.0.0")
    with LocalHub(tmp_path, host="0.0.0.0", settings=HubSettings(tokens={"hf_a": "ann"})) as hub:
        assert hub.api("hf_a").whoami()["name"] == "ann"


def test_a_taken_port_is_said_so(tmp_path: Path):
    with LocalHub(tmp_path) as hub, pytest.raises(HubforgeError, match="cannot listen"):
        LocalHub(tmp_path, port=int(hub.endpoint.rpartition(":")[2])).start()
