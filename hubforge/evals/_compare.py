"""Is the difference real? Intervals of a metric, and of its difference to a baseline, from the values per prompt.

Plain Python: a card needs neither torch nor numpy. Values come from `samples.jsonl`, one line per prompt and sample:
{"task", "doc_id", "doc_hash", "sample", "metrics": {name: value}, "weights": {name: weight}, "numbers": [name]}, the
last being the metrics that are no yes or no even where all of them happen to be 0 or 1. Two models are compared prompt
by prompt, the k samples of a prompt averaged first: prompts are what varies independently, samples are not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Samples = Path | Sequence[Mapping[str, Any]]
LEVEL = 0.95
_Z = 1.959963984540054  # of the normal distribution, two-sided, at LEVEL


@dataclass(frozen=True)
class Interval:
    """A metric of one model, with its 95 % interval; no bounds where one prompt is all there is."""

    value: float
    low: float | None
    high: float | None
    n: int  # prompts
    samples: int  # per prompt
    method: str


@dataclass(frozen=True)
class Comparison:
    """A metric against a baseline, with the 95 % interval of the paired difference."""

    metric: str
    value: float
    baseline: float
    difference: float
    low: float | None
    high: float | None
    n: int
    significant: bool | None
    method: str


@dataclass(frozen=True)
class _Point:
    """A metric on one prompt: the mean over its samples, and how much the prompt counts (IFEval's instructions)."""

    value: float
    weight: float
    samples: int
    is_number: bool = False  # not a yes or no


def intervals(samples: Samples) -> dict[str, Interval]:
    """The 95 % interval of every metric of one model, by metric."""
    found = {}
    for metric, points in _by_prompt(samples).items():
        values = list(points.values())
        found[metric] = interval(
            [point.value for point in values],
            weights=[point.weight for point in values],
            samples=max(point.samples for point in values),
            is_number=any(point.is_number for point in values),
        )
    return found


def compare(samples: Samples, baseline: Samples) -> dict[str, Comparison]:
    """Every metric that both models have, compared prompt by prompt.

    Raises ValueError when the two were not asked the same prompts.
    """
    ours, theirs = _by_prompt(samples), _by_prompt(baseline)
    found = {}
    for metric in ours.keys() & theirs.keys():
        mine, other = ours[metric], theirs[metric]
        if mine.keys() != other.keys():
            alone = len(mine.keys() ^ other.keys())
            raise ValueError(f"{metric}: {alone} prompts were put to only one of the two models")
        pairs = [(mine[prompt], other[prompt]) for prompt in sorted(mine, key=repr)]
        found[metric] = _compare(metric, pairs)
    return {metric: found[metric] for metric in ours if metric in found}


def interval(
    values: Sequence[float], *, weights: Sequence[float] | None = None, samples: int = 1, is_number: bool = False
) -> Interval:
    """The mean of the values with its 95 % interval; without bounds where the values show no spread to tell one by.

    0/1 values of equal weight that are no numbers: Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22).
    Otherwise Student's t on the prompts, the mean weighted where weights differ (a ratio of sums; its error by
    linearisation, Cochran 1977, Sampling Techniques, 6.3). Raises ValueError on no values.
    """
    if not values:
        raise ValueError("no values to take an interval of")
    weights = weights or [1.0] * len(values)
    n = len(values)
    if not is_number and _is_even(weights) and all(value in (0.0, 1.0) for value in values):
        low, high = wilson(round(sum(values)), n)
        return Interval(sum(values) / n, low, high, n, samples, "Wilson score interval")
    mean, error = weighted_mean(values, weights)
    if not error:
        return Interval(mean, None, None, n, samples, "")
    half = t_quantile(n - 1) * error
    return Interval(mean, mean - half, mean + half, n, samples, f"Student t over {n} prompts")


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Σ w·x / Σ w and its standard error, prompts taken as independent; no error from a single prompt.

    With equal weights the error is s / √n.
    """
    n, total = len(values), math.fsum(weights)
    mean = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
    if n < 2:
        return mean, None
    squares = math.fsum((w * (x - mean)) ** 2 for w, x in zip(weights, values, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / total


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share: inside [0, 1], and of some width even at 0 of n and n of n."""
    p, z2 = successes / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """The mid-p value of McNemar's exact test: how surprising so uneven a split of the changed prompts is.

    Source: Fagerland, Lydersen, Laake 2013, BMC Med. Res. Methodol. 13:91, who prefer it to the exact p, which is
    too cautious.
    """
    n, few = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    exact = 2 * math.fsum(_binomial(n, i) for i in range(few + 1))
    mid = exact - _binomial(n, few)
    return min(1.0, mid)


def newcombe(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """The 95 % score interval of the difference of two paired shares, (gained - lost) / n.

    Source: Newcombe 1998, Stat. Med. 17:2635, method 10 (square and add, with the phi correction).
    """
    n = both + gained + lost + neither
    first, second = both + gained, both + lost  # successes of ours and of the baseline
    p1, p2 = first / n, second / n
    low1, high1 = wilson(first, n)
    low2, high2 = wilson(second, n)
    spread = first * (n - first) * second * (n - second)
    cross = both * neither - gained * lost
    if cross > n / 2:
        cross_corrected: float = cross - n / 2  # continuity, as the method has it
    else:
        cross_corrected = min(cross, 0)
    phi = cross_corrected / math.sqrt(spread) if spread else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = p1 - p2
    return difference - half(p1 - low1, high2 - p2), difference + half(high1 - p1, p2 - low2)


@cache
def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """The t for which Student's distribution with that many degrees of freedom holds `level` between -t and t."""
    if freedom <= 0:
        raise ValueError(f"{freedom} degrees of freedom")
    outside = 1 - level
    low, high = 0.0, 1.0
    while _t_outside(high, freedom) > outside:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _t_outside(middle, freedom) > outside:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _compare(metric: str, pairs: Sequence[tuple[_Point, _Point]]) -> Comparison:
    n = len(pairs)
    ours, theirs = [mine.value for mine, _ in pairs], [other.value for _, other in pairs]
    weights = [(mine.weight + other.weight) / 2 for mine, other in pairs]
    value, baseline = weighted_mean(ours, weights)[0], weighted_mean(theirs, weights)[0]
    is_number = any(point.is_number for pair in pairs for point in pair)
    if not is_number and _is_even(weights) and all(x in (0.0, 1.0) for x in (*ours, *theirs)):
        both, gained = _count(pairs, 1, 1), _count(pairs, 1, 0)
        lost, neither = _count(pairs, 0, 1), _count(pairs, 0, 0)
        low, high = newcombe(both, gained, lost, neither)
        p = mcnemar(gained, lost)
        # The interval and the test are two approximations: where they disagree, claim nothing.
        significant = p < 1 - LEVEL and not low <= 0 <= high
        method = f"Newcombe's interval for paired shares over {n} prompts; McNemar's mid-p = {p:.2g}"
        return Comparison(metric, value, baseline, value - baseline, low, high, n, significant, method)
    difference, error = weighted_mean([a - b for a, b in zip(ours, theirs, strict=True)], weights)
    if not error:  # one prompt, or the same difference on all: nothing to tell chance by
        return Comparison(metric, value, baseline, difference, None, None, n, None if difference else False, "")
    half = t_quantile(n - 1) * error
    low, high = difference - half, difference + half
    method = f"Student t on the paired differences of {n} prompts"
    return Comparison(metric, value, baseline, difference, low, high, n, not low <= 0 <= high, method)


def _count(pairs: Iterable[tuple[_Point, _Point]], mine: int, other: int) -> int:
    return sum(a.value == mine and b.value == other for a, b in pairs)


def _is_even(weights: Sequence[float]) -> bool:
    return max(weights) == min(weights)


def _by_prompt(samples: Samples) -> dict[str, dict[tuple[Any, ...], _Point]]:
    """For each metric, its point on each prompt."""
    values: dict[str, dict[tuple[Any, ...], list[tuple[float, float]]]] = {}
    numbers: set[str] = set()
    for line in read_samples(samples):
        numbers.update(line.get("numbers", ()))
        prompt = (line.get("task"), line["doc_id"], line.get("doc_hash"))
        for metric, value in line["metrics"].items():
            weight = line.get("weights", {}).get(metric, 1.0)
            values.setdefault(metric, {}).setdefault(prompt, []).append((float(value), float(weight)))
    return {
        metric: {prompt: _point(got, metric in numbers) for prompt, got in prompts.items()}
        for metric, prompts in values.items()
    }


def _point(got: Sequence[tuple[float, float]], is_number: bool) -> _Point:
    k = len(got)
    value, weight = math.fsum(value for value, _ in got) / k, math.fsum(weight for _, weight in got) / k
    return _Point(value, weight, k, is_number)


def read_samples(samples: Samples) -> Sequence[Mapping[str, Any]]:
    """The lines of a `samples.jsonl` (the file, or the folder it is in), or the given lines themselves."""
    if not isinstance(samples, Path):
        return samples
    path = samples / "samples.jsonl" if samples.is_dir() else samples
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _binomial(n: int, k: int) -> float:
    """Probability of k heads in n tosses. By logarithms: 2^-n underflows beyond n = 1074."""
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def _t_outside(t: float, freedom: float) -> float:
    """P(|T| > t). DLMF 8.17: the regularised incomplete beta function at ν/(ν + t²)."""
    return _beta_share(freedom / (freedom + t * t), freedom / 2, 0.5)


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, by I_x(a, b) = 1 - I_{1-x}(b, a)
        return 1 - _beta_share(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # Lentz's method: c and d are the ratios of neighbouring numerators and denominators.
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction / a
