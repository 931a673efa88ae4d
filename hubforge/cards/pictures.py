"""The pictures of a card: results against the baseline; of masks, importance and energy per layer, histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from hubforge.cards.lineage import Lineage
from hubforge.cards.numbers import fixed, share, short
from hubforge.cards.results import difference, metrics_of, places, verdict
from hubforge.cards.svg import Picture, fit, text_width, tick_labels, ticks
from hubforge.release import MetricRecord

WIDTH = 860.0
_PAD = 20.0


def results_picture(lineage: Lineage, entry: str) -> str:
    """Each metric of that entry as a dot with its 95 % interval, the baseline as a hollow one; "" without a baseline.

    Neighbouring metrics of one eval and unit share an axis, so that their distances compare.
    """
    metrics = [metric for metric in metrics_of(lineage, entry) if metric.baseline_value is not None and _finite(metric)]
    if not metrics:
        return ""
    name = lineage.target.repo.rsplit("/", 1)[-1]
    picture = Picture(WIDTH, f"{name} against the baseline", _in_words(metrics))
    label_width = min(270.0, max(text_width(metric.metric) for metric in metrics) + 8)
    note_width = max(text_width(_note(metric), bold=True) for metric in metrics) + 8
    left, right = _PAD + label_width + 14, WIDTH - _PAD - note_width - 14
    y = _legend(picture, metrics, name)
    for (eval_name, unit), members in groupby(metrics, key=lambda metric: (metric.eval, _scale(metric))):
        y = _panel(picture, list(members), eval_name, unit, y, left, right)
    picture.height = y + 8
    return picture.render()


def importance_picture(layers: Sequence[Mapping[str, Any]], title: str) -> str:
    """A bar per layer: its share of the summed importance; "" when no layer has a sum."""
    sums = [(str(layer.get("layer", index)), _float(layer.get("sum"))) for index, layer in enumerate(layers)]
    total = sum(value for _, value in sums if value is not None)
    if not total > 0:
        return ""
    bars = [(name, 100 * value / total) for name, value in sums if value is not None]
    top = max(bars, key=lambda bar: bar[1])
    words = (
        f"Share of the summed importance of each of {len(bars)} layers; layer {top[0]} has most, {share(top[1] / 100)}."
    )
    return _bars(bars, title, "share of the summed importance", words, " %", style="bar")


def energy_picture(layers: Sequence[Mapping[str, Any]], title: str) -> str:
    """A bar per layer: the mean energy its subspaces capture, with a line from least to most; "" when unknown."""
    bars: list[tuple[str, float]] = []
    ranges: dict[str, tuple[float, float]] = {}
    for index, layer in enumerate(layers):
        name, energy = str(layer.get("layer", index)), layer.get("energy_captured", layer.get("energy"))
        spread = energy if isinstance(energy, Mapping) else {"mean": energy}
        mean, low, high = (_float(spread.get(key)) for key in ("mean", "min", "max"))
        if mean is None:
            continue
        bars.append((name, 100 * mean))
        if low is not None and high is not None:
            ranges[name] = (100 * low, 100 * high)
    if not bars:
        return ""
    mean = sum(value for _, value in bars) / len(bars)
    words = f"Energy captured in each of {len(bars)} layers, {mean:.3g} % on average."
    label = "energy captured, mean of the layer's matrices" + (" (line: least to most)" if ranges else "")
    return _bars(bars, title, label, words, " %", style="bar2", ranges=ranges, limit=100.0)


def gate_picture(layers: Sequence[Mapping[str, Any]], title: str) -> str:
    """A bar per layer: the mean importance of its weights, or its own; "" when the mask is no gate."""
    bars: list[tuple[str, float]] = []
    for index, layer in enumerate(layers):
        value = _float(layer.get("gate", layer.get("importance")))
        if value is not None:
            bars.append((str(layer.get("layer", index)), value))
    if not bars:
        return ""
    top = max(bars, key=lambda bar: bar[1])
    words = f"Importance of each of {len(bars)} layers, from 0 to 1; layer {top[0]} is spared most, {short(top[1])}."
    return _bars(bars, title, "importance: 0 changes in full, 1 not at all", words, "", style="bar", limit=1.0)


def histogram_picture(histogram: object, title: str) -> str:
    """How many weights have which value: a gate's in equal steps from 0 to 1, or a Fisher's by powers of ten."""
    if isinstance(histogram, Mapping):
        found = [(f"1e{decade}", _float(number)) for decade, number in histogram.items()]
        axis, label = "order of magnitude", "share of the weights whose importance is of this order"
    elif isinstance(histogram, (list, tuple)):
        steps = max(len(histogram), 1)
        found = [(f"{index / steps:.2g}", _float(number)) for index, number in enumerate(histogram)]
        axis, label = "importance, from this value on", "share of the weights that a change reaches this little"
    else:
        return ""
    counts = [(name, number) for name, number in found if number is not None]
    total = sum(number for _, number in counts)
    if not total > 0:
        return ""
    bars = [(name, 100 * number / total) for name, number in counts]
    top = max(bars, key=lambda bar: bar[1])
    words = f"Histogram of the importance of {total:.3g} weights; {share(top[1] / 100)} of them at {top[0]}."
    return _bars(bars, title, label, words, " %", style="bar", limit=100.0, axis=axis)


def _panel(
    picture: Picture, metrics: list[MetricRecord], eval_name: str, unit: str, y: float, left: float, right: float
) -> float:
    """One axis and its metrics, from y down; the y where the next may begin."""
    ends = [value for metric in metrics for value in _extent(metric)]
    low, high = min(ends), max(ends)
    if not low < high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    marks = ticks(low, high)
    low, high = marks[0], marks[-1]
    picture.text(_PAD, y + 14, fit(eval_name, left - _PAD - 10, bold=True), "ink strong")
    if unit and unit != "share":
        picture.text(right, y + 14, fit(unit, right - left, 11), "dim small", "end")
    top, row = y + 26, 30.0
    bottom = top + row * len(metrics)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for mark, label in zip(marks, tick_labels(marks), strict=True):
        picture.line(at(mark), top, at(mark), bottom, "line")
        picture.text(at(mark), bottom + 15, label, "dim small", "middle")
    picture.line(left, bottom, right, bottom, "axis")
    for index, metric in enumerate(metrics):
        middle = top + row * (index + 0.5)
        style = _style(metric)
        picture.text(left - 12, middle + 4.5, fit(metric.metric, left - _PAD - 14), "ink", "end")
        baseline = at(metric.baseline_value) if metric.baseline_value is not None else None
        if metric.low is not None and metric.high is not None:
            picture.line(at(metric.low), middle, at(metric.high), middle, f"{style} whisker")
            for end in (metric.low, metric.high):
                picture.line(at(end), middle - 4, at(end), middle + 4, f"{style} whisker")
        if baseline is not None:
            picture.circle(baseline, middle, 5.5, "hollow whisker")
        picture.circle(at(metric.value), middle, 5, style)
        picture.text(right + 14, middle + 4.5, _note(metric), "ink strong" if metric.significant else "dim")
    return bottom + 30


def _legend(picture: Picture, metrics: list[MetricRecord], name: str) -> float:
    """What the marks mean, at the top; the y below it."""
    baselines = list(dict.fromkeys(metric.baseline for metric in metrics if metric.baseline))
    baseline = f"baseline: {baselines[0]}" if len(baselines) == 1 else "baseline"
    y = 28.0
    has_intervals = any(metric.low is not None for metric in metrics)
    words = fit(name, 300, bold=True) + (", 95 % interval" if has_intervals else "")
    if has_intervals:
        picture.line(_PAD, y - 4.5, _PAD + 24, y - 4.5, "plain whisker")
    picture.circle(_PAD + 12, y - 4.5, 5, "plain")
    picture.text(_PAD + 34, y, words, "ink")
    x = _PAD + 34 + text_width(words, bold=True) + 28
    picture.circle(x, y - 4.5, 5.5, "hollow whisker")
    picture.text(x + 14, y, fit(baseline, 200), "ink")
    x += 14 + text_width(fit(baseline, 200)) + 28
    if any(_style(metric) != "plain" for metric in metrics):
        picture.circle(x, y - 4.5, 5, "good")
        picture.text(x + 12, y, "better", "ink")
        picture.circle(x + 78, y - 4.5, 5, "bad")
        picture.text(x + 90, y, "worse", "ink")
    return y + 16


def _bars(
    bars: list[tuple[str, float]],
    title: str,
    label: str,
    words: str,
    unit: str,
    *,
    style: str,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    limit: float | None = None,
    axis: str = "layer",
) -> str:
    """Upright bars over the layers' numbers, or whatever `axis` says they stand for."""
    ranges = ranges or {}
    highest = max([value for _, value in bars] + [high for _, high in ranges.values()])
    marks = [mark for mark in ticks(0.0, highest) if limit is None or mark <= limit * 1.001]
    labels = tick_labels(marks, unit)
    picture = Picture(WIDTH, title, words)
    picture.text(_PAD, 28, fit(title, WIDTH - 2 * _PAD, 14, bold=True), "ink title")
    picture.text(_PAD, 48, label, "dim small")
    left, right = _PAD + max(text_width(item, 11) for item in labels) + 8, WIDTH - _PAD
    top, bottom = 64.0, 264.0
    tallest = max(marks[-1], highest)

    def at(value: float) -> float:
        return bottom - value / tallest * (bottom - top)

    for mark, shown in zip(marks, labels, strict=True):
        picture.line(left, at(mark), right, at(mark), "axis" if mark == 0 else "line")
        picture.text(left - 6, at(mark) + 4, shown, "dim small", "end")
    slot = (right - left) / len(bars)
    wide = min(48.0, slot * 0.76)
    widest = max(text_width(name, 11) for name, _ in bars)
    every = max(1, math.ceil((widest + 8) / slot))
    for index, (name, value) in enumerate(bars):
        x = left + slot * (index + 0.5)
        picture.rect(
            x - wide / 2,
            at(value),
            wide,
            bottom - at(value),
            style,
            min(2.0, wide / 4),
            f"{name}: {short(value, 3)}{unit}",
        )
        if name in ranges:
            low, high = ranges[name]
            picture.line(x, at(low), x, at(high), "over")
        if index % every == 0:
            picture.text(x, bottom + 17, name, "dim small", "middle")
    picture.text((left + right) / 2, bottom + 36, axis, "dim small", "middle")
    picture.height = bottom + 48
    return picture.render()


