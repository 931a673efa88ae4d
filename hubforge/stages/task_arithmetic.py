"""A base model plus the weighted differences that fine-tuning made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from hubforge.op import ModelRef, Place
from hubforge.stages._models import Models, from_base, indexed
from hubforge.tensors.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(Models):
    """The base model plus the weighted sum of task vectors: what each fine-tuned model added to it.

    Negative weights take a task away. Where no model differs from the base, no bit changes.
    """

    light: ClassVar[bool] = True
    on_gpu: ClassVar[bool] = True
    formula: ClassVar[str] = "W + s · Σ wᵢ · (Wᵢ − W)"
    source: ClassVar[str] = "Ilharco et al. 2023, arXiv:2212.04089"

    model: ModelRef = Field(description="The base that all models were fine-tuned from.")
    models: list[ModelRef] = Field(min_length=1, description="The fine-tuned models.")
    weights: list[Schedule] | None = Field(
        None, description="One factor per fine-tuned model, any sign; by default 1 each. Not normalised."
    )
    scale: float = Field(
        1.0, allow_inf_nan=False, description="s, a factor of the whole change; 0 gives the base's own bytes."
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> TaskArithmetic:
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.models)} models")
        return self

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        return from_base(self.model, self.models)

    def changes(self, name: str, present: frozenset[str]) -> bool:
        return super().changes(name, present) and self.scale != 0

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        import torch

        base = merged = w[self.model]
        for index, model in indexed(self.models, w):
            delta, weight = w[model] - base, self.scale * self.of_model(self.weights, index, at)
            merged = (
                torch.add(base, delta, alpha=weight, out=delta) if merged is base else merged.add_(delta, alpha=weight)
            )
        return merged
