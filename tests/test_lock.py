"""Hub sources: pinned by the lock, fetched with the real client, every byte checked. Against the embedded Hub."""

import json

import pytest

from hubforge import plan as plans
from hubforge import recipe
from hubforge.errors import LockError, SourceError
from hubforge.events import Progress
from hubforge.lock import fetch, lock_path, read_lock
from hubforge.op import Settings
from hubforge.publisher import Hub
from hubforge.reporters import Quiet
from hubforge.session import Session
from hubforge.store import LocalStore

TEXT = """\
name: r
license: apache-2.0
sources:
  base: {model: team/base}
  words: {dataset: team/words, split: train}
stages:
  one: {op: shout, model: base, data: words}
"""


@pytest.fixture
def hub(local_hub, source_folder, tmp_path, monkeypatch):
    """A Hub with a model and a dataset, and a download cache of its own."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    api = local_hub.api()
    folder = source_folder(tmp_path / "upload")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    api.create_repo("team/base")
    api.upload_folder(repo_id="team/base", folder_path=folder)
    api.create_repo("team/words", repo_type="dataset")
    for name in ("train.jsonl", "test.jsonl"):
        api.upload_file(
            repo_id="team/words", repo_type="dataset", path_in_repo=f"data/{name}", path_or_fileobj=b'{"prompt": "a"}\n'
        )
    return Hub(local_hub.endpoint, "local")


@pytest.fixture
def session(hub, toy_ops, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TEXT)
    return Session(recipe.load(path), LocalStore(tmp_path / "store"), Settings(), Quiet(), hub)


def test_lock_pins_commit_files_and_licence(session, local_hub):
    path, changes = session.lock()
    assert path == lock_path(session.recipe.path)
    entry = json.loads(path.read_text())["sources"]["base"]
    assert entry["commit"] == local_hub.api().model_info("team/base").sha
    assert entry["license"] == "apache-2.0"
    assert {file["path"]: file["is_lfs"] for file in entry["files"]} == {
        "config.json": False, "model.safetensors": True, "word.txt": False
    }  # fmt: skip
    assert [change.split(":")[0] for change in changes] == ["base", "words"]


def test_what_mends_all_is_said_once(session):
    with pytest.raises(LockError) as caught:
        session.plan(None)
    first, second, mend = str(caught.value).splitlines()
    assert first.endswith("r.yaml:4: there is no lock yet") and second.endswith("r.yaml:5: there is no lock yet")
    assert mend.startswith("  `hubforge lock ")


def test_a_second_lock_changes_nothing(session):
    session.lock()
    assert session.lock()[1] == []


def test_a_split_takes_its_files_only(session):
    path, _ = session.lock()
    assert [file["path"] for file in json.loads(path.read_text())["sources"]["words"]["files"]] == ["data/train.jsonl"]


def test_plan_and_check_need_no_network_once_locked(session, local_hub):
    session.lock()
    local_hub.__exit__(None, None, None)
    assert [step.status for step in session.plan(None).steps.values()] == ["make"]
    assert session.check(online=False) == []


def test_check_without_a_lock_says_so(session):
    (note,) = session.check(online=False)
    assert "not locked yet" in note


def test_run_fetches_what_it_needs(session):
    session.lock()
    session.run(["one"])
    assert (session.path("one") / "word.txt").read_text() == "HELLO"


def test_fetch_reports_bytes(session):
    session.lock()
    plan = session.plan(None)
    events = []
    fetch(plan.sources["base"], session.source_hub.endpoint, None, offline=False, report=events.append)
    assert any(isinstance(event, Progress) and event.done == event.total for event in events)


@pytest.mark.parametrize(("name", "is_lfs"), [("model.safetensors", True), ("config.json", False)])
def test_a_digest_that_is_not_the_locks_names_the_file(session, name, is_lfs):
    path, _ = session.lock()
    lock = json.loads(path.read_text())
    for file in lock["sources"]["base"]["files"]:
        if file["path"] == name:
            file["oid"] = "0" * (64 if is_lfs else 40)
    path.write_text(json.dumps(lock))
    with pytest.raises(SourceError, match=f"{name} of team/base has digest"):
        session.run(["one"])
    assert not list(session.store.artifacts.glob("*/manifest.json"))


def test_a_truncated_download_names_the_file(session, tmp_path):
    session.lock()
    session.run(["one"])
    (blob,) = [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.is_symlink()]
    blob.resolve().write_bytes(b"short")
    with pytest.raises(SourceError, match=r"model.safetensors of team/base is 5 bytes"):
        session.runner(session.plan(None)).source("base")


def test_a_repository_that_is_not_there(session, tmp_path):
    session.recipe.path.write_text(TEXT.replace("team/base", "team/none"))
    other = Session(recipe.load(session.recipe.path), session.store, Settings(), Quiet(), session.source_hub)
    with pytest.raises(SourceError, match=r"r.yaml:4: source 'base': team/none does not exist"):
        other.lock()


def test_a_revision_that_is_not_there(session):
    session.recipe.path.write_text(TEXT.replace("team/base}", "team/base, revision: v9}"))
    other = Session(recipe.load(session.recipe.path), session.store, Settings(), Quiet(), session.source_hub)
    with pytest.raises(SourceError, match="has no such revision"):
        other.lock()


def test_offline_without_a_copy(session):
    session.lock()
    plan = session.plan(None)
    with pytest.raises(SourceError, match="is not here"):
        fetch(plan.sources["base"], session.source_hub.endpoint, None, offline=True, report=lambda event: None)


def test_no_hub_at_all(session, tmp_path):
    other = Session(session.recipe, session.store, Settings(), Quiet(), Hub("http://127.0.0.1:9"))
    with pytest.raises(SourceError, match="could not be read from the Hub"):
        other.lock()


def test_the_lock_of_another_recipe_is_stale(session):
    session.lock()
    session.recipe.path.write_text(TEXT.replace("team/base", "team/other"))
    with pytest.raises(LockError, match="was changed after it was locked"):
        plans.make(recipe.load(session.recipe.path), session.store)


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", b"[" * 100_000, b'{"version": 1, "sources": {}, "packages": 3}'],
    ids=["bytes", "deep", "packages"],
)
def test_a_file_that_is_no_lock_is_said_so(tmp_path, text):
    recipe = tmp_path / "x.yaml"
    lock_path(recipe).write_bytes(text)
    with pytest.raises(LockError, match="hubforge lock"):
        read_lock(recipe)
