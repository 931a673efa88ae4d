"""A multimodal model reduced to its text decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hubforge.errors import StepError
from hubforge.op import ModelRef, Place, TensorOp

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {"gemma3_text": "Gemma3ForCausalLM", "gemma4_text": "Gemma4ForCausalLM"}
# Where the decoder lies in a checkpoint: since Transformers 4.52, and before.
_DECODER = re.compile(r"(?:model\.language_model\.|language_model\.model\.)(?P<rest>.+)")
_HEAD = re.compile(r"(?:language_model\.)?(?P<rest>lm_head\..+)")
# Facts of the whole model that its text_config may leave unsaid.
_FROM_ROOT = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
_OF_TOWERS = re.compile(r"(?:(?:video_|image_)?preprocessor_config|processor_config)\.json")


class DropTowers(TensorOp):
    """The text decoder of a multimodal Gemma 3 or 4, as a causal language model with the same logits for text.

    The vision and audio towers and their projections go; `model.language_model.` becomes `model.`; every other tensor,
    buffers and per-layer embeddings included, keeps its bytes. `text_config` becomes the whole config, edited as JSON.
    """

    computes: ClassVar[bool] = False
    formula: ClassVar[str] = "model.language_model.* → model.*"

    model: ModelRef = Field(description="A multimodal Gemma 3 or 4.")

    def changes(self, name: str, present: frozenset[str]) -> bool:
        return False

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        return w[self.model]

    def rename(self, name: str) -> str | None:
        if found := _DECODER.fullmatch(name):
            return f"model.{found['rest']}"
        found = _HEAD.fullmatch(name)
        return found["rest"] if found else None

    def keeps(self, file: str) -> bool:
        return not _OF_TOWERS.fullmatch(file)

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        text = config.get("text_config")
        kind = text.get("model_type") if isinstance(text, dict) else None
        if not isinstance(text, dict) or kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            what = f"{self.model} has no towers to drop: its text_config has model_type {kind!r}"
            raise StepError(what, mend=f"drop_towers knows models whose text_config is one of {known}.")
        for name in ("dtype", "torch_dtype", *_FROM_ROOT):
            if name in config and text.get(name) is None:
                text[name] = config[name]
        if "transformers_version" in config:
            text["transformers_version"] = config["transformers_version"]
        return {"architectures": [ARCHITECTURES[kind]]} | text
