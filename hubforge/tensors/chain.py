"""A chain of TensorOps as one: an op's output is read by the next as it is computed, float32, block by block.

A stage that is fused into the next is a checkpoint like any other to it, only that its rows are computed when they are
read. So each op stays the function of its paper, and a chain of any shape is one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hubforge.errors import StepError
from hubforge.op import Context, Fused, Place, TensorOp
from hubforge.tensors import dtypes
from hubforge.tensors.desk import Desk
from hubforge.tensors.inputs import Deltas, Input, Inputs, Opened, Rows, Weights, is_buffer, open_inputs, require_float
from hubforge.tensors.names import layer_of, natural_order
from hubforge.tensors.reader import Checkpoint, TensorInfo
from hubforge.tensors.towers import renamed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Output:
    """One tensor of an op's output: its name, dtype and shape, and which tensor of the base it is made from."""

    info: TensorInfo
    source: str
    present: frozenset[str]  # the refs that have the tensor
    changed: bool  # False: it is the base's


class Measure(NamedTuple):
    """One pass of `measure` over one tensor of one op of a chain."""

    link: Link
    source: str
    turn: int


class Link:
    """One op over its open inputs, some of which may be links too."""

    def __init__(self, op: TensorOp, ctx: Context, inputs: Inputs, desk: Desk) -> None:
        self.op, self.ctx, self.inputs, self.desk = op, ctx, inputs, desk
        self.outputs = self._outputs()
        self.known = op.prepare(ctx)
        self.totals: dict[str, Mapping[str, Any]] = {}  # by the tensor's name in the base

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of an output, float32, not rounded."""
        import torch

        output = self.outputs[name]
        w = Rows(self.inputs, output.present, output.source, first, last)
        if not output.changed:
            return w[self.op.base_ref]
        merged = self.op.tensor(w, self.place(output.source, first))
        shape = (last - first, *output.info.shape[1:]) if output.info.shape else ()
        if merged.shape != shape or merged.dtype != torch.float32:
            found, kind = f"{merged.dtype} {list(merged.shape)}", type(self.op).__name__
            raise TypeError(f"{kind}.tensor gave {found} for {output.source}, not float32 of its shape")
        return merged

    def place(self, source: str, first: int = 0, turn: int = 0) -> Place:
        shape = self.inputs.base.info(source).shape
        return Place(source, layer_of(source), shape, first, self.known, self.totals.get(source, {}), turn)

    def measure(self, source: str, turn: int, first: int, last: int) -> Mapping[str, Any]:
        present = self.inputs.present(source)
        return self.op.measure(Rows(self.inputs, present, source, first, last), self.place(source, first, turn))

    def combine(self, source: str, turn: int, found: Sequence[Mapping[str, Any]]) -> None:
        """Take in what `measure` found in the blocks of a tensor, in their order."""
        self.totals[source] = self.op.combine(found, self.place(source, 0, turn))

    def measures(self, name: str) -> list[list[Measure]]:
        """What each pass over a tensor must measure, in this op and those it reads, before `rows` can be computed.

        An op measures once all that its inputs need is known; what does not depend on one another shares a pass.
        """
        output = self.outputs[name]
        passes: list[dict[tuple[int, str, int], Measure]] = []
        for link, own in self._reads(name):
            for number, wanted in enumerate(link.measures(own)):
                if number == len(passes):
                    passes.append({})
                passes[number] |= {(id(each.link), each.source, each.turn): each for each in wanted}
        found = [list(wanted.values()) for wanted in passes]
        if output.changed:
            found += [[Measure(self, output.source, turn)] for turn in range(self.op.measures())]
        return found

    def whole(self, name: str) -> bool:
        """Whether a tensor can only be computed as a whole, by this op or one that it reads."""
        output = self.outputs[name]
        return (output.changed and self.op.whole()) or any(link.whole(own) for link, own in self._reads(name))

    def light(self, name: str) -> bool:
        """Whether little is held beside the inputs of a tensor, so that fewer and larger blocks are faster."""
        return self.op.combines and all(link.light(own) for link, own in self._reads(name))

    def multiplies(self, name: str) -> bool:
        """Whether an adapter's factors are multiplied for a tensor: a matrix product of few rows is slow."""
        output = self.outputs[name]
        held = [self.inputs.by_ref[ref] for ref in output.present] if output.changed else []
        return any(isinstance(each, Deltas) for each in held) or any(
            link.multiplies(own) for link, own in self._reads(name)
        )

    def packed(self, name: str) -> bool:
        """Whether an output can be made from the bytes of its inputs: bfloat16 in files, combined and rounded by us."""
        output = self.outputs[name]
        summed = output.changed and (self.op.combines or self.op.thins)
        if not summed or self.op.rounding != "nearest" or output.info.dtype != "BF16":
            return False
        inputs = [self.inputs.by_ref[ref] for ref in output.present]
        return all(
            isinstance(held, Weights)
            and type(held.checkpoint) is Checkpoint
            and held.checkpoint.info(held.names[output.source]).dtype == "BF16"
            for held in inputs
        )

    def hides(self, name: str) -> bool:
        """Whether NaN in an input may not show in an output."""
        output = self.outputs[name]
        return (output.changed and self.op.hides) or any(link.hides(own) for link, own in self._reads(name))

    def model(self) -> Checkpoint:
        """The files' tensors that the chain starts from, through the bases."""
        base = self.inputs.base
        return base.link.model() if isinstance(base, Computed) else base

    def leaf(self, name: str) -> tuple[Checkpoint, str]:
        """The file's tensor that an output starts from, through the bases of the chain."""
        base, source = self.inputs.base, self.outputs[name].source
        return base.link.leaf(source) if isinstance(base, Computed) else (base, source)

    def copied(self, name: str) -> bool:
        """Whether an output is `leaf`'s tensor, changed by no op of the chain."""
        output, base = self.outputs[name], self.inputs.base
        return not output.changed and (not isinstance(base, Computed) or base.link.copied(output.source))

    def expect(self, name: str, first: int, last: int) -> None:
        output = self.outputs[name]
        for ref in output.present if output.changed else [self.op.base_ref]:
            self.inputs.by_ref[ref].expect(output.source, first, last)

    def files(self, name: str) -> Iterator[tuple[str, Input, str]]:
        """Every input from outside the chain that has part in a tensor: its ref, the input, and its name there."""
        output = self.outputs[name]
        for ref in sorted(output.present if output.changed else [self.op.base_ref]):
            held = self.inputs.by_ref[ref]
            if isinstance(held, Weights) and isinstance(held.checkpoint, Computed):
                yield from held.checkpoint.link.files(held.names[output.source])
            else:
                yield ref, held, output.source

    def _reads(self, name: str) -> Iterator[tuple[Link, str]]:
        output = self.outputs[name]
        for ref in output.present if output.changed else [self.op.base_ref]:
            held = self.inputs.by_ref[ref]
            if isinstance(held, Weights) and isinstance(held.checkpoint, Computed):
                yield held.checkpoint.link, held.names[output.source]

    def _outputs(self) -> dict[str, Output]:
        wanted = dtypes.from_torch(self.op.dtype) if self.op.dtype else None
        outputs: dict[str, Output] = {}
        for info in sorted(self.inputs.base.tensors.values(), key=lambda info: natural_order(info.name)):
            name = renamed(self.op, info.name)
            present = self.inputs.present(info.name)
            if name is None or self.op.skips(info.name, present):
                continue
            if name in outputs:
                what = f"{info.name} and {outputs[name].source} would both be called {name}"
                raise StepError(what, where=self.ctx.where)
            changed = self.op.changes(info.name, present) and not is_buffer(info.name, self.inputs)
            if changed:
                require_float(info.name, self.inputs, self.ctx)
            dtype = wanted if wanted and info.dtype in dtypes.FLOATS else info.dtype
            made = TensorInfo(name, dtype, info.shape, info.file, info.start, info.end)
            outputs[name] = Output(made, info.name, present, changed)
        if not outputs:
            raise StepError("the output would have no tensors", where=self.ctx.where)
        return outputs


