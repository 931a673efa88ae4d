"""Run TRL's SFTTrainer on examples, with one callback: it guards the factors, measures, and marks checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.adapters._examples import Examples, tokens_of
from hubforge.adapters._processes import is_one_of_several, rank_here
from hubforge.errors import StepError
from hubforge.tensors.projection import summary, worst_held

if TYPE_CHECKING:
    from torch import Tensor

    from hubforge.adapters._guard import Guard
    from hubforge.adapters.lora import Lora
    from hubforge.op import Context

MEASURES = 20  # times the leak is measured in a run, evenly spread
WHOLE = "whole"  # the file that marks a checkpoint as complete
FINISHED = "finished"  # what it says when no step was left
STATE = "state"  # the folder of checkpoints under ctx.out


@dataclass
class Course:
    """How the training went: a row per step, the leak now and then, and the losses on what was held out."""

    steps: int
    epochs: float
    rows: list[dict[str, float]] = field(default_factory=list)  # step, loss, lr, grad_norm
    leaks: list[dict[str, Any]] = field(default_factory=list)
    eval: list[dict[str, float]] = field(default_factory=list)  # step, loss
    best_step: int | None = None
    stopped_early: bool = False
    seconds_per_step: float | None = None  # None when a resumed run had nothing left to do


@dataclass(frozen=True)
class Tables:
    """The examples as the trainer takes them: `datasets.Dataset`s, packed if the op packs."""

    train: Any
    held_out: Any  # None if nothing is

    @classmethod
    def of(cls, op: Lora, examples: Examples) -> Tables:
        from datasets import Dataset
        from trl.data_utils import pack_dataset

        def table(kept: list[Any]) -> Any:
            whole = Dataset.from_dict(tokens_of(kept))
            return pack_dataset(whole, op.max_length, "bfd") if op.packing else whole

        return cls(table(examples.train), table(examples.held_out) if op.eval_share else None)

    def save(self, folder: Path) -> None:
        """Put them where other processes can map them into memory, without a copy in each."""
        self.train.save_to_disk(folder / "train")
        if self.held_out is not None:
            self.held_out.save_to_disk(folder / "held_out")

    @classmethod
    def load(cls, folder: Path) -> Tables:
        from datasets import load_from_disk

        train, held_out = (
            load_from_disk(folder / name) if (folder / name).is_dir() else None for name in ("train", "held_out")
        )
        return cls(train, held_out)


def train(
    op: Lora,
    ctx: Context,
    model: Any,
    tokenizer: Any,
    tables: Tables,
    guard: Guard | None,
    rates: Mapping[str, float],
    newest: Path | None,
) -> Course:
    """Train the model's adapter in place, from a checkpoint if there is one, in this process and its peers if any.

    rates: the factor of the learning rate of each adapted module; those not named have 1.
    newest: the checkpoint to go on from.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        optimizer: Any

        def create_optimizer(self, model: Any = None) -> Any:
            """As the Trainer's own, but in groups of one learning rate each."""
            if self.optimizer is None:
                kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(_groups(self.model, rates, self.args), **settings)
            return self.optimizer

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """Checkpoints are not published."""

    patience = op.early_stopping_patience
    if newest is not None and is_finished(newest):
        return _take_up(model, newest, bool(patience))
    callback = make_callback(ctx, guard)
    trainer = Trainer(
        model=model,
        args=arguments(op, ctx, model),
        train_dataset=tables.train,
        eval_dataset=tables.held_out,
        processing_class=tokenizer,
        callbacks=[callback, *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if newest is not None:
        ctx.note(f"resumed after step {newest.name.rpartition('-')[2]}")
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    return _course(trainer.state, callback.seconds_per_step(), bool(patience))


def arguments(op: Lora, ctx: Context, model: Any) -> Any:
    """The trainer's settings, as the op's fields say."""
    from trl import SFTConfig

    cuda = ctx.device.startswith("cuda")
    evaluating = op.eval_share > 0
    settings: dict[str, Any] = {
        "output_dir": str(ctx.out / STATE),
        "num_train_epochs": op.num_train_epochs,
        "max_steps": op.max_steps or -1,
        "per_device_train_batch_size": op.per_device_train_batch_size,
        "per_device_eval_batch_size": op.per_device_train_batch_size,
        "gradient_accumulation_steps": op.gradient_accumulation_steps,
        "gradient_checkpointing": op.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if op.gradient_checkpointing else None,
        "learning_rate": op.learning_rate,
        "lr_scheduler_type": op.lr_scheduler_type,
        "warmup_steps": op.warmup_ratio,  # Below 1 it is a share of all steps.
        "weight_decay": op.weight_decay,
        "max_grad_norm": op.max_grad_norm,
        "optim": op.optim,
        "seed": op.seed,
        "data_seed": op.seed,
        "bf16": op.bf16 if op.bf16 is not None else cuda and str(model.dtype) == "torch.bfloat16",
        "packing": op.packing,
        "max_length": op.max_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # It would show NaN as the mean of what went before.
        "save_strategy": "steps",
        "save_steps": op.eval_steps if evaluating else op.save_steps,
        "save_total_limit": 2,  # The one before stays until the newest is marked whole.
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": ctx.device == "cpu",
        "dataloader_pin_memory": cuda,
        "tf32": False if cuda else None,  # Its 10 bits would leak.
    }
    if evaluating:
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": op.eval_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    if is_one_of_several():
        settings |= {
            "ddp_backend": "nccl" if cuda else "gloo",
            "ddp_find_unused_parameters": not reaches_all(model),  # A traversal of the graph at each pass.
            "ddp_broadcast_buffers": False,  # They are the frozen model's, and the same everywhere.
        }
    made = SFTConfig(**settings)
    if made.n_gpu > 1:
        made._n_gpu = 1  # One process trains on one device; without this the model would be copied to all of them.
    return made


def reaches_all(model: Any) -> bool:
    """Whether every trained factor has a part in the output, and so a gradient that data parallelism can wait for.

    Not where an expert of a mixture may be chosen by no token. One token tells: it goes to some of the experts only.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()  # Dropout would draw.
    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=trained[0].device)).logits.sum().backward()
    reached = all(parameter.grad is not None for parameter in trained)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return reached


def make_callback(ctx: Context, guard: Guard | None) -> Any:
    """The callback that holds the guard. The trainer clips, then asks it; steps, then asks it again."""
    import torch
    from transformers import TrainerCallback

    class Callback(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.began = 0.0
            self.first = self.last = 0

        def seconds_per_step(self) -> float | None:
            return round(self.spent / (self.last - self.first), 4) if self.last > self.first else None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            self.began, self.spent, self.first = time.monotonic(), 0.0, state.global_step
            self.every = max(1, state.max_steps // MEASURES)
            self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if rank_here() > 0:
                torch.manual_seed(args.seed + rank_here())  # Else dropout would be the same in all of them.
            if guard is not None and state.global_step == 0:
                with torch.no_grad():
                    guard.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if guard is not None:
                with torch.no_grad():
                    guard.before_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if guard is not None:
                with torch.no_grad():
                    guard.after_step()
            if is_one_of_several():
                _take_from_the_first(self.trained)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.last, self.spent = state.global_step, time.monotonic() - self.began
            due = state.global_step % self.every == 0 or state.global_step == state.max_steps
            if guard is not None and due and rank_here() == 0:
                found = summary(guard.leaks())
                if found:
                    state.log_history.append({"step": state.global_step, "leak": found})

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return
            _require_finite(state.global_step, logs)
            said = f"loss {float(logs['loss']):.3f}"
            measured = next((entry["leak"] for entry in reversed(state.log_history) if "leak" in entry), None)
            if measured and guard is not None:
                said += f", leak {worst_held(measured, guard.how):.1e}"
            ctx.progress(state.global_step, state.max_steps, "step", said)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
            ctx.note(f"step {state.global_step}: loss {metrics['eval_loss']:.4f} on what is held out")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if is_one_of_several():
                torch.distributed.barrier()  # Each writes the state of its own generators.
            if rank_here() == 0:
                over = control.should_training_stop or state.global_step >= state.max_steps
                marker = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE
                marker.write_text(FINISHED if over else "")

    return Callback()


def _take_from_the_first(trained: Sequence[Tensor]) -> None:
    """Give every process the factors of the first.

    All took the same step from the same gradients; but GPUs that differ round differently, and a checkpoint holds the
    factors and moments of the first alone. So a resumed run goes on from what an undisturbed one had.
    """
    import torch.distributed as dist

    for work in [dist.broadcast(parameter.detach(), 0, async_op=True) for parameter in trained]:
        work.wait()


def is_finished(checkpoint: Path) -> bool:
    """Whether that checkpoint is of a run with no step left."""
    return (checkpoint / WHOLE).read_text() == FINISHED


def newest_checkpoint(state: Path) -> Path | None:
    """The last checkpoint that was written whole; those that a kill cut short are removed."""
    found = sorted(state.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / WHOLE).is_file():
            shutil.rmtree(path)
    whole = [path for path in found if path.is_dir()]
    return whole[-1] if whole else None


def _take_up(model: Any, checkpoint: Path, stops_early: bool) -> Course:
    """Put the factors of a finished run on the model, the best if measured: the trainer would take one step more."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    # By its name alone: the store may have been moved since.
    best = checkpoint.parent / Path(state.best_model_checkpoint).name if state.best_model_checkpoint else checkpoint
    set_peft_model_state_dict(model, load_file(best / "adapter_model.safetensors"))
    return _course(state, None, stops_early)


def _groups(model: Any, rates: Mapping[str, float], args: Any) -> list[dict[str, Any]]:
    """The trained parameters in groups of one learning rate each, in the order they are met."""
    groups: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            groups.setdefault(rates.get(module, 1.0), []).append(parameter)
    return [
        {"params": parameters, "lr": args.learning_rate * rate, "weight_decay": args.weight_decay}
        for rate, parameters in groups.items()
    ]


def _require_finite(step: int, logs: Mapping[str, Any]) -> None:
    for name, said in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
        if name in logs and not math.isfinite(float(logs[name])):
            what = f"{said} is {float(logs[name])} at step {step}"
            mend = "Lower `learning_rate`, lengthen `warmup_ratio`, or look for damaged rows and weights."
            raise StepError(what, mend=mend)


def _course(state: Any, seconds: float | None, stops_early: bool) -> Course:
    course = Course(state.global_step, round(float(state.epoch or 0.0), 4), seconds_per_step=seconds)
    for entry in state.log_history:
        if "leak" in entry:
            # Sorted, as they come back from a checkpoint, so that a resumed run writes the same bytes.
            course.leaks.append({"step": entry["step"], **dict(sorted(entry["leak"].items()))})
        elif "eval_loss" in entry:
            course.eval.append({"step": entry["step"], "loss": entry["eval_loss"]})
        elif "loss" in entry:
            row = {"step": entry["step"], "loss": entry["loss"], "lr": entry["learning_rate"]}
            course.rows.append(row | ({"grad_norm": entry["grad_norm"]} if "grad_norm" in entry else {}))
    course.best_step = int(state.best_global_step) if course.eval and state.best_global_step else None
    course.stopped_early = stops_early and state.global_step < state.max_steps
    return course
