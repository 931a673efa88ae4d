"""Run a TensorOp over whole checkpoints in bounded memory: lay out; then read, compute, round once and write blocks.

Every tensor is cut into blocks of about half a million elements, whatever the number of threads or the memory at
hand, and sums over blocks are taken in their order: so the bytes depend on neither, nor on how the inputs were sharded,
nor on how often the work was killed and taken up again.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError
from hubforge.op import Context, Metrics, Place, TensorOp
from hubforge.tensors import dtypes
from hubforge.tensors.inputs import Inputs, Rows, Weights, is_buffer, open_inputs, require_float
from hubforge.tensors.layout import GB, Layout, Slot, lay_out
from hubforge.tensors.names import layer_of
from hubforge.tensors.quantised import Dequantised, without_quantisation
from hubforge.tensors.reader import TensorInfo
from hubforge.tensors.rounding import LOW, gain_metrics, gain_sums, is_finite, not_finite
from hubforge.tensors.side_files import check_side_files, copy_side_files, set_dtype
from hubforge.tensors.writer import Piece, Writer, piece_of

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 19  # elements computed at once: 2 MB of float32, which stays in the cache
PIECE = 16  # blocks written and journalled together
_AHEAD = 4  # pieces a thread asks the kernel to read in advance


@dataclass(frozen=True)
class Target:
    """One tensor of the output: from which tensor of the base, where to, and in which blocks."""

    info: TensorInfo  # of the base
    slot: Slot
    present: frozenset[str]
    copied: bool
    blocks: tuple[tuple[int, int], ...]  # rows [first, last)

    @property
    def name(self) -> str:
        return self.info.name


@dataclass(frozen=True)
class Job:
    """One thing for a thread to do: blocks [first, last) of a target, measured, or written as a piece."""

    target: Target
    first: int
    last: int
    piece: Piece | None  # None: measure
    turn: int = 0  # which pass of measuring


def run_tensor_op(op: TensorOp, ctx: Context, threads: int | None = None) -> Metrics:
    """Write the op's output, a folder that Transformers loads, under `ctx.out`; what was found out on the way.

    Metrics: parameters, bytes, dtype, tensors, changed, largest_tensor, and gain (see `rounding.py`). The sha256 of
    each weight file, taken while it was written, goes to `ctx.sha256`.
    """
    with ExitStack() as stack:
        inputs = open_inputs(op, ctx, stack)
        source = ctx.inputs[op.base_ref].path
        # What is wrong with the config must not wait for the end.
        config = _edit(op, inputs, check_side_files(source))
        if "auto_map" in config:
            ctx.warn("config.json names code of its own (auto_map): it is not copied, so the output may not load")
        targets, layout = plan_targets(op, inputs, ctx)
        jobs = plan_jobs(op, targets)
        ctx.out.mkdir(parents=True, exist_ok=True)
        writer = Writer(ctx.out, layout, [job.piece for job in jobs if job.piece], _identity(op, ctx, layout))
        stack.callback(writer.close)
        work = _Work(op, ctx, inputs, writer, jobs, op.prepare(ctx))
        work.run(threads or _threads(op, targets, ctx))
        copy_side_files(source, ctx.out, lambda config: _edit(op, inputs, config), op.keeps, inputs.vocabulary)
        ctx.sha256.update(writer.complete())
    return _metrics(targets, layout, work.gains(), ctx) | op.review(ctx)


def plan_targets(op: TensorOp, inputs: Inputs, ctx: Context) -> tuple[list[Target], Layout]:
    """Every tensor of the output and its place, from the inputs' headers alone."""
    wanted = dtypes.from_torch(op.dtype) if op.dtype else None
    outputs: dict[str, TensorInfo] = {}
    for info in inputs.base.tensors.values():
        name = op.rename(info.name)
        if name is None or op.skips(info.name, inputs.present(info.name)):
            continue
        if name in outputs:
            what = f"{info.name} and {outputs[name].name} would both be called {name}"
            raise StepError(what, where=ctx.where)
        outputs[name] = info
    if not outputs:
        raise StepError("the output would have no tensors", where=ctx.where)
    if wanted:
        dtype_of = {name: wanted if info.dtype in dtypes.FLOATS else info.dtype for name, info in outputs.items()}
    else:
        dtype_of = {name: info.dtype for name, info in outputs.items()}
    layout = lay_out(
        ((name, dtype_of[name], info.shape) for name, info in outputs.items()), int(op.max_shard_size * GB)
    )
    targets = []
    for name, slot in layout.slots.items():
        info = outputs[name]
        present = inputs.present(info.name)
        copied = not op.changes(info.name, present) or is_buffer(info.name, inputs)
        if not copied:
            require_float(info.name, inputs, ctx)
        at_once = not copied and op.whole()
        targets.append(Target(info, slot, present, copied, _blocks(info, info.rows if at_once else None)))
    return targets, layout