class Computed(Checkpoint):
    """The output of a link, as a checkpoint whose tensors are computed when they are read.

    Its path, and the file of a tensor, are those of the model that the chain starts from.
    """

    def __init__(self, link: Link) -> None:
        super().__init__(link.inputs.base.path, {name: output.info for name, output in link.outputs.items()})
        self.link = link

    def rows_on(self, desk: Desk, name: str, first: int, last: int) -> Tensor:
        return desk.computed((id(self), name, first, last), lambda: self.link.rows(name, first, last))

    def expect(self, name: str, first: int, last: int) -> None:
        self.link.expect(name, first, last)


def open_chain(op: TensorOp, ctx: Context, opened: Opened) -> Link:
    """The link of an op, after those of the ops whose output it takes as they compute it."""
    return _open(op, ctx, opened, {})


def _open(op: TensorOp, ctx: Context, opened: Opened, known: dict[int, Computed], *, inner: bool = False) -> Link:
    computed: dict[str, Checkpoint] = {}
    for ref, fused in ctx.fused.items():
        if id(fused) not in known:
            known[id(fused)] = Computed(_open(fused.op, fused.ctx, opened, known, inner=True))
        computed[ref] = known[id(fused)]
    try:
        return Link(op, ctx, open_inputs(op, ctx, opened, computed, inner=inner), opened.desk)
    except StepError as error:
        if error.where:
            raise
        raise StepError(error.what, where=ctx.where, mend=error.mend) from error


def fused_steps(ctx: Context) -> list[Fused]:
    """Every op that is computed in this one's pass, each once, each after those it reads."""
    found: dict[int, Fused] = {}

    def visit(inner: Fused) -> None:
        for deeper in inner.ctx.fused.values():
            visit(deeper)
        found.setdefault(id(inner), inner)

    for inner in ctx.fused.values():
        visit(inner)
    return list(found.values())


def ops_from_base(op: TensorOp, ctx: Context) -> list[TensorOp]:
    """The ops that edit the config on its way from the model it starts from, the first one first."""
    inner = ctx.fused.get(op.base_ref)
    return [*(ops_from_base(inner.op, inner.ctx) if inner else []), op]
