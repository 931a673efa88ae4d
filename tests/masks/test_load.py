"""A published mask loads by repository and folder, under any of its decoder's names, one tensor at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hubforge.masks
from hubforge.errors import SourceError
from hubforge.hub import LocalHub
from hubforge.models import load_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder of masks for the tiny Llama, and one that holds other things."""
    folder = tmp_path / "masks" / "tiny"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    save_file({UP: torch.rand(128, 64, generator=generator).bfloat16()}, folder / "fisher.safetensors")
    U, V = (torch.linalg.qr(torch.randn(n, 4, generator=generator))[0].contiguous() for n in (128, 64))
    save_file({f"{UP}.U": U, f"{UP}.S": torch.arange(4, 0, -1.0), f"{UP}.V": V}, folder / "subspace.safetensors")
    layers = {"layers": {"0": {"sum": 2.0, "mean": 0.5, "count": 4}}}
    (folder / "layer_importance.json").write_text(json.dumps(layers))
    (tmp_path / "masks" / "notes").mkdir()
    (tmp_path / "masks" / "notes" / "a.json").write_text("{}")
    return tmp_path / "masks"


@pytest.mark.parametrize("name", [UP, UP.replace("model.", "model.language_model."), UP.removeprefix("model.")])
def test_a_tensor_is_found_under_any_prefix(repository: Path, name: str) -> None:
    with hubforge.masks.load(repository, "tiny") as mask:
        assert list(mask) == [UP] and len(mask) == 1
        assert name in mask and "lm_head.weight" not in mask
        assert mask[name].shape == (128, 64) and mask[name].dtype == torch.bfloat16
        U, S, V = mask.directions(name, rank=3)
        assert (U.shape, S.tolist(), V.shape) == ((128, 3), [4.0, 3.0, 2.0], (64, 3))
        assert mask.matrices == (UP,)
        assert mask.layers == {0: {"sum": 2.0, "mean": 0.5, "count": 4}}
        with pytest.raises(KeyError):
            mask["lm_head.weight"]


def test_a_gate_lies_beside_them(repository: Path) -> None:
    save_file({UP: torch.full((128, 64), 0.25)}, repository / "tiny" / "gate.safetensors")
    with hubforge.masks.load(repository, "tiny") as mask:
        assert mask.gate(UP.replace("model.", "model.language_model."))[0, 0] == 0.25
        assert mask[UP].dtype == torch.bfloat16
        with pytest.raises(KeyError):
            mask.gate("lm_head.weight")


def test_shards_are_read_through_their_index(repository: Path) -> None:
    folder = repository / "tiny"
    (folder / "fisher.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        name, shard = UP.replace("0", str(number)), f"fisher-0000{number}-of-00002.safetensors"
        save_file({name: torch.full((2, 2), float(number))}, folder / shard)
        weight_map[name] = shard
    (folder / "fisher.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with hubforge.masks.load(folder) as mask:
        assert [float(values[0, 0]) for _, values in sorted(mask.items())] == [1.0, 2.0]


def test_a_mask_fits_its_model_and_no_other(
    repository: Path, tiny_llama: Path, tiny_llama_256: Path, tiny_gemma4: Path
) -> None:
    with hubforge.masks.load(repository, "tiny") as mask:
        mask.check(tiny_llama)
        mask.check(load_model(tiny_llama))
        with pytest.raises(
            SourceError, match=r"up_proj.weight is \[256, 256\] in the model and \[128, 64\] in the mask"
        ):
            mask.check(tiny_llama_256)


def test_a_mask_of_more_layers_is_another_models(repository: Path, tiny_llama: Path) -> None:
    save_file({UP.replace("0", "9"): torch.ones(2, 2)}, repository / "tiny" / "fisher.safetensors")
    with (
        hubforge.masks.load(repository, "tiny") as mask,
        pytest.raises(SourceError, match=r"the model has no \S+9\.mlp"),
    ):
        mask.check(tiny_llama)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", r"there is no mask 'tinny'\n  Folders with one: tiny. Did you mean 'tiny'?"),
        (
            "notes",
            r"neither fisher.safetensors, subspace.safetensors nor gate.safetensors is here\n  Folders with one: tiny.",
        ),
        (
            None,
            r"neither fisher.safetensors, subspace.safetensors nor gate.safetensors is here\n  Folders with one: tiny.",
        ),
        ("../masks/tiny", "is not the name of a folder inside"),
        ("t*", "is not the name of a folder inside"),
    ],
)
def test_a_wrong_name_says_which_there_are(repository: Path, name: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        hubforge.masks.load(repository, name)


def test_what_is_no_repository_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is neither a folder nor a repository"):
        hubforge.masks.load("no/such/folder")


def test_only_the_named_folder_is_fetched(
    repository: Path, local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(repository / "tiny", repository / "other")
    api = local_hub.api()
    api.create_repo("me/masks")
    api.upload_folder(repo_id="me/masks", folder_path=repository)
    with hubforge.masks.load("me/masks", "tiny", endpoint=local_hub.endpoint) as mask:

        def there() -> list[str]:
            return sorted(path.name for path in mask.folder.iterdir())

        # A Fisher of 31B is 58 GB: whoever wants directions alone does not fetch it.
        assert mask.layers[0]["count"] == 4 and there() == ["layer_importance.json"]
        assert mask.directions(UP).U.shape == (128, 4)
        assert there() == ["layer_importance.json", "subspace.safetensors"]
        with pytest.raises(KeyError):
            mask.gate(UP)
        assert mask[UP].shape == (128, 64)
        assert there() == ["fisher.safetensors", "layer_importance.json", "subspace.safetensors"]
        assert sorted(path.name for path in mask.folder.parent.iterdir()) == ["tiny"]
    with pytest.raises(SourceError, match=r"Folders with one: other, tiny. Did you mean 'tiny'?"):
        hubforge.masks.load("me/masks", "tini", endpoint=local_hub.endpoint)
    with pytest.raises(SourceError, match="me/none does not exist"):
        hubforge.masks.load("me/none", "tiny", endpoint=local_hub.endpoint)