def _blocks(info: TensorInfo, rows: int | None) -> tuple[tuple[int, int], ...]:
    """Runs of `rows` rows; by default as many as make a block, and never less than one. A vector is not cut."""
    if info.elements == 0:
        return ()
    if len(info.shape) < 2:  # A vector is one row to methods that work row by row.
        return ((0, info.rows),)
    step = rows or max(1, BLOCK * info.rows // info.elements)
    return tuple((first, min(first + step, info.rows)) for first in range(0, info.rows, step))


def plan_jobs(op: TensorOp, targets: Sequence[Target]) -> list[Job]:
    """The work, written in the order of the output's bytes; measuring a tensor stands before writing it.

    Each pass over a tensor is followed by the pass before it over the next tensor, so that a thread finds something
    to do while another finishes a pass.
    """
    passes = op.measures()
    jobs: list[tuple[int, Job]] = []
    for place, target in enumerate(targets):
        runs = [(first, min(first + PIECE, len(target.blocks))) for first in range(0, len(target.blocks), PIECE)]
        if not target.copied:
            jobs += [(place + turn, Job(target, *run, None, turn)) for turn in range(passes) for run in runs]
        for number, (first, last) in enumerate(runs):
            piece = piece_of(target.slot, number, target.blocks[first][0], target.blocks[last - 1][1])
            jobs.append((place + passes, Job(target, first, last, piece)))
    return [job for _, job in sorted(jobs, key=lambda timed: timed[0])]


class _Totals:
    """What `measure` found for one tensor, gathered from jobs that end in any order, combined in the blocks' order."""

    def __init__(self, op: TensorOp, target: Target, at: Place) -> None:
        self._op, self._target, self._at = op, target, at
        self._lock = threading.Lock()
        self._found: dict[int, Mapping[str, Any]] = {}
        self.complete = [threading.Event() for _ in range(op.measures())]
        self.value: Mapping[str, Any] = {}

    def add(self, found: Mapping[int, Mapping[str, Any]], turn: int) -> None:
        with self._lock:
            self._found |= found
            if len(self._found) < len(self._target.blocks):
                return
            blocks = [self._found[block] for block in sorted(self._found)]
            self._found = {}
            self.value = self._op.combine(blocks, replace(self._at, totals=self.value, turn=turn))
            self.complete[turn].set()


class _Work:
    """The jobs of one run, taken in order by threads; the first error stops them all."""

    def __init__(
        self, op: TensorOp, ctx: Context, inputs: Inputs, writer: Writer, jobs: Sequence[Job], known: Any
    ) -> None:
        self.op, self.ctx, self.inputs, self.writer, self.known = op, ctx, inputs, writer, known
        self.facts: dict[str, dict[str, list[float]]] = {}  # tensor -> piece -> gain sums
        left = []
        self.done = 0
        to_write = {job.target.name for job in jobs if job.piece and job.piece.key not in writer.finished}
        for job in jobs:
            if job.piece and job.piece.key in writer.finished:
                self.done += job.piece.end - job.piece.start
                self._keep(job, writer.finished[job.piece.key])
            elif job.target.name in to_write:
                left.append(job)
        self.left = left
        self.next = 0
        self.total = sum(job.piece.end - job.piece.start for job in jobs if job.piece)
        self.totals = {
            job.target.name: _Totals(op, job.target, self._place(job.target, 0)[1])
            for job in left
            if job.piece is None and job.turn == 0
        }
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.what = ""

    def run(self, threads: int) -> None:
        """Do all the jobs, and report progress from this thread alone."""
        import torch

        before = torch.get_num_threads()
        # One intra-op thread each: more would compete, and change the order of sums.
        torch.set_num_threads(1)
        _keep_freed_memory()
        workers = [threading.Thread(target=self._work, name=f"merge-{i}", daemon=True) for i in range(threads)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.1)
                    self.ctx.progress(self.done, self.total, "B", self.what)
        finally:
            self.stopped.set()
            for worker in workers:
                worker.join()
            torch.set_num_threads(before)
        if self.error:
            raise self.error
        self.ctx.progress(self.total, self.total, "B", "")

    def gains(self) -> dict[str, tuple[float, float]]:
        """The gain sums of each tensor that changed."""
        found = {}
        for name, pieces in self.facts.items():
            ordered = [pieces[key] for key in sorted(pieces, key=lambda key: int(key.rpartition("/")[2]))]
            found[name] = (sum(kept for kept, _ in ordered), sum(intended for _, intended in ordered))
        return found

    def _keep(self, job: Job, facts: list[float] | None) -> None:
        if facts and job.piece:
            self.facts.setdefault(job.target.name, {})[job.piece.key] = facts

    def _work(self) -> None:
        import torch

        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                while not self.stopped.is_set():
                    with self.lock:
                        if self.next == len(self.left):
                            return
                        job = self.left[self.next]
                        self._expect(self.left[self.next + _AHEAD : self.next + _AHEAD + 1])
                        self.next += 1
                        self.what = job.target.name
                    if job.piece is None:
                        self._measure(job)
                    else:
                        self._write(job, job.piece)
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
            self.stopped.set()

    def _expect(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            first, last = job.target.blocks[job.first][0], job.target.blocks[job.last - 1][1]
            for ref in job.target.present:
                self.inputs.by_ref[ref].expect(job.target.name, first, last)

    def _place(self, target: Target, block: int) -> tuple[Rows, Place]:
        first, last = target.blocks[block]
        rows = Rows(self.inputs, target.present, target.name, first, last)
        return rows, Place(target.name, layer_of(target.name), target.info.shape, first, self.known)

    def _known(self, target: Target, passes: int) -> Mapping[str, Any] | None:
        """What so many passes of measuring found; None when the work has stopped."""
        if target.name not in self.totals or passes == 0:
            return {}
        # They were handed out before, so another thread is at the last of them.
        while not self.totals[target.name].complete[passes - 1].wait(0.1):
            if self.stopped.is_set():
                return None
        return self.totals[target.name].value

    def _measure(self, job: Job) -> None:
        totals = self._known(job.target, job.turn)
        if totals is None:
            return
        found = {}
        for block in range(job.first, job.last):
            rows, place = self._place(job.target, block)
            found[block] = self.op.measure(rows, replace(place, totals=totals, turn=job.turn))
        self.totals[job.target.name].add(found, job.turn)

    def _write(self, job: Job, piece: Piece) -> None:
        target = job.target
        totals = self._known(target, self.op.measures())
        if totals is None:
            return
        crc = offset = 0
        sums = [0.0, 0.0]
        for block in range(job.first, job.last):
            if target.copied:
                data = self._copy(target, block)
            else:
                data, kept, intended = self._compute(target, block, totals)
                sums[0] += kept
                sums[1] += intended
            view = memoryview(data.numpy())
            crc = zlib.crc32(view, crc)
            self.writer.write(piece, offset, view)
            offset += len(view)
        facts = None if target.copied else sums
        self.writer.finish(piece, crc, facts)
        with self.lock:
            self._keep(job, facts)
            self.done += piece.end - piece.start

    def _copy(self, target: Target, block: int) -> torch.Tensor:
        import torch

        first, last = target.blocks[block]
        if target.slot.dtype == target.info.dtype:
            return self.inputs.base.read_bytes(target.name, first, last)
        rows = self.inputs.base.read_rows(target.name, first, last)
        return rows.to(dtypes.torch_dtype(target.slot.dtype)).reshape(-1).view(torch.uint8)

    def _compute(self, target: Target, block: int, totals: Mapping[str, Any]) -> tuple[torch.Tensor, float, float]:
        """The bytes of one block, and its gain sums."""
        import torch

        rows, place = self._place(target, block)
        merged = self.op.tensor(rows, replace(place, totals=totals))
        base = rows[self.op.base_ref]
        if merged.shape != base.shape or merged.dtype != torch.float32:
            found = f"{merged.dtype} {list(merged.shape)}"
            raise TypeError(f"{type(self.op).__name__}.tensor gave {found} for {target.name}, not float32 of its shape")
        rounded = merged.to(dtypes.torch_dtype(target.slot.dtype))
        back = rounded.float()
        if self.op.nan == "error":
            if not is_finite(back):
                rounded = self._only_shared_infinities(target, rounded, rows)
            elif self.op.hides and any(not is_finite(rows[ref]) for ref in rows):
                raise self._not_finite(target, rows)
        kept, intended = gain_sums(base, merged, back)
        return rounded.contiguous().reshape(-1).view(torch.uint8), kept, intended

    def _only_shared_infinities(self, target: Target, rounded: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The output with the infinities that all models share, as clamp bounds are; others, and NaN, are an error."""
        import torch

        base = rows[self.op.base_ref]
        shared = base.isinf()
        for ref in rows:
            if isinstance(self.inputs.by_ref[ref], Weights):
                shared = shared & (rows[ref] == base)
        if bool((~torch.isfinite(rounded) & ~shared).any()):
            raise self._not_finite(target, rows)
        return torch.where(shared, base.to(rounded.dtype), rounded)

    def _not_finite(self, target: Target, rows: Rows) -> StepError:
        base = rows[self.op.base_ref]
        for ref in sorted(rows, key=lambda ref: not not_finite(rows[ref], base)):
            if not is_finite(rows[ref]):
                what = f"{target.name} of {ref} ({self.inputs.by_ref[ref].file(target.name)}) holds NaN or infinity"
                mend = "That input is damaged: make or fetch it again. `nan: keep` takes it as it is."
                return StepError(what, where=self.ctx.where, mend=mend)
        what = f"{target.name} does not fit into {dtypes.torch_name(target.slot.dtype)}: some values become infinite"
        return StepError(what, where=self.ctx.where, mend="Lower the scale, or set dtype: bfloat16 or float32.")


def _keep_freed_memory() -> None:
    """Have glibc reuse freed memory rather than return it to the kernel.

    Fresh pages for every block's temporaries took a third of slerp's CPU time. Freeing one block of nearly 32 MB
    raises the allocator's thresholds (mallopt(3), M_MMAP_THRESHOLD); elsewhere it does nothing.
    """
    import torch

    torch.empty((32 << 20) - 4096, dtype=torch.uint8)


def _threads(op: TensorOp, targets: Sequence[Target], ctx: Context) -> int:
    """As many threads as there are processors, fewer where that would take more memory than allowed."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not op.whole():
        return processors
    held = max(target.info.elements * 4 * (len(target.present) + 4) for target in targets)
    return max(1, min(processors, ctx.settings.memory // held))


def _identity(op: TensorOp, ctx: Context, layout: Layout) -> str:
    """All that the bytes depend on: a journal of anything else is not continued."""
    return json.dumps(
        {
            "op": f"{type(op).__module__}.{type(op).__qualname__}",
            "version": op.version,
            "fields": op.model_dump(mode="json"),
            "inputs": {ref: artifact.key for ref, artifact in sorted(ctx.inputs.items())},
            "seed": ctx.seed,
            "headers": {file: f"{zlib.crc32(header):08x}" for file, header in layout.headers.items()},
            "blocks": [BLOCK, PIECE],
        },
        sort_keys=True,
    )


def _edit(op: TensorOp, inputs: Inputs, config: dict[str, Any]) -> dict[str, Any]:
    edited = op.config(config)
    if isinstance(inputs.base, Dequantised):
        edited = without_quantisation(edited)
    if inputs.vocabulary:
        edited = inputs.vocabulary.config(edited)
    return set_dtype(edited, op.dtype) if op.dtype else edited


def _metrics(
    targets: Sequence[Target],
    layout: Layout,
    gains: Mapping[str, tuple[float, float]],
    ctx: Context,
) -> Metrics:
    sizes: Counter[str] = Counter()
    for target in targets:
        sizes[target.slot.dtype] += target.slot.nbytes
    largest = max(targets, key=lambda target: target.slot.nbytes).slot
    gain = gain_metrics(gains)
    if gain.get("median", 1.0) < LOW:
        dtype = dtypes.torch_name(sizes.most_common(1)[0][0])
        ctx.warn(
            f"rounding to {dtype} keeps {gain['median']:.0%} of the change (median over {gain['tensors']} tensors)"
        )
    return {
        "parameters": sum(target.info.elements for target in targets),
        "bytes": layout.nbytes,
        "dtype": dtypes.torch_name(sizes.most_common(1)[0][0]),
        "tensors": len(targets),
        "changed": len(gains),
        "largest_tensor": {"name": largest.name, "bytes": largest.nbytes},
        "gain": gain,
    }
