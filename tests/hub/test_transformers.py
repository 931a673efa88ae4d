"""Transformers loads from the Hub what was pushed to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubforge.hub import LocalHub

LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/model", revision="v1")
print(model.config.model_type, float(model.model.embed_tokens.weight.double().sum()))
"""


@pytest.mark.slow  # Importing transformers takes some 5 s.
def test_auto_model_loads_a_pushed_model(local_hub: LocalHub, api: HfApi, repo: str, tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "tie_word_embeddings": True}
    layer = {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
    layer |= {"mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32)}
    layer |= {f"self_attn.{letter}_proj": (16, 16) for letter in "qkvo"}
    shapes = {"embed_tokens": (32, 16), "norm": (16,), **{f"layers.0.{name}": side for name, side in layer.items()}}
    generator = torch.Generator().manual_seed(0)
    weights = {f"model.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    api.upload_folder(repo_id=repo, folder_path=folder)
    api.create_tag(repo, tag="v1")
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "HF_ENDPOINT": local_hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    kind, total = done.stdout.split()
    assert kind == "llama"
    assert float(total) == float(weights["model.embed_tokens.weight"].double().sum())
