"""The tiny models: whole, loadable, the same from the same seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from hubforge.lab.tiny import tiny_llama as make_llama
from hubforge.lab.tiny import tiny_lora as make_lora


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_llama_256", "tiny_gemma4"])
def test_causal_models_load_whole_and_answer(fixture: str, request: pytest.FixtureRequest) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = request.getfixturevalue(fixture)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [1, 4]
    chat = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    logits = model(**chat).logits
    assert logits.shape[-1] == model.config.vocab_size
    assert 0.1 < logits.float().std() < 5  # Alive: neither zero nor blown up.


def test_multimodal_gemma4_loads_whole(tiny_gemma4_multimodal: Path) -> None:
    from transformers import Gemma4ForConditionalGeneration

    _, info = Gemma4ForConditionalGeneration.from_pretrained(tiny_gemma4_multimodal, output_loading_info=True)
    assert not any(info.values()), info


def test_gemma4_has_what_merging_must_carry(tiny_gemma4: Path) -> None:
    from safetensors import safe_open

    index = json.loads((tiny_gemma4 / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert "model.embed_tokens_per_layer.weight" in index
    assert "model.layers.1.self_attn.k_proj.weight" in index
    assert "model.layers.2.self_attn.k_proj.weight" not in index  # It shares the keys of layer 0.
    name = "model.layers.3.layer_scalar"
    with safe_open(tiny_gemma4 / index[name], framework="pt") as shard:
        assert shard.get_tensor(name).item() != 1.0


def test_same_seed_same_bytes_other_seed_other_weights(tmp_path: Path) -> None:
    one, two, three = (make_llama(tmp_path / name, seed) for name, seed in (("one", 3), ("two", 3), ("three", 4)))
    assert digests(one) == digests(two)
    changed = {name for name, digest in digests(three).items() if digest != digests(one)[name]}
    assert changed == {path.name for path in one.glob("*.safetensors")}
    assert len(changed) > 1


def test_lora_of_the_same_seed_is_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    one, two = (make_lora(tmp_path / name, tiny_llama, seed=5, base_name="lab/base") for name in ("one", "two"))
    assert digests(one) == digests(two)
    assert json.loads((one / "adapter_config.json").read_text())["base_model_name_or_path"] == "lab/base"


def test_lora_touches_all_seven_linears_and_changes_the_model(tiny_llama: Path, tiny_loras: dict[str, Path]) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    weights = load_file(tiny_loras["one"] / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2  # two layers, seven linears, A and B
    assert all(tensor.abs().max() > 0 for tensor in weights.values())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, tiny_loras["one"])(ids).logits
    assert (after - before).abs().max() > 0.05