def _note(metric: MetricRecord) -> str:
    """At the end of a row: "+0.042 better"."""
    change = difference(metric)
    return " ".join(part for part in (fixed(change, places(metric), sign=True), verdict(metric)) if part)


def _style(metric: MetricRecord) -> str:
    """Coloured only where the difference is not noise, as far as that is known."""
    return {"better": "good", "worse": "bad"}.get(verdict(metric), "plain")


def _scale(metric: MetricRecord) -> str:
    """What metrics on one axis have in common: their unit; shares of one go together; else each has its own axis."""
    if metric.unit:
        return metric.unit
    values = [metric.value, metric.baseline_value or 0.0]
    return "share" if all(0 <= value <= 1 for value in values) else ""


def _extent(metric: MetricRecord) -> list[float]:
    values = [metric.value, metric.baseline_value, metric.low, metric.high]
    return [value for value in values if value is not None and math.isfinite(value)]


def _finite(metric: MetricRecord) -> bool:
    return math.isfinite(metric.value) and math.isfinite(metric.baseline_value or 0.0)


def _in_words(metrics: Sequence[MetricRecord]) -> str:
    """The picture for those who cannot see it."""
    parts = [
        f"{metric.eval} {metric.metric}: {fixed(metric.value, places(metric))}, baseline "
        f"{fixed(metric.baseline_value, places(metric))} ({_note(metric)})"
        for metric in metrics
    ]
    return "; ".join(parts) + "."


def _float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
