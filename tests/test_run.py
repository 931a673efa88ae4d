"""Runs: manifest last, nothing half-written taken for whole, nothing complete repeated."""

import hashlib
import io
import json

import pytest

from hubforge import plan as plans
from hubforge import recipe
from hubforge.errors import SourceError, StepError, StoreError
from hubforge.events import Cached, Failed, Finished, Progress, Started
from hubforge.op import Context
from hubforge.publisher import Hub
from hubforge.reporters import GitHub, Json, Plain
from hubforge.run import Runner
from hubforge.store import LocalStore
from tests.fixtures_core import Shout

TEXT = """\
name: r
sources:
  base: {model: ./model}
stages:
  one: {op: shout, model: base, times: 2}
  two: {op: shout, model: one}
"""


@pytest.fixture
def run(toy_ops, write_recipe, tmp_path):
    def go(text=TEXT):
        events = []
        plan = plans.make(recipe.load(write_recipe(text)), LocalStore(tmp_path / "store"))
        Runner(plan, Hub("http://127.0.0.1:9"), report=events.append).run()
        return plan, events

    return go


def test_each_step_leaves_an_artifact_with_its_manifest(run):
    plan, _ = run()
    artifact = plan.store.get(plan.steps["stages.two"].key, "two")
    assert (artifact.path / "word.txt").read_text() == "HELLOHELLO"
    manifest = plan.store.manifest(artifact.key)
    assert manifest.op == "stages.fixtures_core"  # the module of the toy
    assert manifest.metrics == {"letters": 10}
    assert manifest.inputs == {"one": plan.steps["stages.one"].key}
    assert manifest.files[0].sha256 == hashlib.sha256(b"HELLOHELLO").hexdigest()


def test_the_second_run_makes_nothing(run, toy_ops):
    run()
    toy_ops.clear()
    _, events = run()
    assert toy_ops == []
    assert [type(event) for event in events] == [Cached, Cached]


def test_events_in_order(run):
    _, events = run()
    kinds = [(type(event), event.step) for event in events if isinstance(event, (Started, Finished))]
    assert kinds == [
        (Started, "stages.one"), (Finished, "stages.one"), (Started, "stages.two"), (Finished, "stages.two")
    ]  # fmt: skip
    assert events[0].count == 2


def test_a_failing_step_keeps_what_was_complete(run, toy_ops, tmp_path):
    text = TEXT.replace("two: {op: shout", "two: {op: fail")
    with pytest.raises(StepError, match=r"r.yaml:6: stages.two failed: ValueError: a tensor of shape"):
        run(text)
    assert toy_ops == ["stages.one"]
    store = LocalStore(tmp_path / "store")
    assert [whole for _, whole, _ in store.contents()] in ([True, False], [False, True])
    toy_ops.clear()
    run()
    assert toy_ops == ["stages.two"]


def test_a_failure_is_reported(run, toy_ops, write_recipe, tmp_path):
    events = []
    path = write_recipe(TEXT.replace("two: {op: shout", "two: {op: fail"))
    plan = plans.make(recipe.load(path), LocalStore(tmp_path / "store"))
    with pytest.raises(StepError):
        Runner(plan, Hub("http://127.0.0.1:9"), report=events.append).run()
    assert isinstance(events[-1], Failed)


def test_a_full_disk_says_so(run):
    with pytest.raises(StoreError, match="the disk is full"):
        run(TEXT.replace("two: {op: shout, model: one}", "two: {op: fail, model: one, how: disk}"))


def test_what_a_killed_step_left_is_not_taken_for_whole(run, tmp_path):
    plan, _ = run()
    key = plan.steps["stages.two"].key
    folder = plan.store.folder(key)
    (folder / "manifest.json").unlink()  # killed between the rename and the manifest
    again, _ = run()
    assert again.steps["stages.two"].status == "make"
    assert (folder / "manifest.json").is_file()


