"""Do the jobs of a merge: threads that read, compute, round once and write blocks, on the CPU or on GPUs.

Every tensor is cut into the same blocks whatever the threads, the memory or the devices at hand, and what is measured
of blocks is combined in their order: so the bytes depend on none of these.
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError
from hubforge.tensors import dtypes
from hubforge.tensors.allocator import keep_freed_memory
from hubforge.tensors.chain import Link
from hubforge.tensors.desk import Desk, Kept
from hubforge.tensors.inputs import Weights
from hubforge.tensors.packed import Packed
from hubforge.tensors.rounding import gain_sums, is_finite, not_finite, round_packed, round_to
from hubforge.tensors.targets import Job, Target
from hubforge.tensors.writer import Piece, Writer

if TYPE_CHECKING:
    from torch import Tensor

_AHEAD = 4  # jobs of which a thread asks the kernel to read the inputs in advance


class Survey:
    """The measuring of one tensor: what jobs found, which end in any order, is combined pass by pass."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._found: dict[int, list[Mapping[str, Any]]] = {}
        self._complete = [threading.Event() for _ in target.measures]

    def add(self, turn: int, found: Mapping[int, list[Mapping[str, Any]]]) -> None:
        with self._lock:
            self._found |= found
            if len(self._found) < len(self._target.blocks):
                return
            blocks = [self._found[block] for block in sorted(self._found)]
            self._found = {}
            for place, measure in enumerate(self._target.measures[turn]):
                measure.link.combine(measure.source, measure.turn, [block[place] for block in blocks])
            self._complete[turn].set()

    def wait(self, turn: int, stopped: threading.Event) -> bool:
        """Until all passes before `turn` are complete; False when the work has stopped.

        They were handed out before, so another thread is at the last of them.
        """
        while turn and not self._complete[turn - 1].wait(0.1):
            if stopped.is_set():
                return False
        return True


