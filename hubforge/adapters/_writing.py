"""Write a trained adapter as PEFT reads it, and beside it what is known of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubforge.adapters._guard import Factors
from hubforge.op import Context, Metrics
from hubforge.tensors import dtypes
from hubforge.tensors.adapter import WEIGHTS
from hubforge.tensors.adapter_config import CONFIG
from hubforge.tensors.projection import Leak, summary
from hubforge.tensors.writer import write_whole

if TYPE_CHECKING:
    from hubforge.adapters._examples import Examples
    from hubforge.adapters._trainer import Course
    from hubforge.adapters.lora import Lora

_POINTS = 200  # of the loss curve that goes into the manifest; loss.json has every step
_LAST = 10  # steps whose mean is the final loss
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Trained:
    """What is known of an adapter once it is written."""

    course: Course
    leaks: Mapping[str, Leak]
    modules: int
    parameters: int


def rounded(factors: Mapping[str, Factors], dtype: str) -> dict[str, Factors]:
    """The factors as the file will hold them, on the device they were on."""
    to = dtypes.torch_dtype(_DTYPES[dtype])
    return {name: Factors(part.a.detach().to(to), part.b.detach().to(to)) for name, part in factors.items()}


def write_adapter(
    ctx: Context, model: Any, factors: Mapping[str, Factors], dtype: str, base: str, commit: str | None
) -> None:
    """adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save

    tensors = {}
    for name, part in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = part.a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = part.b.cpu().contiguous()
    write_whole(ctx.out / WEIGHTS, save(tensors, {"format": "pt"}))
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "revision": commit, "inference_mode": True}
    write_whole(ctx.out / CONFIG, _json(config))


def write_reports(
    op: Lora,
    ctx: Context,
    examples: Examples,
    format: str,
    trained: Trained,
    base: str,
) -> Metrics:
    """loss.json, leak.json and training.json; the metrics of the step."""
    course, leaks = trained.course, trained.leaks
    origin = ctx.artifact(op.data).origin
    losses = [row["loss"] for row in course.rows]
    training = {
        "corpus": str(origin.get("repo") or op.data),
        "format": format,
        "samples": len(examples.train),
        "held_out": len(examples.held_out),
        "tokens": examples.tokens,
        "loss_tokens": examples.loss_tokens,
        "truncated": examples.truncated,
        "skipped": examples.skipped,
        "steps": course.steps,
        "epochs": course.epochs,
        "base": base,
        "projection": op.projection if op.protect else None,
    }
    write_whole(ctx.out / "training.json", _json({key: value for key, value in training.items() if value is not None}))
    write_whole(ctx.out / "loss.json", _json({"train": course.rows, "eval": course.eval}))
    metrics: Metrics = {
        **{name: training[name] for name in ("format", "samples", "held_out", "tokens", "loss_tokens")},
        "truncated": examples.truncated,
        "longest": examples.longest,
        "skipped": examples.skipped,
        "steps": course.steps,
        "epochs": course.epochs,
        "rank": op.rank,
        "modules": trained.modules,
        "parameters": trained.parameters,
        "loss": sum(losses[-_LAST:]) / len(losses[-_LAST:]),
        "curve": _thinned(course.rows),
        "seconds_per_step": course.seconds_per_step,
    }
    if course.eval:
        best = min(course.eval, key=lambda row: row["loss"])
        metrics |= {"eval_loss": best["loss"], "eval_curve": _thinned(course.eval), "best_step": course.best_step}
        metrics["stopped_early"] = course.stopped_early
    if op.protect is not None:
        metrics["leak"] = {"projection": op.projection, "strength": op.strength, **summary(leaks)}
        by_matrix = {name: {"left": one.left, "right": one.right, "core": one.core} for name, one in leaks.items()}
        write_whole(
            ctx.out / "leak.json",
            _json({**metrics["leak"], "dtype": op.save_dtype, "by_matrix": by_matrix, "while_training": course.leaks}),
        )
        _say(ctx, metrics["leak"])
    return metrics


def _say(ctx: Context, leak: Mapping[str, Any]) -> None:
    if "worst" not in leak:
        ctx.note("no protected matrix has changed")
        return
    means = f"on average {leak['mean_left']:.1e} of ‖ΔW‖ lies in U and {leak['mean_right']:.1e} in V"
    held = (
        f"; {leak['mean_core']:.1e} in both, at worst {leak['worst_core']:.1e}" if leak["projection"] == "core" else ""
    )
    ctx.note(f"leak: {means}; at worst {leak['worst']:.1e}, in {leak['worst_matrix']}{held}")


def _thinned(rows: list[dict[str, float]]) -> list[list[float]]:
    """(step, loss) pairs: the mean of each of at most so many equal stretches, at its last step."""
    size = max(1, -(-len(rows) // _POINTS))
    stretches = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [[part[-1]["step"], round(sum(row["loss"] for row in part) / len(part), 6)] for part in stretches]


def _json(value: Any) -> bytes:
    def plain(odd: Any) -> Any:
        return sorted(odd) if isinstance(odd, set) else str(getattr(odd, "value", odd))

    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False, default=plain) + "\n").encode("utf-8")
