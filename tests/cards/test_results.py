"""Results: directions, significance and rounding, each by hand."""

from __future__ import annotations

from typing import Any

import pytest

from hubforge.cards.lineage import Lineage
from hubforge.cards.making import step_views
from hubforge.cards.numbers import big_count, count, decimals, duration, fixed, plain, share, short, size
from hubforge.cards.results import asked_of, eval_views, gate_rows, methods_of, show_difference, verdict
from hubforge.release import MetricRecord, Release, TargetRecord


def metric(**more: Any) -> MetricRecord:
    return MetricRecord(**({"eval": "e", "on": "m", "metric": "x", "value": 1.0, "baseline": "b"} | more))


@pytest.mark.parametrize(
    ("difference", "higher", "significant", "expected"),
    [
        (0.1, True, True, "better"), (-0.1, True, True, "worse"), (0.1, False, True, "worse"),
        (-0.1, False, True, "better"), (0.1, True, None, "better"), (0.1, True, False, "not significant"),
        (0.1, None, True, "significant"), (0.1, None, None, ""), (0.0, True, None, "no change"),
        (None, True, None, ""),
    ],
)  # fmt: skip
def test_verdict(difference: float | None, higher: bool | None, significant: bool | None, expected: str) -> None:
    assert verdict(metric(difference=difference, higher_is_better=higher, significant=significant)) == expected


def test_the_arrow_follows_the_number_and_the_word_says_whether_that_is_good() -> None:
    fewer = metric(
        value=2.41, baseline_value=6.13, difference=-3.72, low=1.6, high=3.22, difference_low=-4.9,
        difference_high=-2.54, higher_is_better=False, significant=True,
    )  # fmt: skip
    assert show_difference(fewer) == "↓ −3.72 (−4.90 to −2.54) **better**"
    noise = metric(value=0.813, baseline_value=0.824, higher_is_better=True, significant=False)
    assert show_difference(noise) == "↓ −0.011, not significant"
    assert show_difference(metric(value=0.5, baseline_value=0.5)) == "= 0.000, no change"
    assert show_difference(metric(baseline=None)) == ""


def test_rows_of_the_rich_release(rich_release: Release) -> None:
    ifeval, style = eval_views(Lineage(rich_release, rich_release.targets[0]))
    assert ifeval.rows[0] == {
        "Metric": "`prompt_level_strict_acc`",
        "This model": "**0.813**",
        "95 % interval": "0.779–0.844",
        "Baseline `instruct`": "0.824",
        "Difference": "↓ −0.011 (−0.032 to +0.010), not significant",
    }
    assert (ifeval.asked, style.asked) == ("541 prompts", "10 prompts, 4 samples each")
    assert [row["Measured on"] for row in ifeval.others] == ["**`healed`**", "`instruct`", "`styled`", "`gguf/Q6_K`"]
    assert style.others == ()


def test_prompts_are_a_column_where_metrics_differ_in_them() -> None:
    metrics = [metric(metric="a", n=541), metric(metric="b", n=128)]
    assert asked_of(metrics) == "" and asked_of(metrics[:1]) == "541 prompts"
    target = TargetRecord(name="t", kind="model", repo="me/x", entries=("m",))
    release = Release(hubforge="1", name="x", recipe_file="x", recipe="x", metrics=metrics, targets=[target])
    (view,) = eval_views(Lineage(release, target))
    assert [row["Prompts"] for row in view.rows] == ["541", "128"]


def test_each_method_names_its_metrics() -> None:
    metrics = [metric(metric=name, method=method) for name, method in (("a", "t"), ("b", "Newcombe"), ("c", "t"))]
    assert methods_of(metrics) == (("`a`, `c`", "t"), ("`b`", "Newcombe"))


def test_gates_are_shown_where_they_belong(rich_release: Release) -> None:
    for index, rows in enumerate((1, 1, 0, 0)):
        assert len(gate_rows(Lineage(rich_release, rich_release.targets[index]))) == rows


def test_only_the_steps_behind_a_target_are_told(rich_release: Release) -> None:
    names = [[view.entry for view in step_views(Lineage(rich_release, target))] for target in rich_release.targets]
    assert names[0] == ["`importance`", "`core`", "`chat`", "`styled`", "`tuned`", "`healed`"]
    assert names[1] == [*names[0], "`gguf`"]
    assert names[2] == ["`importance`", "`core`", "`gate`"]
    assert names[3] == ["`core`", "`chat`"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(0), "0 B"), (size(999), "999 B"), (size(999_600), "1 MB"), (size(15_900_000_000), "15.9 GB"),
        (size(None), ""), (count(12500), "12 500"), (count(-3), "−3"), (count(None), ""),
        (big_count(7_996_156_490), "8 B"), (big_count(12_345_678), "12.3 M"), (big_count(18_234), "18.2 k"),
        (big_count(1234), "1 234"), (share(0.8712), "87.1 %"), (share(0.9991), "99.91 %"), (share(1.0), "100 %"),
        (plain(2e-5), "0.00002"), (plain(0.0263, 2), "0.026"), (plain(0), "0"), (plain(16.0), "16"),
        (plain(float("nan")), ""), (short(0.3), "0.3"), (short(1e-5), "1e−5"), (short(-2.5), "−2.5"),
        (fixed(-0.001, 2), "0.00"), (fixed(0.0, 2, sign=True), "0.00"), (fixed(1.5, 1, sign=True), "+1.5"),
        (fixed(float("inf"), 1), ""), (duration(0.44), "0.4 s"), (duration(43), "43 s"), (duration(59.9), "1 min"),
        (duration(725), "12 min 5 s"), (duration(12_000), "3 h 20 min"), (duration(0), ""),
    ],
)  # fmt: skip
def test_numbers(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ").replace("\u202f", " ") == expected


def test_decimals_follow_the_spread() -> None:
    assert decimals([0.81], 0.032) == 3
    assert decimals([512.0], 57) == 0
    assert decimals([2.41], 0.81) == 2
    assert decimals([12.5]) == 2
    assert decimals([430.0, 512.0]) == 0
