"""A multimodal model reduced to its text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hubforge.op import ModelRef, Place, TensorOp

if TYPE_CHECKING:
    from torch import Tensor


class DropTowers(TensorOp):
    """The text decoder of a multimodal Gemma 3 or 4, as a causal language model with the same logits for text.

    The vision and audio towers and their projections go; `model.language_model.` becomes `model.`; every other tensor,
    buffers and per-layer embeddings included, keeps its bytes. `text_config` becomes the whole config, edited as JSON.
    """

    computes: ClassVar[bool] = False
    on_gpu: ClassVar[bool] = True
    formula: ClassVar[str] = "model.language_model.* → model.*"

    model: ModelRef = Field(description="A multimodal Gemma 3 or 4.")
    drop_towers: Literal[True] = Field(True, description="What this op is for.")

    def changes(self, name: str, present: frozenset[str]) -> bool:
        return False

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        return w[self.model]
