"""Gemma 4 at toy size, random weights: what merging must carry through is all there, only small. And its real shapes.

Per-layer embeddings, layers that share keys and values with an earlier one, `layer_scalar` buffers (in the checkpoint,
yet no parameters), sliding and full attention of different head widths; and, in the multimodal one, both towers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tiny import draw_weights
from .tokenizer import EOT, save_tokenizer, special_ids, train_bpe

_LINES = ("The ferry left the island at dawn.", '"Wait for me!" cried the cook, and ran down the pier.')

_SIZES: dict[str, dict[str, Any]] = {
    "E4B": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
    },
    "31B": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 1024,
    },
    "26B-A4B": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 1024,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * (sizes["num_hidden_layers"] // 6),
        "final_logit_softcapping": 30.0,
        **sizes,
    }
    for name, sizes in _SIZES.items()
}
"""Fields of a Gemma4TextConfig of each published size: what is counted or timed needs the shapes, and no weights."""


def text_settings(vocab_size: int) -> dict[str, Any]:
    """Fields of a Gemma4TextConfig: 4 layers, the last two sharing the keys and values of the first two."""
    return {
        "vocab_size": vocab_size,
        "vocab_size_per_layer_input": vocab_size,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "final_logit_softcapping": 30.0,
        **special_ids(),
    }


def tiny_gemma4(folder: Path, seed: int = 0, *, max_shard_size: str = "100KB") -> Path:
    """A Gemma4ForCausalLM in bf16, in shards, with tokenizer; its folder."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig, GenerationConfig

    tokenizer = train_bpe(_LINES, vocab_size=300)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**text_settings(tokenizer.get_vocab_size())))
    draw_weights(model, seed)
    model.generation_config = GenerationConfig(**special_ids())
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder, eos_token=EOT, max_length=256)
    return folder


def tiny_gemma4_multimodal(folder: Path, seed: int = 0, *, max_shard_size: str = "200KB") -> Path:
    """A Gemma4ForConditionalGeneration with vision and audio towers, in bf16, in shards, with tokenizer; its folder."""
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, GenerationConfig

    tokenizer = train_bpe(_LINES, vocab_size=300)
    vocab_size = tokenizer.get_vocab_size()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "position_embedding_size": 64,
        "patch_size": 4,
        "use_clipped_linears": True,
    }
    audio = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "subsampling_conv_channels": [8, 4],
        "output_proj_dims": 32,
    }
    # The towers' own token ids only have to lie in the toy vocabulary.
    tokens = ("boi", "eoi", "image", "video", "boa", "audio")
    config = Gemma4Config(
        text_config=text_settings(vocab_size),
        vision_config=vision,
        audio_config=audio,
        eoa_token_index=vocab_size - 7,
        **{f"{name}_token_id": vocab_size - 1 - i for i, name in enumerate(tokens)},
    )
    model = Gemma4ForConditionalGeneration(config)
    draw_weights(model, seed)
    model.generation_config = GenerationConfig(**special_ids())
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder, eos_token=EOT, max_length=256)
    return folder
