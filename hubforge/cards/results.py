"""What was measured: one table per eval against its baseline, the same eval on everything else, and the gates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import code, prose, repo_link, text
from hubforge.cards.numbers import count, decimals, fixed, short
from hubforge.release import MetricRecord, StepRecord

Row = dict[str, str]
TO = "\N{EN DASH}"


@dataclass(frozen=True)
class EvalView:
    """One eval as the page shows it."""

    name: str
    op: str
    summary: str
    settings: tuple[str, ...]  # "`num_fewshot=0`"
    asked: str  # "200 prompts, 4 samples each", where that is one for all metrics; else a column of the rows
    on: str  # the entry that is measured: what this page publishes
    baseline: str
    rows: tuple[Row, ...]  # the published entry's metrics
    conditions: tuple[Row, ...]  # what the eval recorded of how it was run
    others: tuple[Row, ...]  # the same eval on whatever else was measured; one row per entry
    meanings: tuple[tuple[str, str], ...]  # metric -> sentence, both Markdown
    methods: tuple[tuple[str, str], ...]  # metrics, as Markdown -> how the intervals of their differences were computed
    compared: bool
    any_significant: bool


def verdict(metric: MetricRecord) -> str:
    """ "better", "worse", "not significant", "no change", "significant", or "" when it cannot be told."""
    change = difference(metric)
    if change is None:
        return ""
    if metric.significant is False:
        return "not significant"
    if change == 0:
        return "no change"
    if metric.higher_is_better is None:
        return "significant" if metric.significant else ""
    return "better" if (change > 0) == metric.higher_is_better else "worse"


def difference(metric: MetricRecord) -> float | None:
    """The value minus the baseline's, as recorded, else as far as both are known."""
    if metric.difference is not None:
        return metric.difference
    if metric.baseline_value is None or metric.baseline is None:
        return None
    return metric.value - metric.baseline_value


def places(metric: MetricRecord) -> int:
    """Decimals that fit the interval of this metric, or its size."""
    spread = None
    if metric.low is not None and metric.high is not None:
        spread = (metric.high - metric.low) / 2
    elif metric.difference_low is not None and metric.difference_high is not None:
        spread = (metric.difference_high - metric.difference_low) / 2
    if _is_share(metric):
        return max(3, decimals([], spread)) if spread else 3
    return decimals([metric.value, metric.baseline_value], spread)


def show_value(metric: MetricRecord) -> str:
    return fixed(metric.value, places(metric))


def show_interval(low: float | None, high: float | None, digits: int, *, sign: bool = False) -> str:
    """ "0.761–0.842"; with a sign, "−0.02 to +0.05", which a dash would blur. "" when either end is unknown."""
    if low is None or high is None:
        return ""
    first, last = fixed(low, digits, sign=sign), fixed(high, digits, sign=sign)
    return f"{first} to {last}" if sign or low < 0 else f"{first}{TO}{last}"


def show_difference(metric: MetricRecord, *, interval: bool = True) -> str:
    """ "↑ +0.042 **better**": the arrow says where the number went, the word whether that is good."""
    change = difference(metric)
    if change is None:
        return ""
    digits = places(metric)
    shown = fixed(change, digits, sign=True)
    arrow = "↑" if change > 0 else "↓" if change < 0 else "="
    parts = [arrow, shown]
    if interval and (between := show_interval(metric.difference_low, metric.difference_high, digits, sign=True)):
        parts.append(f"({between})")
    word = verdict(metric)
    if metric.significant is True and word:
        parts.append(f"**{word}**")
    elif word:
        parts[-1] += ","
        parts.append(word)
    return " ".join(parts)


def show_n(metric: MetricRecord) -> str:
    """ "128" prompts, or "10 × 4" prompts times samples; "" when unknown."""
    if metric.n <= 0:
        return ""
    return f"{count(metric.n)} × {metric.samples}" if metric.samples > 1 else count(metric.n)


def metrics_of(lineage: Lineage, on: str, eval_name: str | None = None) -> tuple[MetricRecord, ...]:
    """What was measured on that entry, in the release's order."""
    return tuple(
        metric
        for metric in lineage.release.metrics
        if metric.on == on and (eval_name is None or metric.eval == eval_name)
    )


