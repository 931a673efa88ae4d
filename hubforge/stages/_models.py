"""What methods that merge several models share: which tensors, which models, and parameters that follow schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.op import Context, ModelRef, Place, TensorOp
from hubforge.tensors.names import layer_of
from hubforge.tensors.reader import open_checkpoint
from hubforge.tensors.schedule import PerModel, Schedule, depth_of, fits, value_at, values_of

FOR_EACH = "one for all models, or a list of one for each"


class Merge(TensorOp):
    """A merge of `models`; config, tokenizer and the tensors' names come from the first."""

    models: list[ModelRef] = Field(min_length=2, description="The models, of one architecture.")
    include: list[str] | None = Field(
        None, description="Patterns of the tensors to merge, such as `mlp.*` or `layers.3`; by default all."
    )
    exclude: list[str] = Field([], description="Patterns of tensors that keep the base's bytes, `include` or not.")
    missing: Literal["error", "base"] = Field(
        "error",
        description="A tensor that only some models have: an error, or base (merged from those that have it; left out "
        "if the base lacks it).",
    )

    @model_validator(mode="after")
    def _one_each(self) -> Merge:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in self.per_model and isinstance(value, list) and len(value) != len(self.models):
                raise ValueError(f"{name} has {len(value)} entries for {len(self.models)} models")
        if len(set(self.models)) != len(self.models):
            raise ValueError("models names one model twice; give it a larger weight instead")
        return self

    @property
    def per_model(self) -> frozenset[str]:
        """The fields in which a list has one entry for each model."""
        return frozenset({"weights", "density", "gamma", "epsilon", "fishers"})

    @property
    def base_ref(self) -> str:
        return str(self.models[0])

    def changes(self, name: str, present: frozenset[str]) -> bool:
        if not self.selects(name):
            return False
        lacking = [model for model in self.models if model not in present]
        if lacking and self.missing == "error":
            mend = "`missing: base` merges the models that have it."
            raise StepError(f"{lacking[0]} has no tensor {name}, which {self.base_ref} has", mend=mend)
        return any(model in present and model != self.base_ref for model in self.models)

    def selects(self, name: str) -> bool:
        """Whether `include` and `exclude` leave a tensor to be merged."""
        included = self.include is None or any(fits(pattern, name) for pattern in self.include)
        return included and not any(fits(pattern, name) for pattern in self.exclude)

    def prepare(self, ctx: Context) -> int:
        """The number of layers, over which gradients spread."""
        with open_checkpoint(ctx.inputs[self.base_ref].path) as base:
            return 1 + max((layer for name in base if (layer := layer_of(name)) is not None), default=0)

    def value(self, schedule: Any, at: Place) -> float:
        """A parameter's value for the tensor at hand."""
        return value_at(schedule, at.name, depth_of(at.layer, at.known or 1))

    def of_model(self, schedule: PerModel | list[Schedule] | None, index: int, at: Place) -> float:
        """A parameter's value for one of the models; 1 where none is given."""
        if schedule is None:
            return 1.0
        return self.value(schedule[index] if isinstance(schedule, list) else schedule, at)


class FromBase(Merge):
    """A merge of what `models` changed in `base_model`; config, tokenizer and the tensors' names are the base's."""

    base_model: ModelRef = Field(description="The model that the others were fine-tuned from.")
    models: list[ModelRef] = Field(min_length=1, description="The fine-tuned models, of the base's architecture.")

    @property
    def base_ref(self) -> str:
        return str(self.base_model)


def require_within(name: str, schedule: Any, low: float, high: float, what: str) -> None:
    """ValueError unless every number of a schedule lies in (low, high]."""
    for value in values_of(schedule):
        if not low < value <= high:
            raise ValueError(f"{name} is {value:g}, but must lie in ({low:g}, {high:g}]: {what}")


def indexed(models: Sequence[ModelRef], present: Any) -> list[tuple[int, ModelRef]]:
    """The models that have the tensor at hand, with their places in the list."""
    return [(index, model) for index, model in enumerate(models) if model in present]
