"""What a merge reads: models' weights, adapters' deltas and masks' values, all under the base model's tensor names."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hubforge.errors import StepError
from hubforge.op import Context, Ref, TensorOp
from hubforge.tensors import dtypes
from hubforge.tensors.adapter import Adapter, LoraModule, delta, open_adapter
from hubforge.tensors.names import Aliases, paired
from hubforge.tensors.reader import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


class Input(Protocol):
    """One ref's tensors. Called from several threads."""

    def __contains__(self, name: object) -> bool: ...
    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last), float32."""

    def expect(self, name: str, first: int, last: int) -> None:
        """Have those rows in memory soon."""

    def file(self, name: str) -> str:
        """The file a tensor comes from, for errors."""


class Weights:
    """The tensors of a model or mask."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self.checkpoint, self.names = checkpoint, names

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self.checkpoint.read_rows(self.names[name], first, last).float()

    def expect(self, name: str, first: int, last: int) -> None:
        self.checkpoint.expect(self.names[name], first, last)

    def file(self, name: str) -> str:
        return str(self.checkpoint.info(self.names[name]).file)


class Deltas:
    """The deltas of an adapter. Each thread keeps the factors of the module it last used."""

    def __init__(self, adapter: Adapter, modules: Mapping[str, LoraModule]) -> None:
        self.adapter, self.modules = adapter, modules
        self._last = threading.local()

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def rows(self, name: str, first: int, last: int) -> Tensor:
        if getattr(self._last, "name", None) != name:
            self._last.factors = self.adapter.factors(self.modules[name].name)
            self._last.name = name
        a, b = self._last.factors
        return delta(self.modules[name], a, b, first, last)

    def expect(self, name: str, first: int, last: int) -> None:
        pass

    def file(self, name: str) -> str:
        return self.adapter.where


@dataclass(frozen=True)
class Inputs:
    """All inputs of one op, by ref; `base` is the checkpoint whose tensors the output has."""

    base: Checkpoint
    by_ref: Mapping[str, Input]

    def present(self, name: str) -> frozenset[str]:
        return frozenset(ref for ref, held in self.by_ref.items() if name in held)


class Rows(Mapping[str, "Tensor"]):
    """Rows of one tensor from each ref that has it, read when first asked for."""

    def __init__(self, inputs: Inputs, present: frozenset[str], name: str, first: int, last: int) -> None:
        self._inputs, self._present, self._where = inputs, present, (name, first, last)
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, ref: str) -> Tensor:
        if ref not in self._read:
            if ref not in self._present:
                raise KeyError(ref)
            self._read[ref] = self._inputs.by_ref[ref].rows(*self._where)
        return self._read[ref]

    def __contains__(self, ref: object) -> bool:
        return ref in self._present

    def __iter__(self) -> Iterator[str]:
        return (ref for ref in self._inputs.by_ref if ref in self._present)

    def __len__(self) -> int:
        return len(self._present)


def refs_of(op: TensorOp) -> list[Ref]:
    """Every ref among an op's fields, each once, in the order of the fields."""
    found: dict[Ref, None] = {}
    for field in type(op).model_fields:
        value = getattr(op, field)
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(entry, Ref):
                found[entry] = None
    return list(found)


def open_inputs(op: TensorOp, ctx: Context, stack: ExitStack) -> Inputs:
    """Open and check every input: shapes equal to the base's, and no tensor that only another model has.

    StepError names the tensor, both shapes and both files.
    """
    base = stack.enter_context(open_checkpoint(ctx.inputs[op.base_ref].path))
    by_ref: dict[str, Input] = {op.base_ref: Weights(base, {name: name for name in base})}
    for ref in refs_of(op):
        if ref in by_ref:
            continue
        artifact = ctx.artifact(ref)
        if artifact.kind == "adapter":
            adapter = stack.enter_context(open_adapter(artifact.path, str(ref)))
            by_ref[ref] = Deltas(adapter, adapter.on(base))
            continue
        other = stack.enter_context(open_checkpoint(artifact.path, "fisher" if artifact.kind == "mask" else "model"))
        names = paired(base, Aliases(other, str(other.path)))
        if artifact.kind == "model" and getattr(op, "missing", "base") == "error":
            only = sorted(set(other) - set(names.values()))
            if only:
                raise _only_in(only, ref, other, base, ctx)
        for name, own in names.items():
            _check_same_shape(name, base, own, other, ctx)
        by_ref[ref] = Weights(other, names)
    return Inputs(base, by_ref)


def _only_in(names: list[str], ref: str, other: Checkpoint, base: Checkpoint, ctx: Context) -> StepError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = f"{ref} has tensor {names[0]}{more}, which {base.path} lacks"
    mend = f"`missing: base` leaves out what only {ref} has ({other.path})."
    return StepError(what, where=ctx.where, mend=mend)


def _check_same_shape(name: str, base: Checkpoint, own: str, other: Checkpoint, ctx: Context) -> None:
    here, there = base.info(name), other.info(own)
    if here.shape != there.shape:
        what = f"{name} is {list(here.shape)} in {here.file}, but {own} is {list(there.shape)} in {there.file}"
        raise StepError(what, where=ctx.where, mend="Only tensors of one shape can be merged.")


def require_float(name: str, inputs: Inputs, ctx: Context) -> None:
    """StepError unless every weight of a tensor that is to change is a float that needs no scales."""
    for held in inputs.by_ref.values():
        if isinstance(held, Weights) and name in held:
            info = held.checkpoint.info(held.names[name])
            if info.dtype not in dtypes.FLOATS:
                what = f"{info.name} in {info.file} is {info.dtype}, which cannot be merged"
                mend = "Take a base in bfloat16, float16 or float32: quantised weights need scales that are not read."
                raise StepError(what, where=ctx.where, mend=mend)
