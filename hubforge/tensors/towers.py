"""A multimodal model's text decoder by itself: its tensors' names, its side files, its config, edited as JSON.

What an op with `drop_towers` does to names, files and config after its own edits; `op: drop_towers` does nothing else.
"""

from __future__ import annotations

import re
from typing import Any

from hubforge.errors import StepError
from hubforge.op import TensorOp

ARCHITECTURES = {"gemma3_text": "Gemma3ForCausalLM", "gemma4_text": "Gemma4ForCausalLM"}
# Where the decoder lies in a checkpoint: since Transformers 4.52, and before.
_DECODER = re.compile(r"(?:model\.language_model\.|language_model\.model\.)(?P<rest>.+)")
_HEAD = re.compile(r"(?:language_model\.)?(?P<rest>lm_head\..+)")
# Facts of the whole model that its text_config may leave unsaid.
_FROM_ROOT = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
_OF_TOWERS = re.compile(r"(?:(?:video_|image_)?preprocessor_config|processor_config)\.json")


def renamed(op: TensorOp, name: str) -> str | None:
    """The name of a tensor of the base in the op's output; None when it is left out."""
    new = op.rename(name)
    return decoder_name(new) if op.drop_towers and new is not None else new


def keeps(op: TensorOp, file: str) -> bool:
    """Whether a config, tokenizer or processor file of the base belongs to the op's output."""
    return op.keeps(file) and not (op.drop_towers and _OF_TOWERS.fullmatch(file))


def edited(op: TensorOp, config: dict[str, Any]) -> dict[str, Any]:
    """The config of the op's output. StepError when there are no towers to drop."""
    config = op.config(config)
    return text_config(config, op.base_ref) if op.drop_towers else config


def decoder_name(name: str) -> str | None:
    """`model.layers.0...` for a tensor of the text decoder or its head; None for all others."""
    if found := _DECODER.fullmatch(name):
        return f"model.{found['rest']}"
    found = _HEAD.fullmatch(name)
    return found["rest"] if found else None


def text_config(config: dict[str, Any], ref: str) -> dict[str, Any]:
    """`text_config` as the whole config, with the root's facts that it leaves unsaid."""
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(text, dict) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        what = f"{ref} has no towers to drop: its text_config has model_type {kind!r}"
        raise StepError(what, mend=f"drop_towers knows models whose text_config is one of {known}.")
    for name in ("dtype", "torch_dtype", *_FROM_ROOT):
        if name in config and text.get(name) is None:
            text[name] = config[name]
    if "transformers_version" in config:
        text["transformers_version"] = config["transformers_version"]
    return {"architectures": [ARCHITECTURES[kind]]} | text