class Work:
    """The jobs of one run, taken in order by threads; the first error stops them all."""

    def __init__(
        self, link: Link, writer: Writer, jobs: Sequence[Job], desk: Desk, kept: Kept, *, kernels: bool = False
    ) -> None:
        self.link, self.writer, self.desk, self.kept, self.kernels = link, writer, desk, kept, kernels
        self.packed = Packed(link, kept)
        self.facts: dict[str, dict[str, list[float]]] = {}  # tensor -> piece -> gain sums
        self.done = 0
        self.total = sum(job.piece.end - job.piece.start for job in jobs if job.piece)
        self.unwritten: dict[str, int] = {}
        for job in jobs:
            if job.piece and job.piece.key in writer.finished:
                self.done += job.piece.end - job.piece.start
                self._keep(job, writer.finished[job.piece.key])
            elif job.piece:
                self.unwritten[job.target.name] = self.unwritten.get(job.target.name, 0) + 1
        self.left = [
            job
            for job in jobs
            if job.target.name in self.unwritten and not (job.piece and job.piece.key in writer.finished)
        ]
        self.with_torch = any(not self._from_bytes(job.target) for job in self.left)
        self.next = 0
        self.surveys = {job.target.name: Survey(job.target) for job in self.left}
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.what = ""

    def run(self, devices: Sequence[str]) -> None:
        """Do all the jobs, one thread for each of `devices`, and report progress from this thread alone."""
        stack = ExitStack()
        if self.with_torch:
            stack.enter_context(_one_torch_thread())
        keep_freed_memory()
        gc.freeze()  # The collector would walk over all that the imports left, again and again.
        workers = [
            threading.Thread(target=self._work, args=(device,), name=f"merge-{i}", daemon=True)
            for i, device in enumerate(devices)
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.1)
                    self.link.ctx.progress(self.done, self.total, "B", self.what)
        finally:
            self.stopped.set()
            for worker in workers:
                worker.join()
            gc.unfreeze()
            stack.close()
        if self.error:
            raise self.error
        self.link.ctx.progress(self.total, self.total, "B", "")

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

    def _from_bytes(self, target: Target) -> bool:
        """Whether torch has no part in a target: a second or two less of importing it, where that holds for all."""
        return target.plain or (self.kernels and target.packed)

    def _work(self, device: str) -> None:
        self.desk.device = device
        try:
            with ExitStack() as stack:
                if self.with_torch:
                    stack.enter_context(_torch_on(device))
                while not self.stopped.is_set():
                    with self.lock:
                        if self.next == len(self.left):
                            return
                        job = self.left[self.next]
                        ahead = self.left[self.next + _AHEAD : self.next + _AHEAD + 1]
                        self.next += 1
                        self.what = job.target.name
                    for coming in ahead:
                        first, last = coming.target.blocks[coming.first][0], coming.target.blocks[coming.last - 1][1]
                        self.link.expect(coming.target.name, first, last)
                    if job.piece is None:
                        self._measure(job)
                    else:
                        self._write(job, job.piece)
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
            self.stopped.set()

    def _measure(self, job: Job) -> None:
        target = job.target
        if not self.surveys[target.name].wait(job.turn, self.stopped):
            return
        found = {}
        wanted = target.measures[job.turn]
        for block in range(job.first, job.last):
            if self._from_bytes(target):
                found[block] = [self.packed.measure(one, target, block) for one in wanted]
                continue
            self.desk.start(target.name, target.passes - job.turn)
            first, last = target.blocks[block]
            found[block] = [one.link.measure(one.source, one.turn, first, last) for one in wanted]
        self.surveys[target.name].add(job.turn, found)

    def _write(self, job: Job, piece: Piece) -> None:
        target = job.target
        if not self.surveys[target.name].wait(job.turn, self.stopped):
            return
        offset = 0
        sums = [0.0, 0.0]
        for block in range(job.first, job.last):
            if target.copied:
                view = self.packed.copy(target, block) if target.plain else self._copy(target, block)
            else:
                view, kept, intended = self._made(target, block)
                sums[0] += kept
                sums[1] += intended
            self.writer.write(piece, offset, view)
            offset += len(view)
        facts = None if target.copied else sums
        self.writer.finish(piece, facts)
        with self.lock:
            self._keep(job, facts)
            self.done += piece.end - piece.start
            self.unwritten[target.name] -= 1
            if not self.unwritten[target.name]:
                self.kept.drop(target.name)

    def _made(self, target: Target, block: int) -> tuple[memoryview, float, float]:
        """The bytes of one block, and its gain sums."""
        if self._from_bytes(target):
            view, kept, intended = self.packed.compute(target, block)
            if math.isfinite(kept + intended):
                return view, kept, intended
            # Something is not finite: what that means is decided in one place.
        self.desk.start(target.name)
        return self._compute(target, block)

    def _copy(self, target: Target, block: int) -> memoryview:
        import torch

        (checkpoint, name), (first, last) = target.leaf, target.blocks[block]
        if target.slot.dtype == checkpoint.info(name).dtype:
            return memoryview(checkpoint.read_bytes(name, first, last).numpy())
        rows = checkpoint.read_rows(name, first, last)
        if rows.dtype != torch.float64:
            rows = rows.float()
        return _bytes_of(self._round(target, rows, first))

    def _compute(self, target: Target, block: int) -> tuple[memoryview, float, float]:
        (checkpoint, name), (first, last) = target.leaf, target.blocks[block]
        base = checkpoint.rows_on(self.desk, name, first, last)  # first, so that the ops find it read
        merged = self.link.rows(target.name, first, last)
        rounded, kept, intended = self._rounded(target, base, merged, first)
        # The sums are finite when all values are.
        if self.link.op.nan == "error":
            if not math.isfinite(kept + intended) and not is_finite(rounded.float()):
                rounded = self._only_shared_infinities(target, rounded, base, first, last)
            elif target.hides:
                for _, held, own in self.link.files(target.name):
                    if not is_finite(held.rows(own, first, last)):
                        raise self._not_finite(target, base, first, last)
        return _bytes_of(rounded), kept, intended

    def _rounded(self, target: Target, base: Tensor, merged: Tensor, first: int) -> tuple[Tensor, float, float]:
        """Rows in the output's dtype, and their gain sums."""
        if self.kernels and target.slot.dtype == "BF16" and self.link.op.rounding == "nearest":
            rounded, kept, intended = round_packed(base, merged)
            if math.isfinite(kept + intended):  # Else the bits of NaN are to be torch's.
                return rounded, kept, intended
        rounded = self._round(target, merged, first)
        return rounded, *gain_sums(base, merged, rounded)

    def _round(self, target: Target, rows: Tensor, first: int) -> Tensor:
        op, ctx = self.link.op, self.link.ctx
        offset = first * (target.elements // max(target.slot.shape[0] if target.slot.shape else 1, 1))
        return round_to(rows, dtypes.torch_dtype(target.slot.dtype), op.rounding, ctx.seed, target.name, offset)

    def _only_shared_infinities(self, target: Target, rounded: Tensor, base: Tensor, first: int, last: int) -> Tensor:
        """The output with the infinities that all models share, as clamp bounds are; others, and NaN, are an error."""
        import torch

        shared = base.isinf()
        for _, held, own in self.link.files(target.name):
            if isinstance(held, Weights):
                shared = shared & (held.rows(own, first, last) == base)
        if bool((~torch.isfinite(rounded) & ~shared).any()):
            raise self._not_finite(target, base, first, last)
        return torch.where(shared, base.to(rounded.dtype), rounded)

    def _not_finite(self, target: Target, base: Tensor, first: int, last: int) -> StepError:
        where = self.link.ctx.where
        found = [(ref, held, own, held.rows(own, first, last)) for ref, held, own in self.link.files(target.name)]
        for ref, held, own, rows in sorted(found, key=lambda each: not not_finite(each[3], base)):
            if not is_finite(rows):
                what = f"{own} of {ref} ({held.file(own)}) holds NaN or infinity"
                mend = "That input is damaged: make or fetch it again. `nan: keep` takes it as it is."
                return StepError(what, where=where, mend=mend)
        what = f"{target.name} does not fit into {dtypes.torch_name(target.slot.dtype)}: some values become infinite"
        return StepError(what, where=where, mend="Lower the scale, or set dtype: bfloat16 or float32.")


def _bytes_of(rows: Tensor) -> memoryview:
    import torch

    return memoryview(rows.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One intra-op thread for each of ours: more would compete, and change the order of sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _torch_on(device: str) -> Iterator[None]:
    """torch for a thread: no gradients; on a GPU a stream of its own, so that its copies run beside others' kernels."""
    import torch

    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device.startswith("cuda"):
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        yield
