"""The statistics of bench/protection.py, by hand."""

import importlib.util
import math
from pathlib import Path

import pytest

from hubforge.evals._compare import t_quantile

spec = importlib.util.spec_from_file_location("protection", Path(__file__).parent.parent / "bench" / "protection.py")
protection = importlib.util.module_from_spec(spec)
spec.loader.exec_module(protection)


def test_fieller_bounds_are_where_the_difference_stops_to_tell():
    saved, drop = [0.06, 0.11, 0.08, 0.05, 0.09], [0.12, 0.2, 0.15, 0.13, 0.16]
    ratio, low, high = protection.fieller(saved, drop)
    assert ratio == pytest.approx(sum(saved) / sum(drop))
    for bound in (low, high):
        rest = [s - bound * d for s, d in zip(saved, drop, strict=True)]
        mean = sum(rest) / 5
        error = math.sqrt(sum((r - mean) ** 2 for r in rest) / 4 / 5)
        assert abs(mean) / error == pytest.approx(t_quantile(4))
    assert low < ratio < high


def test_a_drop_that_may_be_zero_bounds_no_ratio():
    assert protection.fieller([0.1, 0.0, 0.1], [0.2, -0.1, 0.05])[0] == pytest.approx(4 / 3)
    assert math.isnan(protection.fieller([0.1, 0.0, 0.1], [0.2, -0.1, 0.05])[1])


def family(none: str, masked: str) -> dict:
    fields = {"gain": 1.0, "scale": 0.5, "leak": None, "kinds": {}}
    rows = [{"style": "prose", "variant": name, "answers": answers} | fields
            for name, answers in (("none", none), ("left-16", masked))]  # fmt: skip
    return {"seed": 0, "instruct": "1111111100", "rows": rows, "unreached": {"prose-with-projected-64": 2.5}}


def test_the_table_by_hand():
    """Of ten prompts instruct has 8; unmasked 4 and 6, so a drop of 3 on average; masked 7 and 7, so one of 1."""
    shown = protection.table([family("1111000000", "1111111000"), family("1111110000", "1111111000")])
    prose = shown.partition("**Prose**")[2].partition("**Dialogue**")[0]
    assert "| no mask | 0.50 | 1.00 |  | 0.500 | 30.0 [" in prose
    assert "| left-16 | 0.50 | 1.00 |  | 0.700 | 10.0 [10.0, 10.0] | 20.0 [" in prose
    assert "| 67 % |" in prose  # with two families no ratio is bounded
    assert "| projected-64 | | gain not reached: at most 2.50 | | | | | | 0 |" in prose
    assert "left-16" not in shown.partition("**Dialogue**")[2]
