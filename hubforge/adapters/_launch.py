"""Who takes the steps of a training: this process, or several that it starts; and what is refused, with the reason."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hubforge.adapters._processes import in_processes, rank_here
from hubforge.errors import StepError
from hubforge.events import Report, silent
from hubforge.op import Context

if TYPE_CHECKING:
    from hubforge.adapters._trainer import Tables
    from hubforge.adapters._writing import Trained
    from hubforge.adapters.lora import Lora


def train_on_several(op: Lora, ctx: Context, tables: Tables, newest: Path | None) -> Trained:
    """What `op.train` returns in the first of `op.num_processes` processes that train together."""
    from hubforge.adapters._trainer import STATE

    # With the checkpoints, which go when all is done: a kill would leave it in a temporary folder.
    folder = ctx.out / STATE / "tables"
    shutil.rmtree(folder, ignore_errors=True)
    tables.save(folder)
    arguments = (op, replace(ctx, report=silent), folder, newest)
    made = in_processes(op.num_processes, _train, arguments, device=ctx.device, report=ctx.report, where=ctx.where)
    return cast("Trained", made)


def _train(op: Lora, ctx: Context, folder: Path, newest: Path | None, report: Report) -> Trained:
    """One process' part in it."""
    from hubforge.adapters._trainer import Tables

    device = "cpu" if ctx.device == "cpu" else f"cuda:{rank_here()}"
    own = replace(ctx, report=report, settings=replace(ctx.settings, device=device))
    return op.train(own, Tables.load(folder), newest)


def check_launch(op: Lora, ctx: Context) -> None:
    """Refuse what has not been shown to hold, and more processes than there are GPUs. Raises StepError."""
    _refuse_launchers(ctx.where)
    count = op.num_processes
    if count == 1 or ctx.device == "cpu":
        return
    if ctx.device != "cuda":
        what = f"num_processes is {count}, but {ctx.device} is one device"
        mend = "Set `num_processes: 1`, or run with `--device cuda`; CUDA_VISIBLE_DEVICES says which GPUs are used."
        raise StepError(what, where=ctx.where, mend=mend)
    import torch

    seen = torch.cuda.device_count()
    if seen < count:
        passes = count * op.gradient_accumulation_steps
        same = f" with `gradient_accumulation_steps: {passes // seen}`" if seen and passes % seen == 0 else ""
        what = f"num_processes is {count}, but {seen} GPU{'s are' if seen != 1 else ' is'} visible"
        mend = f"Each process needs its own. Set `num_processes: {max(1, seen)}`{same}, or run where there are {count}."
        raise StepError(what, where=ctx.where, mend=mend)


def _refuse_launchers(where: str) -> None:
    """Refuse to be one of several processes that something else started, and factors that are sharded."""
    several = int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")
    if sharded or deepspeed:
        what = f"op lora does not train under {'FSDP' if sharded else 'DeepSpeed'}"
        why = "Each process holds a slice of A and B there, and no slice can be projected by itself."
    elif several:
        what = "op lora starts its processes itself, and was started by a launcher of several"
        why = "Each of them would run the whole recipe and write the same artifacts."
    else:
        return
    mend = (
        f"{why} Run hubforge without `accelerate launch` or `torchrun`, and set `num_processes` to the number of GPUs; "
        "for less memory leave gradient_checkpointing on."
    )
    raise StepError(what, where=where, mend=mend)
