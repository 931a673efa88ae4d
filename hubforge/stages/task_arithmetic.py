"""A base model plus the weighted differences that fine-tuning made."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from hubforge.combination import Combination
from hubforge.op import ModelRef, Place
from hubforge.stages._models import Models, from_base, indexed
from hubforge.tensors.schedule import Schedule, values_of


class TaskArithmetic(Models):
    """The base model plus the weighted sum of task vectors: what each fine-tuned model added to it.

    Negative weights take a task away. Where no model differs from the base, no bit changes.
    """

    combines: ClassVar[bool] = True
    on_gpu: ClassVar[bool] = True
    formula: ClassVar[str] = "W + s · Σ wᵢ · (Wᵢ − W)"
    source: ClassVar[str] = "Ilharco et al. 2023, arXiv:2212.04089"

    model: ModelRef = Field(description="The base that all models were fine-tuned from.")
    models: list[ModelRef] = Field(min_length=1, description="The fine-tuned models.")
    weights: list[Schedule] | None = Field(
        None, description="One factor per fine-tuned model, any sign; by default 1 each. Not normalised."
    )
    scale: Schedule = Field(1.0, description="s, a factor of the whole change; 0 gives the base's own bytes.")

    @model_validator(mode="after")
    def _one_weight_each(self) -> TaskArithmetic:
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.models)} models")
        return self

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        return from_base(self.model, self.models)

    def changes(self, name: str, present: frozenset[str]) -> bool:
        return super().changes(name, present) and any(values_of(self.scale))

    def combination(self, present: frozenset[str], at: Place) -> Combination:
        scale = self.value(self.scale, at)
        weights = {
            str(model): scale * self.of_model(self.weights, index, at) for index, model in indexed(self.models, present)
        }
        return Combination(weights, origin=str(self.model))
