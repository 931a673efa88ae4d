"""Untrained models for tests: random weights from a seed, built in well under a second, saved as the real ones are."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tokenizer import EOT, save_tokenizer, special_ids, train_bpe

if TYPE_CHECKING:
    from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LINES = (
    "The lantern keeper walked to the harbour, and the sea was calm.",
    '"Did you see the light?" asked Mara. "I did," said the old man.',
    "WRITE IN CAPITALS! 1, 22, 333; café, naïve, and it's done.",
)


def draw_weights(model: nn.Module, seed: int, std: float = 0.05) -> None:
    """Fill every parameter and saved buffer from `seed`: norms around 1, all else around 0.

    Each tensor has a generator of its own, so a tensor's values do not depend on which others the model has.
    """
    import torch

    with torch.no_grad():
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if not tensor.is_floating_point() or "input_m" in name or "output_m" in name:
                continue  # Clamp bounds of Gemma 4's towers stay infinite, as they are initialised.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            values = torch.randn(tensor.shape, generator=generator) * std
            centre = 1.0 if tensor.dim() <= 1 and not name.endswith("bias") else 0.0
            tensor.copy_(values + centre)


def tiny_llama(
    folder: Path,
    seed: int = 0,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    tie_word_embeddings: bool = False,
    max_shard_size: str = "60KB",
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """A random Llama in bf16, in several shards with their index, with tokenizer and chat template; its folder.

    K-quants need widths that are multiples of 256: pass hidden_size=256, intermediate_size=256, num_key_value_heads=4.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = train_bpe(_LINES, vocab_size=320)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=tie_word_embeddings,
        **special_ids(),
        **dict(overrides or {}),
    )
    model = LlamaForCausalLM(config)
    draw_weights(model, seed)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(**special_ids())
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder, eos_token=EOT, max_length=256)
    return folder


def tiny_lora(
    folder: Path,
    base: Path,
    rank: int = 4,
    seed: int = 0,
    *,
    alpha: int | None = None,
    base_name: str | None = None,
    use_rslora: bool = False,
    target_modules: tuple[str, ...] | str = LINEARS,
    std: float = 0.05,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    use_dora: bool = False,
    modules_to_save: tuple[str, ...] = (),
) -> Path:
    """A random LoRA on `base`, both factors non-zero, saved by PEFT in its ordinary layout; its folder.

    alpha: 2 * rank unless given. base_name: what adapter_config.json calls the base; its path unless given.
    target_modules: names, or one regular expression as PEFT takes it.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        use_dora=use_dora,
        modules_to_save=list(modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for name, part in adapted.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            draw_weights(part, zlib.crc32(f"{seed}:{name}".encode()), std)
    for name, value in adapted.named_parameters():
        if "lora_magnitude_vector" in name or "modules_to_save" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            value.data *= 1 + std * torch.randn(value.shape, generator=generator)
    adapted.save_pretrained(folder)
    settle_adapter(folder, base_name or str(base))
    return folder


def settle_adapter(folder: Path, base_name: str) -> None:
    """Make an adapter's folder the same bytes each time: PEFT writes target_modules, a set, in any order."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
