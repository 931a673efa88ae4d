"""What methods that merge several models share: which tensors, which models, and parameters that follow schedules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hubforge.errors import StepError
from hubforge.op import Context, ModelRef, Place, TensorOp
from hubforge.tensors.inputs import check_inputs, tensor_shapes
from hubforge.tensors.names import layer_of
from hubforge.tensors.schedule import DEFAULT, PerModel, Schedule, depth_of, fits, value_at, values_of
from hubforge.tensors.vocabulary import RowOf, Wanted

FOR_EACH = "one for all models, or a list of one for each"


class TokenRow(BaseModel):
    """Where the embedding of one token comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: ModelRef | None = Field(None, description="The model that lends its row; without one the row is zero.")
    token: str | None = Field(None, description="Which of that model's tokens; by default the one of the same text.")
    token_id: int | None = Field(None, ge=0, description="Or which row of that model's table, counted from 0.")
    force: bool = Field(False, description="Whether models that have the token give their own row up for it too.")


class Models(TensorOp):
    """What every merge of models says of its tensors and tokens."""

    include: list[str] | None = Field(
        None, description="Patterns of the tensors to merge, such as `mlp.*` or `layers.3`; by default all."
    )
    exclude: list[str] = Field([], description="Patterns of tensors that keep the base's bytes, `include` or not.")
    missing: Literal["error", "base", "skip"] = Field(
        "error",
        description="A tensor that only some models have: an error; base (merged from those that have it, left out if "
        "the base lacks it); or skip (left out of the output).",
    )
    tokenizer: Annotated[Literal["base", "union"] | ModelRef | None, Field(union_mode="left_to_right")] = Field(
        None,
        description="Whose tokens the output has: base, union (the base's, then what only others have), or a model's. "
        "Embeddings and heads are then matched by the tokens' text; by default row by row, as they are.",
    )
    new_tokens: Literal["average", "zero"] = Field(
        "average",
        description="The row of a token in a model that lacks it, if the base lacks it too: the average of those that "
        "have it, or zero. A token that the base has takes the base's row.",
    )
    tokens: dict[str, TokenRow] = Field({}, description="Rows of single tokens, by their text; added if they are new.")
    pad_to_multiple_of: int = Field(
        1, ge=1, description="The rows of embeddings and heads are a multiple of it, if `tokenizer` is given."
    )

    @model_validator(mode="after")
    def _tokens_need_a_tokenizer(self) -> Models:
        if self.tokenizer is None and (self.tokens or self.pad_to_multiple_of > 1):
            raise ValueError("tokens and pad_to_multiple_of need a tokenizer: base, union, or a model's name")
        for text, row in self.tokens.items():
            if row.token is not None and row.token_id is not None:
                raise ValueError(f"tokens: {text!r} has both a token and a token_id")
        return self

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        """All models that are merged, the base first."""
        raise NotImplementedError(type(self).__name__)

    @property
    def base_ref(self) -> str:
        return str(self.merged[0])

    def changes(self, name: str, present: frozenset[str]) -> bool:
        if not self.selects(name):
            return False
        lacking = [model for model in self.merged if model not in present]
        if lacking and self.missing == "error":
            mend = "`missing: base` merges the models that have it; `missing: skip` leaves the tensor out."
            raise StepError(f"{lacking[0]} has no tensor {name}, which {self.base_ref} has", mend=mend)
        return any(model in present and model != self.base_ref for model in self.merged)

    def skips(self, name: str, present: frozenset[str]) -> bool:
        return self.missing == "skip" and any(model not in present for model in self.merged)

    def vocabulary(self) -> Wanted | None:
        if self.tokenizer is None:
            return None
        rows = {
            text: RowOf(str(row.model or ""), row.token, row.token_id, row.force) for text, row in self.tokens.items()
        }
        return Wanted(str(self.tokenizer), self.new_tokens, rows, self.pad_to_multiple_of)

    def selects(self, name: str) -> bool:
        """Whether `include` and `exclude` leave a tensor to be merged."""
        included = self.include is None or any(fits(pattern, name) for pattern in self.include)
        return included and not any(fits(pattern, name) for pattern in self.exclude)

    def preflight(self, ctx: Context) -> None:
        check_inputs(self, ctx)

    def prepare(self, ctx: Context) -> int:
        """The number of layers, over which gradients spread."""
        names = tensor_shapes(ctx, self.base_ref)
        if self.include is not None and not any(map(self.selects, names)):
            mend = f"A pattern fits whole parts of a name, such as {next(iter(names), 'none')}."
            raise StepError(f"include and exclude leave no tensor of {self.base_ref} to merge", mend=mend)
        return layers_in(names, self, ctx)

    def value(self, schedule: Any, at: Place) -> float:
        """A parameter's value for the tensor at hand."""
        return value_at(schedule, at.name, depth_of(at.layer, at.known or 1))

    def of_model(self, schedule: PerModel | list[Schedule] | None, index: int, at: Place) -> float:
        """A parameter's value for one of the models; 1 where none is given."""
        if schedule is None:
            return 1.0
        return self.value(schedule[index] if isinstance(schedule, list) else schedule, at)


class Merge(Models):
    """A merge of `models`; config, tokenizer and the tensors' names come from the first."""

    models: list[ModelRef] = Field(min_length=2, description="The models, of one architecture.")

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
    def merged(self) -> tuple[ModelRef, ...]:
        return tuple(self.models)


class FromBase(Merge):
    """A merge of what `models` changed in `base_model`; config, tokenizer and the tensors' names are the base's."""

    base_model: ModelRef = Field(description="The model that the others were fine-tuned from.")
    models: list[ModelRef] = Field(min_length=1, description="The fine-tuned models, of the base's architecture.")

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        return from_base(self.base_model, self.models)


def from_base(base: ModelRef | None, models: Sequence[ModelRef]) -> tuple[ModelRef, ...]:
    """The models of a merge, its base, if it has one, before the others."""
    return tuple(dict.fromkeys([base, *models] if base is not None else models))


def layers_in(names: Iterable[str], op: TensorOp, ctx: Context) -> int:
    """The number of layers of a model with such tensors. Patterns of the op that fit none of them are told of."""
    names = list(names)
    for field in type(op).model_fields:
        for pattern in patterns_of(getattr(op, field), alone=field in ("include", "exclude")):
            if not any(fits(pattern, name) for name in names):
                ctx.warn(f"{field}: {pattern!r} fits no tensor of {op.base_ref}")
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=0)


def patterns_of(value: Any, *, alone: bool = False) -> Iterator[str]:
    """The patterns in a field: keys of schedules, also of those in a list; or the entries of a list of them `alone`."""
    if isinstance(value, Mapping) and all(isinstance(each, (int, float, list)) for each in value.values()):
        yield from (pattern for pattern in value if pattern != DEFAULT)
    elif isinstance(value, list):
        for each in value:
            yield from [each] if alone else patterns_of(each)


def require_within(name: str, schedule: Any, low: float, high: float, what: str) -> None:
    """ValueError unless every number of a schedule lies in (low, high]."""
    for value in values_of(schedule):
        if not low < value <= high:
            raise ValueError(f"{name} is {value:g}, but must lie in ({low:g}, {high:g}]: {what}")


def indexed(models: Sequence[ModelRef], present: Any) -> list[tuple[int, ModelRef]]:
    """The models that have the tensor at hand, with their places in the list."""
    return [(index, model) for index, model in enumerate(models) if model in present]
