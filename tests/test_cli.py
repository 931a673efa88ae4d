"""The command as a user meets it: exit codes, output for scripts, errors without tracebacks."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from hubforge.starters import PURPOSES


@pytest.fixture
def hubforge(tmp_path):
    """Runs the command in an empty folder; gives the finished process."""

    def run(*arguments: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_DATA_HOME": str(tmp_path / "data"), "HF_HOME": str(tmp_path / "hf")}
        environment.pop("HF_TOKEN", None)
        done = subprocess.run(
            [sys.executable, "-m", "hubforge.cli", *arguments],
            capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300,
        )  # fmt: skip
        assert done.returncode == check, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.mark.parametrize("purpose", PURPOSES)
def test_starters_are_sound(purpose, hubforge, tmp_path):
    done = hubforge("init", purpose, "recipes/mine.yaml")
    assert "wrote recipes/mine.yaml" in done.stdout
    assert (tmp_path / "recipes/mine.yaml").read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert "hubforge lock recipes/mine.yaml" in " ".join(hubforge("check", "recipes/mine.yaml").stdout.split())


def test_init_never_overwrites(hubforge):
    hubforge("init", "gguf", "r.yaml")
    assert "--force overwrites it" in hubforge("init", "gguf", "r.yaml", check=2).stderr
    hubforge("init", "gguf", "r.yaml", "--force")


def test_init_of_nothing_known_lists_what_there_is(hubforge):
    assert "two-stage" in hubforge("init", "everything", check=2).stderr


def test_a_wrong_recipe_ends_with_2_and_all_its_errors(hubforge, tmp_path):
    (tmp_path / "r.yaml").write_text("nmae: r\nstages:\n  x: {op: slrp}\n")
    done = hubforge("check", "r.yaml", check=2)
    assert "r.yaml:1: there is no key 'nmae' in a recipe" in done.stderr
    assert "r.yaml:3: there is no op 'slrp' under stages" in done.stderr
    assert not (tmp_path / ".hubforge").exists()


def test_an_unlocked_recipe_ends_with_3(hubforge):
    hubforge("init", "gguf", "r.yaml")
    assert "hubforge lock r.yaml" in hubforge("plan", "r.yaml", check=3).stderr


def test_a_missing_source_ends_with_4(hubforge, tmp_path):
    (tmp_path / "r.yaml").write_text("name: r\nsources:\n  a: {model: ./gone}\n")
    assert "r.yaml:3: source 'a': there is no ./gone" in hubforge("plan", "r.yaml", check=4).stderr


def test_plan_for_scripts(hubforge, tmp_path, source_folder):
    source_folder(tmp_path / "model")
    (tmp_path / "r.yaml").write_text(
        "name: r\nsources:\n  a: {model: ./model}\nstages:\n  b: {op: slerp, model: a, to: a, t: 0.5}\n"
    )
    data = json.loads(hubforge("plan", "--json", "r.yaml").stdout)
    assert data["to_make"] == 1
    assert data["steps"][0]["status"] == "make"


def test_ops_names_every_field(hubforge):
    done = hubforge("ops", "slerp")
    assert "required" in done.stdout
    (op,) = json.loads(hubforge("ops", "slerp", "--json").stdout)
    assert {field["name"] for field in op["fields"]} >= {"model", "to", "t"}
    assert all(field["description"] for field in op["fields"])


def test_every_op_is_documented():
    from hubforge import catalog
    from hubforge.manual import describe

    for entry in catalog.everything():
        data = describe(entry)
        assert data["summary"], entry
        assert [field["name"] for field in data["fields"] if not field["description"]] == [], entry


def test_an_unknown_op_is_guessed(hubforge):
    assert "Did you mean 'slerp'?" in hubforge("ops", "slrep", check=2).stderr


def test_the_committed_schema_is_that_of_the_code():
    from pathlib import Path

    from hubforge.manual import recipe_schema

    committed = Path(__file__).parent.parent / "recipes" / "schema.json"
    assert json.loads(committed.read_text()) == recipe_schema(), "run: hubforge schema > recipes/schema.json"


@pytest.mark.parametrize("name", ["demo", "gemma-4-e4b-ties", "gemma-4-e4b-two-stage", "gemma-4-masks"])
def test_committed_recipes_fit_the_schema_and_the_code(name):
    from pathlib import Path

    from hubforge import recipe

    path = Path(__file__).parent.parent / "recipes" / f"{name}.yaml"
    assert recipe.load(path).nodes
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_output_in_a_pipe_has_no_colour(hubforge):
    assert "\x1b[" not in hubforge("ops").stdout


def test_doctor_names_tokens_and_never_shows_them(hubforge, monkeypatch):
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secretsecret")
    done = hubforge("doctor")
    assert "HUGGING_FACE_HUB_TOKEN" in done.stdout
    assert "hf_secretsecret" not in done.stdout + done.stderr


def test_usage_errors_end_with_2(hubforge):
    hubforge("nosuch", check=2)
    hubforge("plan", check=2)


def test_a_mergekit_configuration_becomes_a_recipe(hubforge, tmp_path):
    (tmp_path / "mk.yml").write_text(
        "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {t: 0.3}\n"
    )
    hubforge("import", "mk.yml", "r.yaml")
    from hubforge import recipe

    (node,) = recipe.load(tmp_path / "r.yaml").nodes.values()
    assert node.op.t == 0.3
    assert "--force overwrites it" in hubforge("import", "mk.yml", "r.yaml", check=2).stderr


PUSHED = """\
name: tiny
license: mit
sources: {one: {adapter: ./one}, two: {adapter: ./two}}
stages: {blend: {op: average, adapters: [one, two]}}
publish: {adapter: {op: hub, repo: me/tiny, adapter: blend}}
"""


def test_a_dry_run_tells_ci_by_its_exit_code_whether_anything_would_change(hubforge, tmp_path, tiny_loras):
    shutil.copytree(tiny_loras["one"], tmp_path / "one")
    shutil.copytree(tiny_loras["two"], tmp_path / "two")
    (tmp_path / "r.yaml").write_text(PUSHED)
    before = hubforge("publish", "r.yaml", "--to", "local", "--dry-run", "--exit-code", check=10)
    assert "me/tiny  new, public" in before.stdout and "not made yet: stages.blend" in before.stdout
    hubforge("publish", "r.yaml", "--to", "local")
    assert "0 B to upload" in hubforge("publish", "r.yaml", "--to", "local", "--dry-run", "--exit-code").stdout
    (tmp_path / "r.yaml").write_text(PUSHED + "card: {title: Better}\n")
    hubforge("run", "r.yaml")
    after = hubforge("plan", "r.yaml", "--push", "--to", "local", "--exit-code", check=10)
    assert "    +# Better\n" in after.stdout and "\x1b" not in after.stdout
    data = json.loads(hubforge("plan", "r.yaml", "--push", "--to", "local", "--json").stdout)["push"][0]
    assert data["changes"] and "+# Better" in data["card_diff"] and data["unknown"] == []
    (tmp_path / "r.yaml").write_text(PUSHED.replace("adapter: blend}", "adapter: blend, collection: Ours}"))
    hubforge("run", "r.yaml")
    joined = hubforge("publish", "r.yaml", "--to", "local", "--dry-run", "--exit-code", check=10).stdout
    assert "  collection Ours  would be made, and joined\n" in joined
