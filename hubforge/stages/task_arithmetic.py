"""A base model plus the weighted differences that fine-tuning made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.op import ModelRef, Place, TensorOp

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(TensorOp):
    """The base model plus the weighted sum of task vectors: what each fine-tuned model added to it.

    Negative weights take a task away. Where no model differs from the base, no bit changes.
    """

    formula: ClassVar[str] = "W + s · Σ wᵢ · (Wᵢ − W)"
    source: ClassVar[str] = "Ilharco et al. 2023, arXiv:2212.04089"

    model: ModelRef = Field(description="The base that all models were fine-tuned from.")
    models: list[ModelRef] = Field(min_length=1, description="The fine-tuned models.")
    weights: list[float] | None = Field(
        None, description="One factor per fine-tuned model, any sign; by default 1 each. Not normalised."
    )
    scale: float = Field(1.0, description="s, a factor of the whole change; 0 gives the base's own bytes.")
    missing: Literal["error", "base"] = Field(
        "error",
        description="A tensor that only some models have: an error, or base (a model that lacks it adds nothing; left "
        "out if the base lacks it).",
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> TaskArithmetic:
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.models)} models")
        if not all(math.isfinite(factor) for factor in [*(self.weights or []), self.scale]):
            raise ValueError("scale and weights must be finite numbers")
        return self

    def changes(self, name: str, present: frozenset[str]) -> bool:
        lacking = [model for model in self.models if model not in present]
        if lacking and self.missing == "error":
            mend = "`missing: base` lets a model that lacks a tensor add nothing to it."
            raise StepError(f"{lacking[0]} has no tensor {name}, which {self.model} has", mend=mend)
        return self.scale != 0 and len(present) > 1

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        base = w[self.model]
        merged = base
        for model, weight in zip(self.models, self.weights or [1.0] * len(self.models), strict=True):
            if model in w:
                merged = merged.add(w[model] - base, alpha=self.scale * weight)
        return merged
