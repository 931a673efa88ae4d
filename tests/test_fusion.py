"""Fused stages: which are, what the plan says of them, and that no byte depends on who else wants one."""

import json

import pytest
import torch

from hubforge import plan as plans
from hubforge import recipe
from hubforge.assemble import assemble
from hubforge.publisher import Hub
from hubforge.run import Runner
from hubforge.show import plan_data
from hubforge.store import LocalStore

STAGES = """\
  voices: {op: average, adapters: [a, b]}
  styled: {op: apply, model: base, adapters: [voices], scale: 0.5}
  tuned:  {op: apply, model: base, adapters: [b]}
  healed: {op: slerp, model: styled, to: tuned, t: 0.3}
"""
UP = "model.layers.0.up"


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make(write_recipe, checkpoint_folder, adapter_folder, tmp_path):
    """make(stages, more): the plan of a recipe over a toy model and two adapters, in the store of that name."""
    base = checkpoint_folder("base", {f"{UP}.weight": numbers(0, 24, 8).bfloat16(), "model.norm": torch.ones(8)})
    one = adapter_folder("a", {UP: (numbers(1, 2, 8), numbers(2, 24, 2))})
    two = adapter_folder("b", {UP: (numbers(3, 3, 8), numbers(4, 24, 3))})
    sources = f"sources:\n  base: {{model: {base}}}\n  a: {{adapter: {one}}}\n  b: {{adapter: {two}}}\n"

    def plan(stages=STAGES, more="", store="store"):
        text = f"name: r\n{sources}stages:\n{stages}{more}"
        return plans.make(recipe.load(write_recipe(text)), LocalStore(tmp_path / store))

    return plan


def runner(plan):
    return Runner(plan, Hub("http://127.0.0.1:9"))


def statuses(plan):
    return {name.partition(".")[2]: step.status for name, step in plan.steps.items()}


def weights(plan, name="healed"):
    (file,) = (f for f in plan.store.manifest(plan.steps[f"stages.{name}"].key).files if f.path.endswith("tensors"))
    return file.sha256


def test_what_only_merges_use_is_computed_in_their_pass(make):
    plan = make()
    assert statuses(plan) == {"voices": "make", "styled": "fused", "tuned": "fused", "healed": "make"}
    assert plan.steps["stages.styled"].fused_into == ("stages.healed",)
    runner(plan).run()
    made = {path.name for path in plan.store.artifacts.iterdir() if path.is_dir()}
    assert made == {plan.steps[f"stages.{name}"].key for name in ("voices", "healed")}
    assert statuses(make()) == {"voices": "cached", "styled": "fused", "tuned": "fused", "healed": "cached"}


def test_the_plan_says_why_a_stage_is_stored(make):
    ends = "  inner: {op: extract_lora, model: styled, base_model: base, rank: 2, targets: up}\n"
    stored = STAGES.replace("scale: 0.5", "scale: 0.5, fuse: false")
    rows = {row["step"]: row for row in plan_data(make(stored))["steps"]}
    assert rows["stages.styled"]["stored"] == "`fuse: false`"
    assert (rows["stages.healed"]["stored"], rows["stages.healed"]["unrounded"]) == (
        "it is the end of its chain",
        ["tuned"],
    )
    rows = {row["step"]: row for row in plan_data(make(STAGES + ends))["steps"]}
    assert rows["stages.styled"]["stored"] == "stages.inner reads its files"
    assert rows["stages.healed"]["unrounded"] == ["styled", "tuned"]
    asked = plan_data(make().only(["healed", "styled"]))["steps"]
    assert [row["stored"] for row in asked if row["step"] == "stages.styled"] == ["its files are asked for"]


def test_who_else_uses_a_stage_changes_no_byte_of_those_after_it(make):
    alone = make()
    runner(alone).run()
    more = "  inner: {op: extract_lora, model: styled, base_model: base, rank: 2, targets: up}\n"
    beside = make(STAGES + more, store="other")
    assert beside.steps["stages.healed"].key == alone.steps["stages.healed"].key
    runner(beside).run()
    assert statuses(beside)["styled"] == "make"
    assert weights(beside) == weights(alone)


def test_what_is_stored_on_purpose_has_another_key_and_other_bytes(make):
    fused, stored = make(), make(STAGES.replace("scale: 0.5", "scale: 0.5, fuse: false"), store="other")
    assert fused.steps["stages.styled"].key == stored.steps["stages.styled"].key  # its own bytes are the same
    assert fused.steps["stages.healed"].key != stored.steps["stages.healed"].key
    runner(fused).run()
    runner(stored).run()
    assert weights(fused) != weights(stored)


def test_asking_for_a_fused_stage_makes_it(make):
    plan = make()
    runner(plan).run()
    asked = plan.only(["styled"])
    assert statuses(asked) == {"voices": "cached", "styled": "make"}
    runner(asked).run()
    assert plan.store.has(plan.steps["stages.styled"].key)
    assert statuses(make())["styled"] == "fused"  # the release of a recipe does not depend on what a store holds


def test_path_makes_a_fused_stage(make, write_recipe):
    from hubforge.op import Settings
    from hubforge.reporters import Quiet
    from hubforge.session import Session

    plan = make()
    session = Session(plan.recipe, plan.store, Settings(), Quiet(), Hub("http://127.0.0.1:9"))
    folder = session.path("styled")
    assert (folder / "model.safetensors").is_file()
    assert not plan.store.has(plan.steps["stages.healed"].key)


def test_a_change_upstream_is_told(make):
    runner(make()).run()
    plan = make(STAGES.replace("scale: 0.5", "scale: 0.6"))
    assert plan.steps["stages.healed"].reason == "styled has changed"
    assert plan.steps["stages.styled"].reason == "scale 0.5 -> 0.6"


def test_the_release_tells_of_every_stage(make):
    plan = make()
    runner(plan).run()
    manifest = json.loads((plan.store.folder(plan.steps["stages.healed"].key) / "manifest.json").read_text())
    styled = manifest["fused"][plan.steps["stages.styled"].key]
    assert (styled["name"], styled["op"], styled["fields"]["scale"]) == ("stages.styled", "stages.apply", 0.5)
    release = assemble(runner(make()))
    steps = {step.entry: step for step in release.steps}
    assert list(steps) == ["voices", "styled", "tuned", "healed"]
    assert steps["styled"].fused_into == ("stages.healed",) and steps["styled"].files == ()
    assert steps["styled"].metrics == {"parameters": 200, "tensors": 2, "changed": 1}
    assert steps["styled"].formula and steps["styled"].fields["scale"] == 0.5
    assert steps["healed"].inputs == {"styled": "stages.styled", "tuned": "stages.tuned"}
