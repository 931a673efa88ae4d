"""Run a TensorOp, or a chain of them, over whole checkpoints in bounded memory.

Lay out; then read, compute, round once and write blocks. What is computed is `chain.py`, what there is to do
`targets.py`, and how it is done `work.py`.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from hubforge.errors import StepError
from hubforge.op import Context, Metrics, TensorOp
from hubforge.processes import processors
from hubforge.tensors import dtypes, targets
from hubforge.tensors.chain import Computed, Link, fused_steps, open_chain, ops_from_base
from hubforge.tensors.chat_template import chosen_template
from hubforge.tensors.desk import Desk, Kept
from hubforge.tensors.inputs import Opened, Weights, started_from
from hubforge.tensors.layout import Layout
from hubforge.tensors.packed import has_kernels
from hubforge.tensors.quantised import Dequantised, without_quantisation
from hubforge.tensors.rounding import LOW, gain_metrics
from hubforge.tensors.side_files import check_side_files, copy_side_files, set_dtype
from hubforge.tensors.targets import Target, plan_jobs, plan_targets
from hubforge.tensors.towers import edited, keeps
from hubforge.tensors.work import Work
from hubforge.tensors.writer import Writer

_KEPT = 16  # the share of the memory that holds rows from a measuring pass to the next is 1 / _KEPT
_KEPT_OF_CHAIN = 4  # and where ops of a chain compute such rows, in float32


def run_tensor_op(
    op: TensorOp, ctx: Context, threads: int | None = None, devices: Sequence[str] | None = None
) -> Metrics:
    """Write the op's output, a folder that Transformers loads, under `ctx.out`; what was found out on the way.

    The ops of `ctx.fused` are computed in the same pass. Metrics: parameters, bytes, dtype, tensors, changed,
    largest_tensor, and gain (see `rounding.py`). The sha256 of each weight file, taken while it was written, goes to
    `ctx.sha256`. devices: those that share the tensors; by default what `ctx.settings` say.
    """
    devices = devices or find_devices(ctx.settings.device)
    apart = [type(each).__name__ for each in (op, *(inner.op for inner in fused_steps(ctx))) if not each.on_gpu]
    if apart and devices[0] != "cpu":
        ctx.note(f"computed on the CPU: {', '.join(apart)} is not known to work on a GPU")
        devices = ["cpu"]
    with ExitStack() as stack:
        kept = Kept(ctx.settings.memory // (_KEPT_OF_CHAIN if ctx.fused else _KEPT))
        desk = Desk(kept, shared=bool(ctx.fused))
        folder, ops = started_from(ctx, op.base_ref).path, ops_from_base(op, ctx)
        config = check_side_files(folder)
        link = open_chain(op, ctx, Opened(stack, desk))
        config = _edit(ops, link, config)  # What is wrong with the config must not wait for the end.
        if "auto_map" in config:
            ctx.warn("config.json names code of its own (auto_map): it is not copied, so the output may not load")
        wanted, layout = plan_targets(link)
        jobs = plan_jobs(wanted)
        ctx.out.mkdir(parents=True, exist_ok=True)
        writer = Writer(ctx.out, layout, [job.piece for job in jobs if job.piece], _identity(op, ctx, layout))
        stack.callback(writer.close)
        kernels = devices[0] == "cpu" and has_kernels(wanted)
        work = Work(link, writer, jobs, desk, kept, kernels=kernels)
        count = threads or _threads(wanted, link, ctx, len(devices), on_cpu=devices[0] == "cpu")
        work.run([devices[i % len(devices)] for i in range(count)])
        copy_side_files(
            folder,
            ctx.out,
            lambda config: _edit(ops, link, config),
            lambda file: all(keeps(each, file) for each in ops),
            link.inputs.vocabulary,
            chosen_template(op, ctx),
        )
        ctx.sha256.update(writer.complete())
        for inner in fused_steps(ctx):
            inner.metrics.update(_inner_metrics(link, inner.op))
    return _metrics(wanted, layout, work.gains(), ctx) | op.review(ctx)


def find_devices(wanted: str) -> list[str]:
    """The devices to compute on: the CPU unless another is asked for, all GPUs for `cuda`. StepError without any."""
    if wanted in ("auto", "cpu"):
        return ["cpu"]
    import torch

    kind, _, number = wanted.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= int(number or 0):
            raise StepError(f"there is no device {wanted}: {count} GPUs are found", mend="Leave --device out.")
        return [wanted] if number else [f"cuda:{i}" for i in range(count)]
    return [wanted]


def _threads(wanted: Sequence[Target], link: Link, ctx: Context, devices: int, *, on_cpu: bool) -> int:
    """As many threads as there are processors, fewer where that would take more memory than allowed.

    With GPUs three for each: one reads, one computes, one writes.
    """
    at_most = processors() if on_cpu else 3 * devices
    held = {target.name: target.elements * 4 * (target.inputs + 4) for target in wanted if _is_whole(target, link)}
    if not held:
        return at_most
    largest = max(held, key=lambda name: held[name])
    if held[largest] > ctx.settings.memory:
        needed, given = held[largest] / 2**30, ctx.settings.memory / 2**30
        ctx.warn(f"{largest} can only be merged as a whole: about {needed:.1f} GiB, more than --memory {given:.1f}GiB")
    return max(1, min(at_most, ctx.settings.memory // held[largest]))


def _is_whole(target: Target, link: Link) -> bool:
    return not target.copied and len(target.slot.shape) > 1 and link.whole(target.name)


def _identity(op: TensorOp, ctx: Context, layout: Layout) -> str:
    """All that the bytes depend on: a journal of anything else is not continued."""
    return json.dumps(
        {
            **_of_op(op, ctx),
            "headers": {file: f"{zlib.crc32(header):08x}" for file, header in layout.headers.items()},
            "blocks": [targets.BLOCK, targets.PIECE],
        },
        sort_keys=True,
    )


def _of_op(op: TensorOp, ctx: Context) -> dict[str, Any]:
    return {
        "op": f"{type(op).__module__}.{type(op).__qualname__}",
        "version": op.version,
        "fields": op.model_dump(mode="json", exclude=set(op.unkeyed)),
        "inputs": {ref: artifact.key for ref, artifact in sorted(ctx.inputs.items())},
        "fused": {ref: _of_op(inner.op, inner.ctx) for ref, inner in sorted(ctx.fused.items())},
        "seed": ctx.seed,
    }


def _edit(ops: Sequence[TensorOp], link: Link, config: dict[str, Any]) -> dict[str, Any]:
    first, plain = ops[0], isinstance(link.model(), Dequantised)
    for op in ops:
        config = edited(op, config)
        if op is first and plain:
            config = without_quantisation(config)
        if op is link.op and link.inputs.vocabulary:
            config = link.inputs.vocabulary.config(config)
        config = set_dtype(config, op.dtype) if op.dtype else config
    return config


def _metrics(
    wanted: Sequence[Target],
    layout: Layout,
    gains: Mapping[str, tuple[float, float]],
    ctx: Context,
) -> Metrics:
    sizes: Counter[str] = Counter()
    for target in wanted:
        sizes[target.slot.dtype] += target.slot.nbytes
    largest = max(wanted, key=lambda target: target.slot.nbytes).slot
    dtype = dtypes.torch_name(sizes.most_common(1)[0][0])
    gain = gain_metrics(gains)
    if gain.get("median", 1.0) < LOW:
        ctx.warn(
            f"rounding to {dtype} keeps {gain['median']:.0%} of the change (median over {gain['tensors']} tensors); "
            "`rounding: stochastic` or `dtype: float32` keeps it"
        )
    return {
        "parameters": sum(target.elements for target in wanted),
        "bytes": layout.nbytes,
        "dtype": dtype,
        "tensors": len(wanted),
        "changed": len(gains),
        "largest_tensor": {"name": largest.name, "bytes": largest.nbytes},
        "gain": gain,
    }


def _inner_metrics(link: Link, op: TensorOp) -> Metrics:
    """What can be said of an op that was computed in another's pass: it left no bytes, and rounded nothing."""
    for held in link.inputs.by_ref.values():
        if isinstance(held, Weights) and isinstance(held.checkpoint, Computed):
            inner = held.checkpoint.link
            if inner.op is op:
                outputs = inner.outputs.values()
                return {
                    "parameters": sum(output.info.elements for output in outputs),
                    "tensors": len(outputs),
                    "changed": sum(output.changed for output in outputs),
                }
            if found := _inner_metrics(inner, op):
                return found
    return {}
