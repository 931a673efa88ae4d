"""The committed recipes for real models: once locked, `check` and `plan` need no network.

Their repositories stand on the embedded Hub with the right kinds of files and next to no weights.
"""

import shutil
from pathlib import Path
from typing import get_args

import pytest

from hubforge import recipe
from hubforge.op import Settings
from hubforge.publisher import Hub
from hubforge.reporters import Quiet
from hubforge.session import Session
from hubforge.store import LocalStore
from hubforge.tensors.projection import Projection

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.parametrize(
    ("name", "steps"), [("gemma-4-e4b-ties", 3), ("gemma-4-e4b-two-stage", 7), ("gemma-4-masks", 2)]
)
def test_locked_recipes_plan_without_network(name, steps, local_hub, source_folder, tmp_path):
    shutil.copy(RECIPES / f"{name}.yaml", tmp_path)
    loaded = recipe.load(tmp_path / f"{name}.yaml")
    api = local_hub.api()
    folder = source_folder(tmp_path / "upload")
    (folder / "adapter_config.json").write_text("{}")
    for spec in loaded.sources.values():
        api.create_repo(spec.value, repo_type=spec.repo_type)
        if spec.kind == "dataset":
            row = b'{"prompt": "a"}\n'
            api.upload_file(repo_id=spec.value, repo_type="dataset", path_in_repo="train.jsonl", path_or_fileobj=row)
        else:
            api.upload_folder(repo_id=spec.value, folder_path=folder)
    session = Session(
        loaded, LocalStore(tmp_path / "store"), Settings(offline=True), Quiet(), Hub(local_hub.endpoint, "local")
    )
    session.lock()
    local_hub.close()
    assert len(session.plan(None).to_make()) == steps
    session.check(online=False)


@pytest.mark.parametrize("style", ["prose", "dialogue", "terse"])
def test_the_protection_recipe_compares_like_with_like(style):
    """Each projection at two ranks, and nothing but the protection differs between the adapters of a style."""
    loaded = recipe.load(RECIPES / "lab" / "protection.yaml")
    ops = {name: node.op for name, node in loaded.nodes.items()}
    adapters = {name: op for name, op in ops.items() if name.startswith(f"adapters.{style}-")}
    masked = {(how, f"core-{k}") for how in get_args(Projection) for k in (16, 64)}
    controls = {("two_sided", f"random-{k}") for k in (16, 64)} | {("none", "core-64")}
    assert {(op.projection, op.protect) for op in adapters.values()} == masked | controls
    assert len(adapters) == len(masked | controls)
    own = {"projection", "protect", "strength"}
    assert len({op.model_dump_json(exclude=own) for op in adapters.values()}) == 1
    folded = {name: op for name, op in ops.items() if name.startswith(f"stages.{style}-with-")}
    assert len({op.model_dump_json(exclude={"adapters", "protect"}) for op in folded.values()}) == 1
    assert {f"adapters.{op.adapters[0]}" for op in folded.values() if op.protect is None} == set(adapters)
    asked = {name for name in ops if name.startswith(f"evals.follows/{style}-")}
    assert len(asked) == len(folded) == len(adapters) + 2
