"""The op beyond Llama: biases, norms of queries, sliding windows, keys that are values, experts."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hubforge.lab.tiny import draw_weights
from tests.adapters.conftest import TWO, lora, make_mask
from tests.masks.test_fisher_engines import ARCHITECTURES

MODULES = {"qwen2": 28, "qwen3": 28, "mistral": 28, "gemma3": 28, "gemma4-k-is-v": 26, "gemma4-moe": 28}


@pytest.fixture(params=MODULES)
def model(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    """A model of that architecture, four layers, with the tokenizer of the tiny Llama."""
    family, fields = ARCHITECTURES[request.param]
    kind = f"{family}Text" if family.startswith("Gemma") else family
    config = getattr(transformers, f"{kind}Config")(**{**fields, "vocab_size": 320})
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    draw_weights(made, 0)
    folder = tmp_path / request.param
    made.save_pretrained(folder)
    for file in tiny_llama.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(tiny_llama / "chat_template.jinja", folder)
    return folder


def test_two_sided_leaks_rounding_only(model, prepare, tmp_path):
    ctx = prepare(model=model, mask=make_mask(tmp_path / "mask", model))
    op = lora(protect="core", per_device_train_batch_size=2)
    op.preflight(ctx)
    metrics = op.run(ctx)
    assert metrics["modules"] == metrics["leak"]["matrices"] == MODULES[model.name]
    assert metrics["leak"]["worst"] < 2e-7


def test_packed_samples_do_not_see_one_another(model, prepare, chats):
    """Whatever the attention: windows that slide, and layers that see everything."""
    fields = {"optim": "sgd", "learning_rate": 1.0, "target_modules": TWO, "max_steps": 1, "warmup_ratio": 0.0}
    packed, alone = prepare("packed", chats[:8], model=model), prepare("alone", chats[:8], model=model)
    lora(**fields, packing=True, max_length=256, per_device_train_batch_size=8).run(packed)
    lora(**fields, per_device_train_batch_size=8).run(alone)
    one, other = (load_file(ctx.out / "adapter_model.safetensors") for ctx in (packed, alone))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 1e-3