def test_what_is_wrong_with_an_input_is_told_with_the_recipes_line(run):
    with pytest.raises(
        SourceError, match=r"r.yaml:6: data/rows.jsonl: row 1 has no 'text'\n  Columns: body."
    ) as caught:
        run(TEXT.replace("two: {op: shout, model: one}", "two: {op: fail, model: one, how: input}"))
    assert caught.value.where.endswith("r.yaml:6")


def test_warnings_name_the_recipes_line(tmp_path):
    def said(reporter):
        stream = io.StringIO()
        Context("masks.core", tmp_path, {}, where="r.yaml:6", report=reporter(stream)).warn("9 samples are cut")
        return stream.getvalue().strip()

    assert said(Plain) == "warning: r.yaml:6: 9 samples are cut"
    assert said(GitHub) == "::warning file=r.yaml,line=6,title=masks.core::9 samples are cut"
    assert json.loads(said(Json))["where"] == "r.yaml:6"


def test_what_is_left_is_told_in_a_pipe_and_not_of_what_was_done_before(monkeypatch):
    """Resumed at 50 of 200: 10 more took 20 s, so the 140 that are left take 280."""
    now = 1000.0
    monkeypatch.setattr("hubforge.reporters.time.monotonic", lambda: now)
    stream = io.StringIO()
    plain = Plain(stream)
    for done, seconds in ((50, 0), (51, 2), (60, 18), (200, 400)):
        now += seconds
        plain(Progress("masks.importance", "loss 2.1", done, 200, "sample"))
    assert [line.strip() for line in stream.getvalue().splitlines()] == [
        "loss 2.1 60/200 sample, 4 min 40 s left", "loss 2.1 200/200 sample",
    ]  # fmt: skip


def test_a_step_that_names_a_subspace_ends_with_its_leak(run, monkeypatch):
    leak = {"projection": "core", "worst": 0.4, "worst_core": 3e-8}
    shout = Shout.run
    monkeypatch.setattr(Shout, "run", lambda self, ctx: shout(self, ctx) | {"leak": leak})
    _, events = run()
    assert next(event.summary for event in events if isinstance(event, Finished)) == "0.0 kB, leak at worst 3.0e-08"


def test_a_file_that_shrank_in_the_store_is_noticed(run):
    plan, _ = run()
    folder = plan.store.folder(plan.steps["stages.one"].key)
    (folder / "word.txt").write_text("x")
    with pytest.raises(StoreError, match=r"word.txt of stages.one is 1 bytes, not 10"):
        plan.store.get(plan.steps["stages.one"].key, "one")


def test_a_damaged_manifest_is_a_store_error(run):
    plan, _ = run()
    folder = plan.store.folder(plan.steps["stages.one"].key)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        plan.store.get(plan.steps["stages.one"].key, "one")


def test_two_runs_at_once_do_not_make_one_step_twice(run, toy_ops, write_recipe, tmp_path):
    plan = plans.make(recipe.load(write_recipe(TEXT)), LocalStore(tmp_path / "store"))
    with plan.store.locked(plan.steps["stages.one"].key), pytest.raises(StoreError, match="another hubforge"):
        run()


def test_gc_removes_what_no_recipe_needs(run, tmp_path):
    from hubforge.garbage import collect_garbage

    run()
    run(TEXT.replace("times: 2", "times: 3"))
    store = tmp_path / "store"
    removed, kept = collect_garbage([tmp_path / "r.yaml"], store, dry_run=True)
    assert sorted(name for name, _ in removed) == ["stages.one", "stages.two"]
    assert len(list(LocalStore(store).contents())) == 4
    collect_garbage([tmp_path / "r.yaml"], store, dry_run=False)
    assert sorted(name for name, _ in kept) == ["stages.one", "stages.two"]
    assert len(list(LocalStore(store).contents())) == 2


def test_manifests_are_json_that_anyone_can_read(run):
    plan, _ = run()
    data = json.loads((plan.store.folder(plan.steps["stages.one"].key) / "manifest.json").read_text())
    assert data["name"] == "stages.one"
    assert {"cpu", "cores", "platform", "python"} <= set(data["hardware"])
