"""The committed recipes for real models: once locked, `check` and `plan` need no network.

Their repositories stand on the embedded Hub with the right kinds of files and next to no weights.
"""

import shutil
from pathlib import Path

import pytest

from hubforge import recipe
from hubforge.op import Hub, Settings
from hubforge.reporters import Quiet
from hubforge.session import Session
from hubforge.store import LocalStore

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.parametrize(
    ("name", "steps"), [("gemma-4-e4b-ties", 3), ("gemma-4-e4b-two-stage", 10), ("gemma-4-masks", 2)]
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
