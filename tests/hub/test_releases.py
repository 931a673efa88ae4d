"""A repository's page says whether it holds what its release file says, and takes no release file on trust."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import get_session

from hubforge.hub import LocalHub
from hubforge.hub.storage import releases
from hubforge.hub.storage.releases import FILE_NAME, releases_of
from hubforge.hub.storage.shelf import Shelf
from hubforge.release import FILE_NAME as WRITTEN_NAME
from hubforge.release import CardRecord, File, Release, TargetRecord
from hubforge.sections import sections, wrap

FILES = {"README.md": b"# Poet\n", "config.json": b"{}", "model.safetensors": b"\0" * 5000}


def release(files: dict[str, bytes], name: str = "poet") -> bytes:
    """As hubforge itself writes one."""
    records = tuple(
        File(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in files.items()
    )
    written = CardRecord(sections=sections(files.get("README.md", b"").decode()))
    target = TargetRecord(name="weights", kind="model", repo="me/model", files=records, card=written)
    other = TargetRecord(name="quants", kind="gguf", repo="me/other", files=(File(path="x", size=1, sha256="0" * 64),))
    made = Release(hubforge="0", name=name, recipe_file="r.yaml", recipe="", targets=(other, target), target="weights")
    return made.model_dump_json().encode()


def push(api: HfApi, repo: str, files: dict[str, bytes]) -> None:
    adds = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.create_commit(repo, adds, commit_message="files")


def page(hub: LocalHub, repo: str) -> str:
    answer = get_session().get(f"{hub.endpoint}/{repo}")
    assert answer.status_code == 200
    return answer.text


def test_digests_match_and_then_differ(local_hub: LocalHub, api: HfApi, repo: str):
    assert FILE_NAME == WRITTEN_NAME
    push(api, repo, {**FILES, FILE_NAME: release(FILES)})
    assert "release poet, 3 files, digests match" in page(local_hub, repo)
    push(api, repo, {"model.safetensors": b"\0" * 4999 + b"1"})  # As many bytes, one of them another.
    assert "release poet, 3 files, digests differ: model.safetensors</p>" in page(local_hub, repo)
    push(api, repo, {"README.md": b"# Edited by a human\n"})
    assert "digests differ: README.md, model.safetensors</p>" in page(local_hub, repo)
    api.delete_file("config.json", repo)
    assert "digests differ: README.md, config.json, model.safetensors</p>" in page(local_hub, repo)


def test_people_may_write_on_a_card_but_not_in_what_was_generated(local_hub: LocalHub, api: HfApi, repo: str):
    card = wrap("title", "# Poet").encode()
    files = {**FILES, "README.md": card}
    push(api, repo, {**files, FILE_NAME: release(files)})
    push(api, repo, {"README.md": card + b"\nLoved by all.\n"})
    assert "release poet, 3 files, digests match" in page(local_hub, repo)
    push(api, repo, {"README.md": card.replace(b"# Poet", b"# Better poet")})
    assert "digests differ: README.md</p>" in page(local_hub, repo)


def test_each_folder_of_masks_has_its_own(local_hub: LocalHub, api: HfApi, repo: str):
    for folder in ("g4-31b", "g4-e4b"):
        files = {f"{folder}/fisher.safetensors": folder.encode()}
        push(api, repo, {**files, f"{folder}/{FILE_NAME}": release(files, folder)})
    push(api, repo, {"g4-31b/fisher.safetensors": b"other"})
    text = page(local_hub, repo)
    assert "<code>g4-e4b</code>: release g4-e4b, 1 file, digests match" in text
    assert "<code>g4-31b</code>: release g4-31b, 1 file, digests differ: g4-31b/fisher.safetensors" in text


BAD: dict[str, bytes] = {
    "not JSON": b"{",
    "a list": b"[]",
    "no target": b'{"name": "x"}',
    "another target": json.dumps({"name": "x", "target": "b", "targets": [{"name": "a", "files": []}]}).encode(),
    "files are text": json.dumps({"name": "x", "target": "a", "targets": [{"name": "a", "files": "xyz"}]}).encode(),
    "a file is a number": json.dumps({"name": "x", "target": "a", "targets": [{"name": "a", "files": [1]}]}).encode(),
    "a size is text": json.dumps(
        {"name": "x", "target": "a", "targets": [{"name": "a", "files": [{"path": "a", "size": "x", "sha256": ""}]}]}
    ).encode(),
    "a size is endless": (
        b'{"name": "x", "target": "a", '
        b'"targets": [{"name": "a", "files": [{"path": "a", "size": 1e999, "sha256": ""}]}]}'
    ),
    "deep": b"[" * 100_000,
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_is_no_release_file_is_said_so(local_hub: LocalHub, api: HfApi, repo: str, data: bytes):
    push(api, repo, {FILE_NAME: data})
    assert "hubforge.release.json: not a release file" in page(local_hub, repo)


def test_a_release_file_says_nothing_to_the_browser(local_hub: LocalHub, api: HfApi, repo: str):
    hostile = "<script>alert(1)</script>"
    push(api, repo, {FILE_NAME: release({hostile: b"x"}, hostile)})
    text = page(local_hub, repo)
    assert "<script" not in text and "release &lt;script&gt;" in text


def test_what_a_page_reads_is_bounded(local_hub: LocalHub, api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch):
    many: dict[str, Any] = {f"f{number}.txt": str(number).encode() for number in range(8)}
    push(api, repo, {**many, FILE_NAME: release(many)})
    found = Shelf(local_hub.folder).get("models", repo)
    tree = found.tree(found.find("main"))
    monkeypatch.setattr(releases, "_MAX_HASHED", 5)  # Each of the files has one byte.
    (status,) = releases_of(found, tree)
    assert str(status) == "release poet, 8 files, digests match, 3 not checked"
    monkeypatch.setattr(releases, "_MAX_FILE", 100)
    assert str(releases_of(found, tree)[0]) == "hubforge.release.json: too large to be read here"


def test_a_newer_version_is_shown(local_hub: LocalHub, api: HfApi, repo: str):
    api.create_repo("me/model-2")
    push(api, repo, {"README.md": b"---\nlicense: mit\nnew_version: me/model-2\n---\n# Old\n"})
    assert 'There is a newer version: <a href="/me/model-2"' in page(local_hub, repo)
