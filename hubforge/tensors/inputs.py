"""What a merge reads: models' weights, adapters' deltas and masks' values, all under the base model's tensor names."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hubforge.errors import SourceError, StepError
from hubforge.op import Artifact, Context, Ref, TensorOp
from hubforge.tensors import dtypes
from hubforge.tensors.adapter import Adapter, LoraModule, delta, dora_delta, open_adapter
from hubforge.tensors.desk import Desk
from hubforge.tensors.names import Aliases, canonical, paired
from hubforge.tensors.quantised import config_beside, open_model, quantised_by
from hubforge.tensors.reader import Checkpoint, open_checkpoint
from hubforge.tensors.tokens import FILE as TOKENIZER
from hubforge.tensors.tokens import read_tokens
from hubforge.tensors.towers import renamed
from hubforge.tensors.vocabulary import Held, Vocabulary, is_table

if TYPE_CHECKING:
    from torch import Tensor


_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
_PLAIN = "Take it in bfloat16, float16, float32, or in 8-bit floats with their scales."
_NORMS_OF = 1 << 20  # elements whose squares are summed at once


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

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], desk: Desk) -> None:
        self.checkpoint, self.names, self.desk = checkpoint, names, desk

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def rows(self, name: str, first: int, last: int) -> Tensor:
        own = self.names[name]
        return self.checkpoint.rows_on(self.desk, own, first, last)

    def expect(self, name: str, first: int, last: int) -> None:
        self.checkpoint.expect(self.names[name], first, last)

    def file(self, name: str) -> str:
        return str(self.checkpoint.info(self.names[name]).file)


class Deltas:
    """What an adapter adds to the tensors of its base; of modules that it saved whole, the difference to the base's."""

    def __init__(self, adapter: Adapter, base: Weights, desk: Desk) -> None:
        self.adapter, self.base, self.desk = adapter, base, desk
        self.modules, self.saved = adapter.on(base.checkpoint), adapter.saved_on(base.checkpoint)
        self._norms: dict[str, Tensor] = {}
        self._one_at_a_time = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self.modules or name in self.saved

    def rows(self, name: str, first: int, last: int) -> Tensor:
        make = self._difference if name in self.saved else self._product
        return self.desk.found((id(self.adapter), name, first, last), lambda: make(name, first, last))

    def _product(self, name: str, first: int, last: int) -> Tensor:
        module, key = self.modules[name], (id(self.adapter), self.modules[name].name)
        a, b = self.desk.factors(key, lambda: self.adapter.factors(module.name, nan=True))  # `nan` is the op's
        change = delta(module, a, b, first, last)
        if module.magnitude is not None:
            magnitude = self.adapter.checkpoint.read(module.magnitude.name).float().reshape(-1).to(change.device)
            norm = self._column_norms(name, module, a, b).to(change.device) if module.transposed else None
            magnitude = magnitude if module.transposed else magnitude[first:last]
            change = dora_delta(self._trained_on(name, module, first, last), change, magnitude, norm)
        if module.base is not None:
            change += self._trained_on(name, module, first, last) - self.base.rows(name, first, last)
        return change

    def _trained_on(self, name: str, module: LoraModule, first: int, last: int) -> Tensor:
        """Rows of the weights that the adapter is a change of: its own where its file has them, else the base's."""
        if module.base is None:
            return self.base.rows(name, first, last)
        return self.adapter.checkpoint.rows_on(self.desk, module.base.name, first, last)

    def _column_norms(self, name: str, module: LoraModule, a: Tensor, b: Tensor) -> Tensor:
        """‖W + Δ‖ of each column, over all rows, float32: one more pass over the tensor, when it is first asked for."""
        import torch

        with self._one_at_a_time:
            if name not in self._norms:
                rows, columns = module.shape
                step, total = max(1, _NORMS_OF // columns), torch.zeros(columns, dtype=torch.float64)
                for first in range(0, rows, step):
                    last = min(first + step, rows)
                    with self.desk.aside():
                        whole = self._trained_on(name, module, first, last) + delta(module, a, b, first, last)
                    total += whole.double().square_().sum(0).cpu()
                self._norms[name] = total.sqrt().float()
            return self._norms[name]

    def _difference(self, name: str, first: int, last: int) -> Tensor:
        own = self.adapter.checkpoint.rows_on(self.desk, self.saved[name], first, last)
        return own - self.base.rows(name, first, last)

    def expect(self, name: str, first: int, last: int) -> None:
        pass

    def file(self, name: str) -> str:
        return self.adapter.where


@dataclass(frozen=True)
class Inputs:
    """All inputs of one op, by ref; `base` is the checkpoint whose tensors the output has."""

    base: Checkpoint
    by_ref: Mapping[str, Input]
    vocabulary: Vocabulary | None = None  # where the models' vocabularies are brought to one

    def present(self, name: str) -> frozenset[str]:
        return frozenset(ref for ref, held in self.by_ref.items() if name in held)


class Rows(Mapping[str, "Tensor"]):
    """Rows of one tensor from each ref that has it, read when first asked for."""

    def __init__(self, inputs: Inputs, present: frozenset[str], name: str, first: int, last: int) -> None:
        self._inputs, self._present, self._where = inputs, present, (name, first, last)

    def __getitem__(self, ref: str) -> Tensor:
        if ref not in self._present:
            raise KeyError(ref)
        return self._inputs.by_ref[ref].rows(*self._where)

    def __contains__(self, ref: object) -> bool:
        return ref in self._present

    def __iter__(self) -> Iterator[str]:
        return (ref for ref in self._inputs.by_ref if ref in self._present)

    def __len__(self) -> int:
        return len(self._present)


class Opened:
    """Every file of a run, opened once, however many ops of a chain read it. A model's 8-bit floats are values."""

    def __init__(self, stack: ExitStack, desk: Desk) -> None:
        self.stack, self.desk = stack, desk
        self._checkpoints: dict[tuple[Path, str], Checkpoint] = {}
        self._models: dict[Path, Checkpoint] = {}
        self._adapters: dict[Path, Adapter] = {}

    def checkpoint(self, path: Path, stem: str = "model") -> Checkpoint:
        if (path, stem) not in self._checkpoints:
            self._checkpoints[path, stem] = self.stack.enter_context(open_checkpoint(path, stem))
        return self._checkpoints[path, stem]

    def model(self, path: Path) -> Checkpoint:
        if path not in self._models:
            self._models[path] = self.stack.enter_context(open_model(path))
        return self._models[path]

    def adapter(self, path: Path, name: str) -> Adapter:
        if path not in self._adapters:
            self._adapters[path] = self.stack.enter_context(open_adapter(path, name))
        return self._adapters[path]


def refs_of(op: TensorOp) -> list[Ref]:
    """Every ref among an op's fields whose tensors are merged, each once, in the order of the fields."""
    found: dict[Ref, None] = {}
    for field in type(op).model_fields:
        value = getattr(op, field)
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(entry, Ref) and field != "tokenizer":
                found[entry] = None
    return list(found)


def tensor_shapes(ctx: Context, ref: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model that is an input, from headers alone; of one that is only computed, too."""
    if ref in ctx.fused:
        op, inner = ctx.fused[ref].op, ctx.fused[ref].ctx
        shapes = tensor_shapes(inner, op.base_ref)
        return {new: shape for name, shape in shapes.items() if (new := renamed(op, name)) is not None}
    with open_checkpoint(ctx.inputs[ref].path) as checkpoint:
        return {name: info.shape for name, info in checkpoint.tensors.items()}


def started_from(ctx: Context, ref: str) -> Artifact:
    """A model; of one that is only computed, the model that it starts from."""
    if ref in ctx.fused:
        return started_from(ctx.fused[ref].ctx, ctx.fused[ref].op.base_ref)
    return ctx.inputs[ref]


def open_inputs(
    op: TensorOp, ctx: Context, opened: Opened, computed: Mapping[str, Checkpoint], *, inner: bool = False
) -> Inputs:
    """Open and check every input: shapes equal to the base's, and no tensor that only another model has.

    computed: the models among them that are computed in the same pass. inner: whether this op is one of those itself.
    StepError names the tensor, both shapes and both files.
    """
    held: dict[str, Checkpoint] = {}
    for ref in [Ref(op.base_ref), *refs_of(op)]:
        if ref in computed:
            held[str(ref)] = computed[ref]
        elif ref not in held and ctx.artifact(ref).kind == "model":
            held[str(ref)] = opened.model(ctx.path(ref)) if op.computes or inner else opened.checkpoint(ctx.path(ref))
    for model, checkpoint in held.items():
        if op.computes and model not in computed:
            _require_plain(model, checkpoint, ctx)
    vocabulary = _vocabulary(op, ctx, held, opened)
    models = {ref: vocabulary.view(ref) for ref in held} if vocabulary else held
    base = models[op.base_ref]
    by_ref: dict[str, Input] = {op.base_ref: Weights(base, {name: name for name in base}, opened.desk)}
    for ref in refs_of(op):
        if ref in by_ref:
            continue
        is_model = ref in models
        if not is_model and ctx.artifact(ref).kind == "adapter":
            adapter = opened.adapter(ctx.path(ref), str(ref))
            by_ref[ref] = Deltas(adapter, Weights(base, {name: name for name in base}, opened.desk), opened.desk)
            _warn_of_another_base(adapter, started_from(ctx, op.base_ref), ctx)
            if held_whole := [module.base.name for module in adapter.modules.values() if module.base]:
                ctx.note(
                    f"{ref} has weights of the model it was trained on ({held_whole[0]}), which take their place here"
                )
            continue
        other = models[ref] if is_model else opened.checkpoint(ctx.path(ref), op.mask_stem)
        names = dict(paired(base, Aliases(other, str(other.path))))
        if is_model:
            tied = _tied_heads(base, other, names, started_from(ctx, ref).path)
            names |= tied
            if getattr(op, "missing", "base") == "error":
                only = set(other) - set(names.values())
                only -= set() if ref in computed else _copies_of_embeddings(base, other, names)
                if only:
                    lacks = op.base_ref if op.base_ref in computed else str(base.path)
                    raise _only_in(sorted(only), ref, other, lacks, ctx)
        for name, own in names.items():
            _check_same_shape(name, base, own, other, ctx)
        by_ref[ref] = Weights(other, names, opened.desk)
    return Inputs(base, by_ref, vocabulary)


def check_inputs(op: TensorOp, ctx: Context) -> None:
    """What headers tell of the inputs, where all are there before any step is begun: damage, and shapes that differ.

    SourceError or StepError. Not of an op that brings vocabularies to one, whose shapes its tokenizers decide.
    """
    refs = list(dict.fromkeys([Ref(op.base_ref), *refs_of(op)]))
    if op.vocabulary() is not None or not all(ref in ctx.inputs for ref in refs):
        return
    with ExitStack() as stack:
        opened = Opened(stack, Desk())
        base = opened.model(ctx.path(refs[0]))
        for ref in refs:
            if ctx.artifact(ref).kind == "model":
                other = opened.model(ctx.path(ref))
                _require_plain(str(ref), other, ctx)
                for name, own in paired(base, Aliases(other, str(other.path))).items():
                    _check_same_shape(name, base, own, other, ctx)
            elif ctx.artifact(ref).kind == "adapter":
                adapter = opened.adapter(ctx.path(ref), str(ref))
                adapter.on(base)
                adapter.saved_on(base)


def _vocabulary(op: TensorOp, ctx: Context, models: Mapping[str, Checkpoint], opened: Opened) -> Vocabulary | None:
    """The common vocabulary that the op asks for."""
    wanted = op.vocabulary()
    if wanted is None:
        _warn_of_other_tokens(op, ctx, models)
        return None
    lenders = {row.model for row in wanted.tokens.values() if row.model}
    lenders |= {wanted.source} - {"base", "union"}
    others = {
        ref: Held(read_tokens(ctx.inputs[ref].path, ref), opened.model(ctx.inputs[ref].path))
        for ref in sorted(lenders - set(models))
    }
    merged = {ref: Held(read_tokens(ctx.inputs[ref].path, ref), held) for ref, held in models.items()}
    return Vocabulary(wanted, merged, others)


def _only_in(names: list[str], ref: str, other: Checkpoint, lacks: str, ctx: Context) -> StepError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = f"{ref} has tensor {names[0]}{more}, which {lacks} lacks"
    mend = f"`missing: base` leaves out what only {ref} has ({other.path})."
    if canonical(names[0]) in _HEADS:
        mend = f"Name {ref} first: where the base has a head of its own, embeddings that another ties stand for it."
    return StepError(what, where=ctx.where, mend=mend)


def _check_same_shape(name: str, base: Checkpoint, own: str, other: Checkpoint, ctx: Context) -> None:
    here, there = base.info(name), other.info(own)
    if here.shape != there.shape:
        what = f"{name} is {list(here.shape)} in {here.file}, but {own} is {list(there.shape)} in {there.file}"
        mend = "Only tensors of one shape can be merged."
        if is_table(name) and here.shape[1:] == there.shape[1:]:
            mend = "The vocabularies differ: `tokenizer: base` (or union) matches their rows by the tokens' text."
        raise StepError(what, where=ctx.where, mend=mend)


def _warn_of_another_base(adapter: Adapter, base: Artifact, ctx: Context) -> None:
    """Shapes have been checked; what the adapter says of its base can only be looked at when the base's repo is known.

    Only a warning: an adapter of a pretrained model is often applied to the instruct model made from it.
    """
    trained_on, repo = adapter.config.base_model, str(base.origin.get("repo") or "")
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", trained_on)
    if is_repo and repo and trained_on.lower() != repo.lower():
        ctx.warn(f"{adapter.name} was trained on {trained_on}, and is applied to {base.name}, which is {repo}")


def _warn_of_other_tokens(op: TensorOp, ctx: Context, refs: Iterable[str]) -> None:
    """Where rows are merged as they are, say which models number their tokens otherwise than the base."""
    base = started_from(ctx, op.base_ref).path / TOKENIZER
    for ref in refs:
        other = started_from(ctx, ref).path / TOKENIZER
        if not base.is_file() or not other.is_file() or other.read_bytes() == base.read_bytes():
            continue
        try:
            ours, theirs = read_tokens(base.parent, op.base_ref).ids, read_tokens(other.parent, ref).ids
        except SourceError:
            continue  # It may be of no known form: nothing is read from it.
        moved = sum(theirs.get(token, number) != number for token, number in ours.items())
        if moved:
            mend = "`tokenizer: base` matches them by their text"
            ctx.warn(f"{ref} numbers {moved} of {op.base_ref}'s {len(ours)} tokens otherwise; {mend}")


def _tied_heads(base: Checkpoint, other: Checkpoint, names: Mapping[str, str], folder: Path) -> dict[str, str]:
    """For a head that the base has and the other ties to its embeddings: the name of those embeddings."""
    config = config_beside(folder)
    if not (config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings")):
        return {}
    embeddings = [name for name in other if canonical(name) in _EMBEDDINGS]
    lacking = [name for name in base if canonical(name) in _HEADS and name not in names]
    return dict.fromkeys(lacking, embeddings[0]) if len(embeddings) == 1 else {}


def _copies_of_embeddings(base: Checkpoint, other: Checkpoint, names: Mapping[str, str]) -> set[str]:
    """The other's head, which the base ties, when it holds nothing but the other's embeddings once more."""
    heads = [name for name in other if canonical(name) in _HEADS and name not in names.values()]
    embeddings = [name for name in other if canonical(name) in _EMBEDDINGS]
    if len(heads) != 1 or len(embeddings) != 1:
        return set()
    return set(heads) if other.same_bytes(heads[0], embeddings[0]) else set()


def is_buffer(name: str, inputs: Inputs) -> bool:
    """Whether a tensor holds counts or flags, such as position ids: there is nothing in it to merge."""
    return not quantised_by(config_beside(inputs.base.path)) and inputs.base.info(name).dtype in dtypes.COUNTERS


def _require_plain(ref: str, model: Checkpoint, ctx: Context) -> None:
    """StepError for a model whose config names what quantised it, and that has matrices which are no floats."""
    method = quantised_by(config_beside(model.path))
    small = [info for info in model.tensors.values() if len(info.shape) > 1 and info.dtype not in dtypes.FLOATS]
    if method and small:
        what = f"{ref} is quantised by {method}: {small[0].name} in {small[0].file} is {small[0].dtype}"
        raise StepError(f"{what}, which cannot be merged", where=ctx.where, mend=_PLAIN)


def require_float(name: str, inputs: Inputs, ctx: Context) -> None:
    """StepError unless every weight of a tensor that is to change is a float."""
    for held in inputs.by_ref.values():
        if isinstance(held, Weights) and name in held:
            info = held.checkpoint.info(held.names[name])
            if info.dtype not in dtypes.FLOATS:
                what = f"{info.name} in {info.file} is {info.dtype}, which cannot be merged"
                raise StepError(what, where=ctx.where, mend=_PLAIN)
