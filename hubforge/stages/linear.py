"""The weighted mean of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.op import ModelRef, Place, TensorOp

if TYPE_CHECKING:
    from torch import Tensor


class Linear(TensorOp):
    """The weighted mean of models of one architecture: a model soup."""

    formula: ClassVar[str] = "Σ wᵢ · Wᵢ / Σ wᵢ"
    source: ClassVar[str] = "Wortsman et al. 2022, arXiv:2203.05482"

    models: list[ModelRef] = Field(
        min_length=2, description="The models; config and tokenizer come from the first, as do the tensors' names."
    )
    weights: list[float] | None = Field(None, description="One factor per model, any sign; by default all equal.")
    normalize: bool = Field(True, description="Whether to divide by the sum of the weights, which must then not be 0.")
    missing: Literal["error", "base"] = Field(
        "error",
        description="A tensor that some models lack: an error, or base (the mean of those that have it; left out if "
        "the first lacks it).",
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> Linear:
        weights = self.weights or [1.0] * len(self.models)
        if len(weights) != len(self.models):
            raise ValueError(f"weights has {len(weights)} entries for {len(self.models)} models")
        if len(set(self.models)) != len(self.models):
            raise ValueError("models names one model twice; give it the sum of the weights instead")
        if not all(math.isfinite(weight) for weight in weights) or (self.normalize and math.fsum(weights) == 0):
            raise ValueError("weights must be finite numbers whose sum is not 0")
        return self

    @property
    def base_ref(self) -> str:
        return str(self.models[0])

    def changes(self, name: str, present: frozenset[str]) -> bool:
        lacking = [model for model in self.models if model not in present]
        if lacking and self.missing == "error":
            mend = "`missing: base` takes the mean of the models that have it."
            raise StepError(f"{lacking[0]} has no tensor {name}, which {self.base_ref} has", mend=mend)
        return len(present) > 1 or not self.normalize

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        weights = self.weights or [1.0] * len(self.models)
        held = [(w[model], weight) for model, weight in zip(self.models, weights, strict=True) if model in w]
        total = math.fsum(weight for _, weight in held)
        if self.normalize and total == 0:
            raise StepError(f"the weights of the models that have {at.name} sum to 0")
        (first, weight), *rest = held
        divisor = total if self.normalize else 1.0
        merged = first * (weight / divisor)
        for tensor, weight in rest:
            merged = merged.add(tensor, alpha=weight / divisor)
        return merged
