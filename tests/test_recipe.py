"""Recipes: every error at once, each with its line and a way to mend it."""

import pytest

from hubforge import recipe
from hubforge.errors import RecipeErrors

BASE = """\
name: r
sources:
  base: {model: ./model}
  other: {model: ./model}
  rows: {dataset: ./rows.jsonl}
"""


def errors(path) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        recipe.load(path)
    return [str(error).replace(str(path), "r.yaml") for error in caught.value.errors]


def test_a_sound_recipe(toy_ops, write_recipe):
    loaded = recipe.load(write_recipe(BASE + "stages:\n  loud: {op: shout, model: base}\n"))
    assert loaded.name == "r"
    assert loaded.nodes["stages.loud"].inputs == {"base": "sources.base"}
    assert loaded.nodes["stages.loud"].where.endswith("r.yaml:7")


def test_model_defaults_to_the_stage_before(toy_ops, write_recipe):
    loaded = recipe.load(
        write_recipe(BASE + "stages:\n  one: {op: shout, model: base}\n  two: {op: shout}\n  three: {op: shout}\n")
    )
    assert loaded.nodes["stages.three"].inputs == {"two": "stages.two"}


def test_steps_come_after_what_they_use(toy_ops, write_recipe):
    loaded = recipe.load(
        write_recipe(BASE + "stages:\n  late: {op: shout, model: early}\n  early: {op: shout, model: base}\n")
    )
    assert list(loaded.nodes) == ["stages.early", "stages.late"]