def eval_views(lineage: Lineage) -> tuple[EvalView, ...]:
    """Every eval that measured what is published, in the order the evals ran."""
    views: list[EvalView] = []
    for name in _unique(metric.eval for metric in lineage.release.metrics):
        measured = [entry for entry in lineage.entries if metrics_of(lineage, entry, name)]
        if lineage.target.kind in ("model", "adapter") and measured:
            views.append(_view(lineage, name, measured[0]))
    return tuple(views)


def _view(lineage: Lineage, name: str, on: str) -> EvalView:
    metrics = metrics_of(lineage, on, name)
    step = eval_step(lineage, name, on)
    baselines = _unique(metric.baseline for metric in metrics if metric.baseline)
    baseline = baselines[0] if len(baselines) == 1 else ""
    asked = asked_of(metrics)
    rows = tuple(_row(metric, baseline) | ({} if asked else _asked(metric, metrics)) for metric in metrics)
    return EvalView(
        name=name,
        op=step.op if step else "",
        summary=step.summary if step else "",
        settings=settings_of(step) if step else (),
        asked=asked,
        on=on,
        baseline=baseline,
        rows=rows,
        conditions=tuple(conditions_of(step)) if step else (),
        others=_others(lineage, name, on, metrics),
        meanings=meanings_of(metrics),
        methods=methods_of(metrics),
        compared=any(difference(metric) is not None for metric in metrics),
        any_significant=any(metric.significant for metric in metrics),
    )


def _row(metric: MetricRecord, baseline: str) -> Row:
    digits = places(metric)
    against = f"{fixed(metric.baseline_value, digits)}"
    if against and not baseline and metric.baseline:
        against += f" ({code(metric.baseline)})"
    return {
        "Metric": code(metric.metric) + (f", {text(metric.unit)}" if metric.unit else ""),
        "This model": f"**{show_value(metric)}**" if show_value(metric) else "",
        "95 % interval": show_interval(metric.low, metric.high, digits),
        f"Baseline {code(baseline)}" if baseline else "Baseline": against,
        "Difference": show_difference(metric),
    }


def _asked(metric: MetricRecord, metrics: Sequence[MetricRecord]) -> Row:
    samples = any(other.samples > 1 for other in metrics)
    return {"Prompts × samples" if samples else "Prompts": show_n(metric)}


def _others(lineage: Lineage, name: str, on: str, metrics: Sequence[MetricRecord]) -> tuple[Row, ...]:
    """One row per entry that the same eval measured, the published one among them, so that they compare."""
    rows: list[Row] = []
    shown = {metric.metric: places(metric) for metric in metrics}
    entries = _unique(metric.on for metric in lineage.release.metrics if metric.eval == name)
    baselines = {metric.baseline for metric in metrics}
    if not set(entries) - {on} - baselines:
        return ()
    for entry in entries:
        row = {"Measured on": f"**{code(entry)}**" if entry == on else code(entry), "What it is": what(lineage, entry)}
        found = {metric.metric: metric for metric in metrics_of(lineage, entry, name)}
        for key, digits in shown.items():
            row[code(key)] = fixed(found[key].value, digits) if key in found else ""
        rows.append(row)
    return tuple(rows)


def what(lineage: Lineage, entry: str) -> str:
    """In a few words, what an entry is: a link to its repository, "this model", or the op that made it. Markdown."""
    if entry in lineage.entries:
        return "this model" if lineage.target.kind == "model" else "in this repository"
    source = lineage.release.source(entry)
    if source:
        return repo_link(source.repo, source.kind, source.commit) if source.repo else f"local {source.kind}"
    step = lineage.release.step(entry)
    if step is None:
        return ""
    if target := lineage.published(step.name):
        return repo_link(target.repo)
    return f"made by {code(step.op)}"


def meanings_of(metrics: Sequence[MetricRecord]) -> tuple[tuple[str, str], ...]:
    """What each metric means and which way is better, as far as the release says; each metric once."""
    found: dict[str, str] = {}
    for metric in metrics:
        words = [prose(metric.meaning)] if metric.meaning else []
        if words and not words[0].endswith((".", "!", "?")):
            words[0] += "."
        if metric.higher_is_better is not None:
            words.append("Higher is better." if metric.higher_is_better else "Lower is better.")
        if words:
            found.setdefault(code(metric.metric), " ".join(words))
    return tuple(found.items())


