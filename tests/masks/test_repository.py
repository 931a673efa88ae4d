"""A mask repository: three models' masks pushed in turn, each leaving the others' folders alone, and then loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hubforge.masks
from hubforge.errors import SourceError
from hubforge.hub import LocalHub
from hubforge.publisher import Hub
from hubforge.session import Session

UP = "model.layers.0.mlp.up_proj.weight"
RECIPE = """\
name: {name}
license: mit
sources:
  instruct:   {{model: ./{name}}}
  pretrained: {{model: ./pretrained}}
masks:
  core: {{op: subspace, instruct: instruct, pretrained: pretrained, rank: 4, targets: up_proj}}
publish:
  masks: {{op: hub, repo: me/masks, folder: {name}, masks: [core]}}
"""


@pytest.fixture
def publish(tiny_llama: Path, tmp_path: Path, local_hub: LocalHub) -> Callable[[str], list[dict[str, object]]]:
    """Publishes the mask of a model named so: the tiny Llama with its up projections changed in that one's own way."""
    shutil.copytree(tiny_llama, tmp_path / "pretrained")

    def push(name: str) -> list[dict[str, object]]:
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_llama, folder)
        weights = {n: t for shard in folder.glob("*.safetensors") for n, t in load_file(shard).items()}
        for shard in folder.glob("*.safetensors*"):
            shard.unlink()
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        for tensor in (tensor for n, tensor in weights.items() if "up_proj" in n):
            tensor += torch.randn(tensor.shape, generator=generator).bfloat16()
        save_file(weights, folder / "model.safetensors")
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(name=name))
        with Session.open(
            path, store=tmp_path / "store", offline=True, device="cpu", memory="1GB", llama_cpp=None, quiet=True,
            debug=False,
        ) as session:  # fmt: skip
            return session.publish(session.run(None), Hub(local_hub.endpoint, "local"), None)

    return push


def test_three_models_share_a_repository(
    publish: Callable[[str], list[dict[str, object]]],
    local_hub: LocalHub,
    tiny_llama: Path,
    tiny_llama_256: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    api, before = local_hub.api(), {}
    for number, name in enumerate(("mid", "ant", "zoo"), 1):
        publish(name)
        there = {file.rfilename: file.blob_id for file in api.model_info("me/masks", files_metadata=True).siblings}
        changed = {path for path, blob in there.items() if before.get(path) != blob}
        # Its own folder, and what tells of all: the card (and, with the first push, what is large).
        assert {path for path in changed if not path.startswith(f"{name}/")} <= {"README.md", ".gitattributes"}
        assert before.keys() <= there.keys()
        page = Path(api.hf_hub_download("me/masks", "README.md")).read_text()
        rows = [line for line in page.splitlines() if line.startswith("| [") and "](./" in line]
        assert len(rows) == number
        before = there
    assert [row.split("[")[1].split("/")[0] for row in rows] == ["ant", "mid", "zoo"]
    # The page tells of the provenance of whoever pushed last, and the release file of the page; then nothing changes.
    publish("ant")
    there = {file.rfilename: file.blob_id for file in api.model_info("me/masks", files_metadata=True).siblings}
    assert {path for path in there if before.get(path) != there[path]} == {
        "README.md",
        "ant/hubforge.release.json",
        "ant/SHA256SUMS",
    }
    assert publish("ant")[0]["pushed"] == []

    spans = []
    for name in ("mid", "ant"):
        with hubforge.masks.load("me/masks", name, endpoint=local_hub.endpoint) as mask:
            mask.check(tiny_llama)
            U, _, V = mask.directions(UP.replace("model.", "model.language_model."))
            assert (U.shape, V.shape) == ((128, 4), (64, 4))
            spans.append(U)
            with pytest.raises(SourceError, match=r"up_proj.weight is \[\d+, \d+\] in the model and"):
                mask.check(tiny_llama_256)
    assert float(torch.linalg.matrix_norm(spans[0].T @ spans[1], 2)) < 0.99
