"""Plans: keys depend on what would change the bytes and on nothing else; a stale step says why."""

import pytest

from hubforge import plan as plans
from hubforge import recipe
from hubforge.errors import LockError, RecipeError, SourceError
from hubforge.publisher import Hub
from hubforge.run import Runner
from hubforge.store import LocalStore

TEXT = """\
name: r
sources:
  base: {model: ./model}
stages:
  one: {op: shout, model: base, times: 2}
  two: {op: shout, model: one}
"""


@pytest.fixture
def planned(toy_ops, write_recipe, tmp_path):
    def make(text=TEXT, *, run=False):
        plan = plans.make(recipe.load(write_recipe(text)), LocalStore(tmp_path / "store"))
        if run:
            Runner(plan, Hub("http://127.0.0.1:9")).run()
        return plan

    return make


def keys(plan):
    return {name: step.key for name, step in plan.steps.items()}


def test_names_comments_and_order_are_not_in_the_key(planned):
    first = planned()
    renamed = planned(
        "# a comment\nname: r\nstages:\n  zwei: {model: eins, op: shout}\n  eins: {times: 2, model: start, op: shout}\n"
        "sources:\n  start: {model: ./model}\n"
    )
    assert sorted(keys(first).values()) == sorted(keys(renamed).values())


def test_a_field_changes_the_key_of_the_step_and_of_those_after_it(planned):
    first, second = planned(), planned(TEXT.replace("times: 2", "times: 3"))
    assert all(keys(first)[name] != keys(second)[name] for name in ("stages.one", "stages.two"))


def test_an_unkeyed_field_changes_nothing(planned):
    assert keys(planned()) == keys(planned(TEXT.replace("times: 2", "times: 2, note: hello")))


def test_the_content_of_a_local_source_is_its_key(planned, tmp_path, source_folder):
    before = planned()
    (tmp_path / "model" / "README.md").write_text("words about it")
    assert keys(planned()) == keys(before)
    (tmp_path / "model" / "config.json").write_text("{}")
    after = plans.make(before.recipe, before.store)
    assert keys(after) != keys(before)


def test_reasons(planned):
    assert [step.reason for step in planned().steps.values()] == ["new", "new"]
    planned(run=True)
    assert [step.status for step in planned().steps.values()] == ["cached", "cached"]
    changed = planned(TEXT.replace("times: 2", "times: 3"))
    assert [step.reason for step in changed.steps.values()] == ["times 2 -> 3", "one is remade"]
    only_last = planned(TEXT.replace("model: one}", "model: one, times: 4}"))
    assert [(step.status, step.reason) for step in only_last.steps.values()] == [
        ("cached", ""),
        ("make", "times 1 -> 4"),
    ]


def test_only_what_was_asked_for_and_what_it_needs(planned):
    text = TEXT + "  three: {op: shout, model: base}\n"
    assert list(planned(text).only(["two"]).steps) == ["stages.one", "stages.two"]
    with pytest.raises(RecipeError, match=r"Did you mean 'stages.three'"):
        planned(text).only(["stages.there"])


def test_a_missing_folder(planned):
    with pytest.raises(SourceError, match=r"r.yaml:3: source 'base': there is no ./gone"):
        planned(TEXT.replace("./model", "./gone"))


def test_an_unlocked_hub_source_says_what_to_do(planned):
    with pytest.raises(LockError, match=r"`hubforge lock .*r.yaml` resolves it"):
        planned(TEXT.replace("./model", "some/model"))


def test_a_lock_of_another_revision_is_stale(planned, tmp_path):
    text = TEXT.replace("./model", "some/model")
    entry = {
        "asked": {"model": "some/model"},
        "commit": "a" * 40,
        "files": [{"path": "config.json", "size": 2, "oid": "b" * 40, "is_lfs": False}],
    }
    import json

    (tmp_path / "r.lock.json").write_text(json.dumps({"version": 1, "sources": {"base": entry}}))
    assert planned(text).sources["base"].commit == "a" * 40
    with pytest.raises(LockError, match="was changed after it was locked"):
        planned(text.replace("some/model}", "some/model, revision: v2}"))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 2}', '{"version": 1, "sources": {"base": {"asked": {"model": "some/model"}}}}']
)
def test_damaged_locks(text, planned, tmp_path):
    (tmp_path / "r.lock.json").write_text(text)
    with pytest.raises(LockError):
        planned(TEXT.replace("./model", "some/model"))


def test_locked_package_versions_are_in_the_key_and_checked_before_a_run(planned, tmp_path, monkeypatch):
    import json

    from tests.fixtures_core import Shout

    monkeypatch.setattr(Shout, "pins", ("pyyaml",))
    (tmp_path / "r.lock.json").write_text(json.dumps({"version": 1, "sources": {}, "packages": {"pyyaml": "1.0"}}))
    assert planned().steps["stages.one"].material["pins"] == {"pyyaml": "1.0"}
    with pytest.raises(LockError, match=r"r.yaml:5: stages.one is locked to pyyaml 1.0, and [\d.]+ is installed"):
        planned(run=True)