def asked_of(metrics: Sequence[MetricRecord]) -> str:
    """ "541 prompts", or "10 prompts, 4 samples each", when all metrics are of as many; else ""."""
    if len({(metric.n, metric.samples) for metric in metrics}) != 1 or metrics[0].n <= 0:
        return ""
    prompts = f"{count(metrics[0].n)} prompt{'s' if metrics[0].n > 1 else ''}"
    return f"{prompts}, {metrics[0].samples} samples each" if metrics[0].samples > 1 else prompts


def methods_of(metrics: Sequence[MetricRecord]) -> tuple[tuple[str, str], ...]:
    """Which metrics' differences have an interval by which method."""
    methods = _unique(metric.method for metric in metrics if metric.method)
    return tuple((", ".join(code(m.metric) for m in metrics if m.method == method), method) for method in methods)


def settings_of(step: StepRecord) -> tuple[str, ...]:
    """The settings an eval ran with, as "`num_fewshot=0`": every field that is set and is no reference."""
    hidden = {"on", "baseline", *step.inputs}
    settings = []
    for name, value in step.fields.items():
        if name in hidden or value is None or value == "" or value == [] or value == {}:
            continue
        if isinstance(value, str) and value in step.inputs:
            continue
        items = value if isinstance(value, (list, tuple)) else [value]
        shown = ",".join(item if isinstance(item, str) else json.dumps(item, default=str) for item in items)
        settings.append(code(f"{name}={shown}"))
    return tuple(settings)


def conditions_of(step: StepRecord) -> list[Row]:
    """What an eval recorded of its conditions, nested facts by dotted names; digests cut to twelve digits."""
    recorded = step.metrics.get("conditions")
    rows: list[Row] = []

    def collect(facts: Mapping[str, Any], before: str) -> None:
        for name, value in facts.items():
            if isinstance(value, Mapping):
                collect(value, f"{before}{name}.")
            elif value is not None and value != "" and value != []:
                digest = name.endswith("sha256") and isinstance(value, str)
                rows.append({"Condition": code(before + name), "Value": show_field(value[:12] if digest else value)})

    if isinstance(recorded, Mapping):
        # The digest of each file of weights is in the table of files.
        collect({name: value for name, value in recorded.items() if name != "weights"}, "")
    return rows


def show_field(value: Any) -> str:
    """A field's value as Markdown: numbers plain, names as code, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return text(short(value, 6)) if isinstance(value, float) else count(value)
    if isinstance(value, dict):
        pairs = {key: show_field(item) for key, item in value.items() if item is not None}
        return ", ".join(f"{code(key)}: {shown}" for key, shown in pairs.items() if shown)
    if isinstance(value, (list, tuple)):
        return ", ".join(show_field(item) for item in value if item is not None)
    return code(value)


def eval_step(lineage: Lineage, name: str, on: str) -> StepRecord | None:
    """The step that measured that entry: `evals.ifeval/healed`, or `evals.ifeval` where it is not split."""
    return lineage.release.step(f"evals.{name}/{on}") or lineage.release.step(f"evals.{name}")


def gate_rows(lineage: Lineage) -> tuple[Row, ...]:
    """The gates on what is published (or on the model the quants are of), with how far each was from failing."""
    rows: list[Row] = []
    about = {"", *lineage.entries}
    if lineage.target.kind == "gguf":
        about |= {lineage.entry(name) for step in lineage.made for name in step.inputs.values()}
    for gate in lineage.release.gates:
        if gate.on not in about:
            continue
        digits = max(3, decimals([gate.value, gate.threshold]))
        rows.append(
            {
                "Gate": code(gate.text),
                "On": code(gate.on),
                "Measured": fixed(gate.value, digits),
                "Threshold": fixed(gate.threshold, digits),
                "Margin": fixed(gate.margin, digits, sign=True),
                "": "holds" if gate.holds else "**fails**",
            }
        )
    return tuple(rows)


def _is_share(metric: MetricRecord) -> bool:
    """Whether the metric looks like a share of one, for which three decimals are the custom."""
    values = [metric.value, metric.baseline_value]
    return metric.unit in ("", "share") and all(value is None or 0 <= value <= 1 for value in values)


def _unique(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))
