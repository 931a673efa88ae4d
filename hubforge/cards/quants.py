"""The GGUF page's table: each quant with its size, how far its logits are from the model's, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import code, link, text
from hubforge.cards.numbers import count, plain, share, size
from hubforge.cards.results import metrics_of, show_difference, show_value
from hubforge.release import File, StepRecord

Row = dict[str, str]


def quant_rows(lineage: Lineage) -> list[Row]:
    """One row per quant in the repository, in the recipe's order."""
    rows: list[Row] = []
    for step in quant_steps(lineage):
        file = gguf_file(step)
        facts = step.metrics
        rows.append(
            {
                "File": link(file.path, file.path) if file else code(step.entry),
                "Type": code(quant_type(step)),
                "Size": size(file.size if file else facts.get("bytes")),
                "Bits per weight": plain(facts.get("bits_per_weight")),
                "KL, mean": plain(_fact(facts, "kl_mean", "mean"), 2),
                "KL, 99th percentile": plain(_fact(facts, "kl_p99", "p99"), 2),
                "Top-1 agreement": share(_fact(facts, "top1", "top1")),
            }
        )
    return rows


def measured_rows(lineage: Lineage, eval_name: str) -> list[Row]:
    """One row per quant with the metrics of that eval, and the model they were made from where it was measured too."""
    rows: list[Row] = []
    entries = [(step.entry, code(quant_type(step))) for step in quant_steps(lineage)]
    entries += [(name, f"{code(name)}, the model itself") for name in originals(lineage)]
    for entry, label in entries:
        row = {"Type": label}
        for metric in metrics_of(lineage, entry, eval_name):
            change = show_difference(metric, interval=False)
            row[code(metric.metric)] = show_value(metric) + (f" ({change})" if change else "")
        if len(row) > 1:
            rows.append(row)
    return rows


def quant_evals(lineage: Lineage) -> list[tuple[str, list[Row], str]]:
    """Each eval of the quants: its name, its rows, and the baseline the differences are to. Markdown, but the name."""
    found: list[tuple[str, list[Row], str]] = []
    for name in dict.fromkeys(metric.eval for metric in lineage.release.metrics):
        quants = {step.entry for step in quant_steps(lineage)}
        own = [metric for metric in lineage.release.metrics if metric.eval == name and metric.on in quants]
        if own:
            baselines = list(dict.fromkeys(metric.baseline for metric in own if metric.baseline))
            found.append((name, measured_rows(lineage, name), ", ".join(code(one) for one in baselines)))
    return found


def quant_notes(lineage: Lineage) -> list[str]:
    """What the files were made and checked with, as far as the steps say: sentences of Markdown."""
    steps = quant_steps(lineage)
    notes: list[str] = []
    tools = [step.metrics.get(key) for key in ("converter", "quantizer", "runtime") for step in steps]
    named = list(dict.fromkeys(text(tool) for tool in tools if isinstance(tool, str) and tool))
    if named:
        notes.append(f"Made and checked with {', '.join(named)}.")
    strings = [step.metrics.get("strings") for step in steps if step.metrics.get("strings")]
    positions = [step.metrics.get("positions") for step in steps if step.metrics.get("positions")]
    if strings and positions and len(set(strings)) == len(set(positions)) == 1:
        notes.append(
            f"Each file gives the model's own token ids on {count(strings[0])} test strings; "
            f"its logits were compared with the model's at {count(positions[0])} positions."
        )
    for step in steps:
        fallbacks = step.metrics.get("fallbacks")
        if isinstance(fallbacks, (list, tuple)) and fallbacks:
            notes.append(
                f"{code(quant_type(step))} stores {count(len(fallbacks))} tensors in another type: "
                "their rows are no multiple of 256."
            )
    return notes


def prompt_format(lineage: Lineage) -> str:
    """The prompt format, where a step or the model's source states it: plain text, for a fence."""
    facts = [step.metrics for step in quant_steps(lineage)]
    facts += [source.facts for source in lineage.weights if source.kind == "model"]
    return next((str(found["prompt_format"]) for found in facts if found.get("prompt_format")), "")


def quant_steps(lineage: Lineage) -> tuple[StepRecord, ...]:
    return tuple(step for step in lineage.made if step.makes == "gguf")


def quant_type(step: StepRecord) -> str:
    """The quant's type: what the step reports, else the end of its entry name."""
    return str(step.metrics.get("type") or step.entry.rsplit("/", 1)[-1])


def gguf_file(step: StepRecord) -> File | None:
    """The quant's first .gguf file (a large one may be split), by the path it has in the repository."""
    return next((file for file in step.files if file.path.endswith(".gguf")), None)


def originals(lineage: Lineage) -> list[str]:
    """Entry names of the models that were quantized."""
    found = [
        lineage.entry(name)
        for step in quant_steps(lineage)
        for name in step.inputs.values()
        if lineage.kind(name) == "model"
    ]
    return list(dict.fromkeys(found))


def suggested(lineage: Lineage) -> StepRecord | None:
    """The quant for the page's examples: Q4_K_M, as most pages do, else the smallest."""
    steps = quant_steps(lineage)
    for step in steps:
        if quant_type(step) == "Q4_K_M":
            return step
    return min(steps, key=lambda step: sum(file.size for file in step.files), default=None)


def _fact(facts: Mapping[str, Any], flat: str, key: str) -> Any:
    """A fact kept flat ("kl_mean") or under "kl" ({"mean": ...})."""
    nested = facts.get("kl")
    return facts.get(flat, nested.get(key) if isinstance(nested, Mapping) else None)
