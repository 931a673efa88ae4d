"""Session fixtures: tiny models with random weights. They are shared, so a test copies what it wants to change."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama, hidden size 64, bf16, four shards, untied head, with tokenizer and chat template."""
    from hubforge.lab.tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", seed=0)


@pytest.fixture(scope="session")
def tiny_llama_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer as `tiny_llama`, other weights."""
    from hubforge.lab.tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama-other", seed=1)


@pytest.fixture(scope="session")
def tiny_llama_256(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose widths are multiples of 256, as K-quants want them."""
    from hubforge.lab.tiny import tiny_llama

    return tiny_llama(
        tmp_path_factory.mktemp("models") / "tiny-llama-256",
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_key_value_heads=4,
        max_shard_size="600KB",
    )


@pytest.fixture(scope="session")
def tiny_loras(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters on `tiny_llama`: "one" and "two" of rank 8, "low" of rank 4, "rs" of rank 4 with rsLoRA scaling."""
    from hubforge.lab.tiny import tiny_lora

    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": tiny_lora(folder / "one", tiny_llama, rank=8, seed=1),
        "two": tiny_lora(folder / "two", tiny_llama, rank=8, seed=2),
        "low": tiny_lora(folder / "low", tiny_llama, rank=4, seed=3),
        "rs": tiny_lora(folder / "rs", tiny_llama, rank=4, seed=4, use_rslora=True),
    }


@pytest.fixture(scope="session")
def tiny_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 text model: per-layer embeddings, two KV-shared layers, `layer_scalar` buffers, tied head, shards."""
    from hubforge.lab.gemma4 import tiny_gemma4

    return tiny_gemma4(tmp_path_factory.mktemp("models") / "tiny-gemma4")


@pytest.fixture(scope="session")
def tiny_gemma4_multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma4ForConditionalGeneration with vision and audio towers around the same text architecture."""
    from hubforge.lab.gemma4 import tiny_gemma4_multimodal

    return tiny_gemma4_multimodal(tmp_path_factory.mktemp("models") / "tiny-gemma4-multimodal")
