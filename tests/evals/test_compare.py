"""The statistics of the results table: by hand, beside scipy, and by how often they are right."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from hubforge.evals._compare import compare, interval, intervals, mcnemar, newcombe, t_quantile, weighted_mean, wilson


def lines(values: Sequence[float], metric: str = "m", **more: Any) -> list[dict[str, Any]]:
    return [{"task": "t", "doc_id": i, "metrics": {metric: value}, **more} for i, value in enumerate(values)]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4.5, 9, 29, 100, 540, 10_000])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_quantile_is_scipys(freedom: float, level: float) -> None:
    assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-10)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (300, 541)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen, Laake 2014, Stat. Med. 33:2850: airway responsiveness
    ],
)
def test_newcombe_gives_the_published_intervals(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert newcombe(*table) == pytest.approx((low, high), abs=5e-4)


def test_mcnemar_by_hand() -> None:
    # 1 of 8 changed prompts lost: (1 + 8) / 256 on each side, less half of the 8 / 256 just seen, twice.
    assert mcnemar(7, 1) == pytest.approx(2 * (9 - 4) / 256)
    assert mcnemar(7, 1) == mcnemar(1, 7)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3000, 2000) < 1e-40  # and no underflow to zero or below


def test_t_interval_by_hand() -> None:
    # Mean 2, s = 1, n = 3: half-width 4.3027 / √3.
    got = interval([1.0, 2.0, 3.0])
    assert got.value == 2.0
    assert got.high == pytest.approx(2 + 4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert got.method == "Student t over 3 prompts"


def test_a_single_prompt_has_a_value_and_no_interval() -> None:
    got = interval([0.3])
    assert (got.value, got.low, got.high) == (0.3, None, None)
    only = compare(lines([0.3]), lines([0.1]))["m"]
    assert (only.low, only.high, only.significant) == (None, None, None)
    same = compare(lines([0.3]), lines([0.3]))["m"]
    assert same.significant is False


def test_shares_take_wilsons_interval() -> None:
    got = interval([1.0] * 10)
    assert got.low == pytest.approx(0.7225, abs=1e-4)  # never zero width, as the mean of ten ones would have it
    assert got.high == 1.0


def test_weighted_mean_is_the_ratio_of_sums() -> None:
    # IFEval's instructions: 1 of 1 and 1 of 3 followed is 2 of 4, not the mean of 1 and 1/3.
    mean, error = weighted_mean([1.0, 1 / 3], [1.0, 3.0])
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(2 * (0.5**2 + 0.5**2)) / 4)


def test_equal_weights_give_the_plain_standard_error() -> None:
    values = [0.2, 0.9, 0.4, 0.7]
    assert weighted_mean(values, [3.0] * 4) == pytest.approx((0.55, stats.sem(values)), rel=1e-12)


def test_paired_differences_by_hand() -> None:
    # Differences 1, 2, 3 though the prompts themselves vary by hundreds: pairing is the whole point.
    got = compare(lines([101.0, 202.0, 303.0]), lines([100.0, 200.0, 300.0]))["m"]
    half = 4.302652729911275 / math.sqrt(3)
    assert (got.value, got.baseline, got.difference) == (202.0, 200.0, 2.0)
    assert (got.low, got.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert got.significant is False
    assert got.n == 3


def test_samples_of_a_prompt_are_averaged_before_prompts_are_counted() -> None:
    def thrice(values: Sequence[float]) -> list[dict[str, Any]]:
        return [{**line, "sample": k} for line in lines(values) for k in range(3)]

    once = compare(lines([1.0, 2.5, 3.0]), lines([0.0, 1.0, 1.0]))["m"]
    assert compare(thrice([1.0, 2.5, 3.0]), thrice([0.0, 1.0, 1.0]))["m"] == once
    got = intervals(thrice([1.0, 2.5, 3.0]))["m"]
    assert (got.n, got.samples) == (3, 3)


def test_shares_are_compared_by_what_changed() -> None:
    better, worse = [1.0] * 9 + [0.0], [0.0] * 9 + [0.0]
    got = compare(lines(better), lines(worse))["m"]
    assert got.difference == 0.9
    assert got.significant is True
    assert got.low is not None and 0 < got.low < 0.9 < (got.high or 0) <= 1
    assert "McNemar's mid-p = 0.002" in got.method
    same = compare(lines(better), lines(better))["m"]
    assert (same.difference, same.significant) == (0.0, False)


def test_rates_that_happen_to_be_zero_are_no_shares() -> None:
    zeros = lines([0.0] * 10, numbers=["m"])
    got, alone = compare(zeros, zeros)["m"], intervals(zeros)["m"]
    assert (got.difference, got.low, got.high, got.significant) == (0.0, None, None, False)
    assert (alone.value, alone.low, alone.high) == (0.0, None, None)
    some = lines([0.0] * 9 + [1.0], numbers=["m"])
    assert intervals(some)["m"].method == "Student t over 10 prompts"
    assert "Student t" in compare(some, zeros)["m"].method


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="m: 1 prompts were put to only one of the two models"):
        compare(lines([1.0, 2.0]), lines([1.0]))
    with pytest.raises(ValueError, match="2 prompts"):  # the same id, another text
        compare(lines([1.0], doc_hash="a"), lines([1.0], doc_hash="b"))


def test_reads_the_file_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines([0.5, 0.7])))
    assert intervals(tmp_path)["m"].value == pytest.approx(0.6)
    assert intervals(tmp_path / "samples.jsonl") == intervals(tmp_path)


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_the_interval_of_ten_prompts_covers(shape: str) -> None:
    """Of 95 % intervals of a true difference of 1, about 95 in 100 hold it, at ten prompts already."""
    draw = random.Random(0)
    hits = 0
    for _ in range(1000):
        base = [draw.gauss(0, 5) for _ in range(10)]
        noise = (lambda: draw.gauss(0, 1)) if shape == "normal" else (lambda: draw.expovariate(1) - 1)
        got = compare(lines([x + 1 + noise() for x in base]), lines(base))["m"]
        hits += got.low is not None and got.high is not None and got.low <= 1 <= got.high
    # Three standard errors of the count are 2 points; a skewed difference loses some coverage at n = 10.
    assert hits / 1000 == pytest.approx(0.95, abs=0.02 if shape == "normal" else 0.06)


def test_no_difference_is_rarely_called_one() -> None:
    draw = random.Random(1)
    false = 0
    for _ in range(1000):
        base = [float(draw.random() < 0.6) for _ in range(60)]
        other = [x if draw.random() < 0.7 else float(draw.random() < 0.6) for x in base]
        false += bool(compare(lines(other), lines(base))["m"].significant)
    assert false / 1000 <= 0.06
