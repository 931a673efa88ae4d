"""The work of a merge, from headers alone: every tensor of the output, its blocks, and the jobs in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hubforge.tensors.chain import Link, Measure
from hubforge.tensors.layout import GB, Layout, Slot, lay_out
from hubforge.tensors.reader import Checkpoint, TensorInfo
from hubforge.tensors.writer import Piece, piece_of

BLOCK = 1 << 18  # elements computed at once: 1 MB of float32; fewer would cost more in calls than the cache gives back
LIGHT = 4  # blocks that make one where little is held beside the inputs
PRODUCT_ROWS = 256  # of a block for which factors are multiplied, where that makes no more than LIGHT blocks of it
PIECE = 32  # blocks written and journalled together


@dataclass(frozen=True)
class Target:
    """One tensor of the output: where to, in which blocks, and what must be measured of it first."""

    slot: Slot
    copied: bool
    packed: bool  # whether it can be made from its inputs' bytes by compiled kernels
    leaf: tuple[Checkpoint, str]  # the file's tensor that it starts from
    blocks: tuple[tuple[int, int], ...]  # rows [first, last)
    piece: int  # blocks of a piece
    measures: Sequence[Sequence[Measure]]  # pass by pass
    inputs: int  # tensors from files that have part in it
    hides: bool  # whether NaN in an input may not show in it

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def elements(self) -> int:
        return self.leaf[0].info(self.leaf[1]).elements

    @property
    def plain(self) -> bool:
        """Whether its bytes are those of a file."""
        checkpoint, name = self.leaf
        return self.copied and type(checkpoint) is Checkpoint and checkpoint.info(name).dtype == self.slot.dtype

    @property
    def passes(self) -> int:
        """How often its inputs are gone over, the writing included."""
        return len(self.measures) + 1


@dataclass(frozen=True)
class Job:
    """One thing for a thread to do: blocks [first, last) of a target, measured, or written as a piece."""

    target: Target
    first: int
    last: int
    piece: Piece | None  # None: measure
    turn: int = 0  # which pass


def plan_targets(link: Link) -> tuple[list[Target], Layout]:
    """Every tensor of the output and its place."""
    infos = {name: output.info for name, output in link.outputs.items()}
    layout = lay_out(((name, i.dtype, i.shape) for name, i in infos.items()), int(link.op.max_shard_size * GB))
    targets = []
    for name, slot in layout.slots.items():
        info, copied = infos[name], link.copied(name)
        times = LIGHT if copied or link.light(name) else 1
        if not copied and link.multiplies(name):
            times = max(times, min(-(-PRODUCT_ROWS * info.elements // (max(info.rows, 1) * BLOCK)), LIGHT))
        blocks = _blocks(info, info.rows if not copied and link.whole(name) else None, BLOCK * times)
        measures = [] if copied else link.measures(name)
        inputs = len(list(link.files(name)))
        piece = max(PIECE // times, 1)
        targets.append(
            Target(slot, copied, link.packed(name), link.leaf(name), blocks, piece, measures, inputs, link.hides(name))
        )
    return targets, layout


def _blocks(info: TensorInfo, rows: int | None, size: int) -> tuple[tuple[int, int], ...]:
    """Runs of `rows` rows; by default as many as have `size` elements, and never less than one. A vector is not cut."""
    if info.elements == 0:
        return ()
    if len(info.shape) < 2:  # A vector is one row to methods that work row by row.
        return ((0, info.rows),)
    step = rows or max(1, size * info.rows // info.elements)
    return tuple((first, min(first + step, info.rows)) for first in range(0, info.rows, step))


def plan_jobs(targets: Sequence[Target]) -> list[Job]:
    """The work, written in the order of the output's bytes; measuring a tensor stands before writing it.

    Each pass over a tensor is followed by the pass before it over the next tensor, so that a thread finds something
    to do while another finishes a pass.
    """
    longest = max((len(target.measures) for target in targets), default=0)
    jobs: list[tuple[int, Job]] = []
    for place, target in enumerate(targets):
        starts = range(0, len(target.blocks), target.piece)
        runs = [(first, min(first + target.piece, len(target.blocks))) for first in starts]
        early = place + longest - len(target.measures)
        jobs += [(early + turn, Job(target, *run, None, turn)) for turn in range(len(target.measures)) for run in runs]
        for number, (first, last) in enumerate(runs):
            piece = piece_of(target.slot, number, target.blocks[first][0], target.blocks[last - 1][1])
            jobs.append((place + longest, Job(target, first, last, piece, len(target.measures))))
    return [job for _, job in sorted(jobs, key=lambda timed: timed[0])]
