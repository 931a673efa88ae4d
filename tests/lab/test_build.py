"""The family: whole, loadable, the same from the same seed, all or nothing; and, slowly, as good as it claims."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hubforge.errors import StepError
from hubforge.lab import Budget, Family, build
from hubforge.lab.build import ADAPTERS, digests, settings_of

SMOKE = Budget(documents=60, requests=80, stories=10, styled=12, styled_held_out=4, held_out=12, prompts=8)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build(tmp_path_factory.mktemp("lab") / "family", seed=3, budget=SMOKE)


@pytest.mark.parametrize("name", ["pretrained", "instruct"])
def test_models_load_whole_from_bf16_shards(family: Family, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = family.folder / name
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert all(tensor.shape[-1] % 256 == 0 for tensor in model.parameters())  # as K-quants want rows
    assert model.generation_config.eos_token_id == [1, 4]


def test_adapters_load_on_their_base_and_change_it(family: Family) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20, 40)[None]
    for style, folder in family.adapters.items():
        base = AutoModelForCausalLM.from_pretrained(family.folder / ADAPTERS[style].base, dtype=torch.float32)
        with torch.no_grad():
            before = base(ids).logits
            after = PeftModel.from_pretrained(base, folder)(ids).logits
        assert not torch.equal(before, after)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        assert (config["r"], config["lora_alpha"]) == (training["rank"], training["alpha"])
        assert config["base_model_name_or_path"] == f"hubforge-lab/{ADAPTERS[style].base}"
        assert sorted(config["target_modules"]) == [
            "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
        ]  # fmt: skip


def test_ranks_and_bases_are_what_the_recipes_say() -> None:
    assert {style: (spec.rank, spec.base) for style, spec in ADAPTERS.items()} == {
        "prose": (64, "instruct"),
        "dialogue": (64, "instruct"),
        "terse": (16, "pretrained"),
    }


def test_data_has_its_columns(family: Family) -> None:
    def first(path: Path) -> dict[str, Any]:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        return row

    assert set(first(family.prompts)) == {"prompt", "response", "instructions"}
    assert set(first(family.style_prompts)) == {"prompt"}
    assert set(first(family.stories)) == {"text"}
    for name, rows in (("terse", 36), ("terse_held_out", SMOKE.styled_held_out)):
        styled = family.folder / "data" / "styles" / f"{name}.jsonl"
        assert set(first(styled)) == {"prompt", "response"}
        assert len(styled.read_text(encoding="utf-8").splitlines()) == rows
    assert len((family.tasks / "held_out.jsonl").read_text(encoding="utf-8").splitlines()) == SMOKE.held_out


def test_no_file_names_the_folder_it_was_made_in(family: Family) -> None:
    where = str(family.folder.parent).encode()
    assert not [path for path in family.folder.rglob("*") if path.is_file() and where in path.read_bytes()]


def test_the_same_seed_gives_the_same_bytes_and_a_second_call_trains_nothing(family: Family, tmp_path: Path) -> None:
    other = build(tmp_path / "other", seed=3, budget=SMOKE)
    assert digests(other.folder) == digests(family.folder)
    said: list[str] = []
    build(other.folder, seed=3, budget=SMOKE, report=said.append)
    assert said == [f"lab: {other.folder} is whole and up to date"]
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_settings_tell_seeds_and_budgets_apart() -> None:
    assert settings_of(0, SMOKE) != settings_of(1, SMOKE)
    assert settings_of(0, SMOKE) != settings_of(0, Budget())


class Enough(Exception):
    """Stops a build at its first step."""


def stop_at_training(line: str) -> None:
    if "step" in line:
        raise Enough


def test_a_damaged_family_is_made_again_and_a_stopped_build_leaves_it_as_it_was(family: Family, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "family"
    shutil.copytree(family.folder, folder)
    weights = sorted((folder / "instruct").glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    before = digests(folder)
    with pytest.raises(Enough):
        build(folder, seed=3, budget=SMOKE, report=stop_at_training)
    assert digests(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["family"]


def test_what_a_killed_build_left_is_swept_away_but_not_that_of_a_living_one(tmp_path: Path) -> None:
    dead, alive = (tmp_path / f".family.part-{pid}-abc" for pid in (2**22 + 1, os.getpid()))
    dead.mkdir()
    alive.mkdir()
    with pytest.raises(Enough):
        build(tmp_path / "family", seed=3, budget=SMOKE, report=stop_at_training)
    assert list(tmp_path.iterdir()) == [alive]


def test_a_folder_of_other_things_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(StepError, match="holds something other than a family"):
        build(tmp_path, budget=SMOKE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_module_says_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    from hubforge.lab.__main__ import main

    assert main([]) == 2
    assert "python -m hubforge.lab FOLDER" in capsys.readouterr().err


def evaluate(family: Family, model: Any, tokenizer: Path) -> float:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=str(tokenizer), device="cpu", dtype="float32", batch_size=100),
        tasks=["lab_ifeval"],
        task_manager=TaskManager(include_path=str(family.tasks), include_defaults=False),
        apply_chat_template=True,
    )
    accuracy: float = results["results"]["lab_ifeval"]["prompt_level_strict_acc,none"]
    return accuracy


def load(family: Family, name: str, *, adapter: str | None = None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family.folder / name, dtype=torch.float32)
    return PeftModel.from_pretrained(model, family.adapters[adapter]).merge_and_unload() if adapter else model


def test_lm_eval_runs_the_task_wherever_it_lies(family: Family, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(family.tasks, tmp_path / "moved" / "tasks")
    score = evaluate(Family(tmp_path / "moved"), load(family, "instruct"), family.instruct)
    assert 0 <= score <= 0.5  # Twelve steps of training teach nothing yet.


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_full_family_reaches_its_targets(tmp_path: Path) -> None:
    full = build(tmp_path / "family")
    instruct = evaluate(full, load(full, "instruct"), full.instruct)
    assert instruct >= 0.8
    assert evaluate(full, load(full, "pretrained"), full.pretrained) <= 0.2
    for style in ADAPTERS:
        assert evaluate(full, load(full, "instruct", adapter=style), full.instruct) <= instruct - 0.15, style