WRONG = {
    "unknown key": ("stagse: {}", "r.yaml:6: there is no key 'stagse' in a recipe\n  Did you mean 'stages'?"),
    "unknown op": (
        "stages:\n  x: {op: shuot, model: base}",
        "r.yaml:7: there is no op 'shuot' under stages\n  Did you mean 'shout'?",
    ),
    "no op": ("stages:\n  x: {model: base}", "r.yaml:7: stages.x does not say which op it is"),
    "unknown field": (
        "stages:\n  x:\n    op: shout\n    model: base\n    tmies: 2",
        "r.yaml:10: stages.x has no field 'tmies'\n  Did you mean 'times'?",
    ),
    "out of range": (
        "stages:\n  x: {op: shout, model: base,\n      times: 12}",
        "r.yaml:8: stages.x.times is 12, but must be less than or equal to 9\n  How often, in [1, 9].",
    ),
    "wrong type": (
        "stages:\n  x: {op: shout, model: base, times: often}",
        "r.yaml:7: stages.x.times is 'often', but must be",
    ),
    "missing field": ("stages:\n  x: {op: shout}", "r.yaml:7: stages.x needs 'model'\n  What to shout."),
    "ref to nothing": (
        "stages:\n  x: {op: shout, model: bsae}",
        "r.yaml:7: stages.x.model is 'bsae', and nothing has that name\n  Did you mean 'base'?",
    ),
    "ref of the wrong kind": (
        "stages:\n  x: {op: shout, model: rows}",
        "r.yaml:7: stages.x.model is 'rows', which is a dataset; it must be a model\n  Of kind model there are: base",
    ),
    "a cycle": (
        "stages:\n  a: {op: shout, model: b}\n  b: {op: shout, model: a}",
        "r.yaml:7: stages.a -> stages.b -> stages.a: each needs the next, round in a circle",
    ),
    "a name twice": (
        "stages:\n  base: {op: shout, model: other}",
        "r.yaml:7: stages.base has the name of sources.base",
    ),
    "a bad name": ("stages:\n  'a b': {op: shout, model: base}", "r.yaml:7: 'a b' is no name"),
    "a gate on nothing": (
        "gates:\n  - ifeval.acc >= 0.5",
        "r.yaml:7: gates[0] names 'ifeval', and no eval has that name",
    ),
    "a gate that is no gate": ("gates:\n  - be good", "r.yaml:7: gates[0] cannot be read"),
    "an unknown card key": ("card:\n  titel: x", "r.yaml:7: card has no field 'titel'\n  Did you mean 'title'?"),
    "sections that are lists": ("stages: [a, b]", "r.yaml:6: stages must be a mapping of names to entries"),
    "a duplicate key": ("stages: {}\nstages: {}", "r.yaml:7: stages is written twice (first on line 6)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes(case, toy_ops, write_recipe):
    text, message = WRONG[case]
    (found,) = errors(write_recipe(BASE + text + "\n"))
    assert found.startswith(message)


SOURCES = {
    "two kinds": ("{model: a/b, adapter: c/d}", "names 2 of model, adapter, dataset, mask and gguf"),
    "no kind": ("{revision: main}", "names 0 of model"),
    "no repository": ("{model: 'a/b/c'}", "'a/b/c' is no Hub repository"),
    "out of the repository": ("{model: a/b, folder: ../c}", "'../c' leaves the repository"),
    "a revision of a folder": ("{model: ./x, revision: main}", "a local source has no revision"),
    "unknown key": ("{modle: a/b}", "sources.x has no field 'modle'\n  Did you mean 'model'?"),
    "not a mapping": ("a/b", "sources.x must say what it is"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_wrong_sources(case, write_recipe):
    text, message = SOURCES[case]
    found = errors(write_recipe(f"name: r\nsources:\n  x: {text}\n"))
    assert any(message in error and error.startswith("r.yaml:3:") for error in found)


def test_all_errors_at_once_in_the_order_of_lines(toy_ops, write_recipe):
    found = errors(
        write_recipe(
            BASE
            + "stages:\n  a: {op: shout, model: nope}\n  b: {op: shuot}\n  c: {op: shout, model: base, tmies: 1}\n"
            + "nmae: x\ngates: [nothing.here > 1]\n"
        )
    )
    assert [int(error.split(":")[1]) for error in found] == [7, 8, 9, 10, 11]


def test_a_ref_to_a_broken_entry_is_not_a_second_error(toy_ops, write_recipe):
    found = errors(write_recipe(BASE + "stages:\n  a: {op: shuot}\n  b: {op: shout, model: a}\n"))
    assert len(found) == 1


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "42"])
def test_no_mapping_at_all(text, write_recipe):
    (found,) = errors(write_recipe(text))
    assert "a recipe is a mapping" in found


def test_syntax_errors_are_recipe_errors(write_recipe):
    (found,) = errors(write_recipe("name: [r\n"))
    assert "not valid YAML" in found


def test_the_seed_of_the_recipe_is_that_of_each_step_that_sets_none(write_recipe):
    text = BASE + "seed: 7\nevals:\n  a: {op: style, on: [base]}\n  b: {op: style, on: [base], seed: 3}\n"
    loaded = recipe.load(write_recipe(text))
    assert [loaded.nodes[f"evals.{name}/base"].op.seed for name in "ab"] == [7, 3]


def test_gguf_files_are_called_by_the_recipe(write_recipe):
    loaded = recipe.load(write_recipe(BASE + "quantize:\n  quants: {op: gguf, model: base, types: [Q8_0]}\n"))
    assert [node.op.name for node in loaded.nodes.values()] == ["r", "r"]


def test_a_configuration_of_mergekit_is_told_by_its_command(write_recipe):
    with pytest.raises(RecipeErrors) as caught:
        recipe.load(write_recipe("models: [{model: a/a}, {model: b/b}]\nmerge_method: linear\ndtype: bfloat16\n"))
    (error,) = caught.value.errors
    assert "r.yaml:2: this is a configuration of mergekit, not a recipe" in str(error)
    assert "`hubforge import " in error.mend and "r.yaml my-merge.yaml`" in error.mend


MASKS = """\
name: r
sources:
  base: {model: ./model}
  before: {model: ./before}
  rows: {dataset: ./rows.jsonl}
  prose: {adapter: ./prose}
  fetched: {mask: ./mask}
masks:
  fisher: {op: fisher, model: base, data: rows}
  depth: {op: layers, mask: fisher}
  gate: {op: combine, masks: [fisher, depth]}
  other: {op: combine, masks: [fisher]}
  core: {op: subspace, instruct: base, pretrained: before, rank: 2}
  chance: {op: random_subspace, like: core}
"""
GATED = "stages:\n  x: {op: apply, model: base, adapters: [prose], "
TRAINED = "adapters:\n  x: {op: lora, model: base, data: rows, "
PUBLISHED = "publish:\n  x: {op: hub, repo: me/masks, "

MISFITS = {
    "layers as a gate": (
        GATED + "importance: depth, normalize: none}",
        "r.yaml:16: stages.x.importance is 'depth', which is a mask of layers\n"
        "  Make a gate of it with `op: combine`, and take that with `normalize: none`.",
    ),
    "a gate, normalised again": (GATED + "importance: gate}", "which is a gate\n  It is normalised already: set"),
    "a Fisher as a gate": (GATED + "importance: fisher, normalize: none}", "which is a Fisher mask\n  Set `normalize:"),
    "a subspace as importance": (GATED + "importance: core}", "which is a subspace mask\n  Name it as `protect`"),
    "importance as a subspace": (GATED + "protect: fisher}", "stages.x.protect is 'fisher', which is a Fisher mask"),
    "training under importance": (TRAINED + "protect: gate}", "adapters.x.protect is 'gate', which is a gate\n  Make"),
    "rates of a gate": (TRAINED + "importance: gate}", "adapters.x.importance is 'gate', which is a gate\n  Name"),
    "two of one form": (
        PUBLISHED + "masks: [gate, fisher, other]}",
        "r.yaml:16: publish.x.masks[2] is 'other', a gate as 'gate' is\n"
        "  Their files have the same names: publish each under a `folder` of its own.",
    ),
    "two subspaces": (PUBLISHED + "masks: [core, chance]}", "'chance', a subspace mask as 'core' is"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_mask_of_another_form_is_told_before_anything_is_made(case, write_recipe):
    text, expected = MISFITS[case]
    (error,) = errors(write_recipe(MASKS + text + "\n"))
    assert expected in error


FITTING = [
    GATED + "importance: fisher, protect: core}",
    GATED + "importance: gate, normalize: none, protect: chance}",
    GATED + "importance: fetched, normalize: none, protect: fetched}",
    TRAINED + "importance: depth, protect: core}",
    TRAINED + "importance: fisher, protect: fetched}",
    PUBLISHED + "masks: [fisher, gate, core, depth]}\n  y: {op: hub, repo: me/masks, folder: other, masks: [other]}",
]


@pytest.mark.parametrize("text", FITTING)
def test_masks_that_fit(text, write_recipe):
    recipe.load(write_recipe(MASKS + text + "\n"))
