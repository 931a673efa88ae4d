"""Loading refuses what would silently be random, and names the file, tensor or column that is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hubforge.errors import SourceError
from hubforge.models import load_model, load_tokenizer


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def patch_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gemma4", "tiny_gemma4_multimodal"])
def test_a_model_keeps_the_dtype_of_its_checkpoint(fixture: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(fixture))
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_every_weight_is_the_checkpoints(tiny_llama: Path) -> None:
    from safetensors.torch import load_file

    loaded = load_model(tiny_llama, dtype=torch.float32).state_dict()
    for shard in tiny_llama.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(loaded[name], tensor.float()), name


def test_a_multimodal_checkpoint_under_a_text_config_is_refused(tiny_gemma4_multimodal: Path, tmp_path: Path) -> None:
    """Transformers loads this one: with random weights and a line in the log."""
    folder = Path(shutil.copytree(tiny_gemma4_multimodal, tmp_path / "text"))
    config = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"lacks .*model\.embed_tokens.* which would be random"):
        load_model(folder)


def test_an_adapter_changes_the_logits_and_is_not_merged(tiny_llama: Path, tiny_loras: dict[str, Path]) -> None:
    ids = torch.arange(8)[None]
    plain, adapted = load_model(tiny_llama), load_model(tiny_llama, adapter=tiny_loras["low"])
    assert not torch.equal(plain(ids).logits, adapted(ids).logits)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: patch_config(f, model_type="lama"), "Did you mean 'llama'?"),
        (lambda f: patch_config(f, model_type="own", auto_map={"AutoModel": "x.Y"}), "never runs code that comes with"),
        (lambda f: patch_config(f, model_type="siglip"), "'siglip' is not a causal language model"),
        (lambda f: patch_config(f, hidden_size=128), r"shape \(320, 64\), but config.json makes it \(320, 128\)"),
        (lambda f: patch_config(f, num_hidden_layers=3), r"lacks model\.layers\.2\..* and 6 more of LlamaForCausalLM"),
        (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "00002-of-00004.safetensors: the shard is miss"),
        (lambda f: (f / "model-00003-of-00004.safetensors").write_bytes(b"\0" * 99), "00003-of-00004.safetensors: the"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index has no weight_map"),
    ],
    ids=["config", "syntax", "typo", "code", "siglip", "shape", "layers", "shard", "bytes", "index"],
)  # fmt: skip
def test_a_broken_model_is_named(copy: Path, break_it, message: str) -> None:
    break_it(copy)
    with pytest.raises(SourceError, match=message):
        load_model(copy)


def test_a_folder_without_weights_says_what_is_there(copy: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"none of model.safetensors, .* is there\n  There: chat_template.jinja, con"):
        load_model(copy)


def test_an_adapter_for_another_architecture_is_refused(tiny_gemma4: Path, tiny_loras: dict[str, Path]) -> None:
    with pytest.raises(SourceError, match="does not go on this model"):
        load_model(tiny_gemma4, adapter=tiny_loras["low"])


def test_adapter_tensors_that_match_nothing_are_refused(
    tiny_llama: Path, tiny_loras: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT drops them without an error: the adapter would do nothing."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_loras["low"], tmp_path / "renamed"))
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.language_model.layers"): w for name, w in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"language_model\.layers.* and 25 more of the adapter match nothing"):
        load_model(tiny_llama, adapter=folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "tokenizer.json is missing"), ("{", "the tokenizer cannot be loaded")],
    ids=["missing", "syntax"],
)
def test_a_broken_tokenizer_is_named(copy: Path, content: str | None, message: str) -> None:
    if content is None:
        (copy / "tokenizer.json").unlink()
    else:
        (copy / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        load_tokenizer(copy)
