"""`ramplus_tl`: by hand, its laws, and against a loop in float64."""

import pytest
import torch

from hubforge.stages.ram import Ram
from hubforge.stages.ramplus_tl import RamplusTl


def test_by_hand(merge):
    w = {"m": [0.0, 0.0, 0.0, 0.0], "a": [1.0, 1.0, 2.0, 0.0], "b": [0.0, 0.0, 4.0, 4.0]}
    # a shares one change and has two alone: 1 + 0.5 * 1/2; b shares one and has one alone: 1 + 0.5 * 1, cut to 0.8.
    merged = merge(RamplusTl(base_model="m", models=["a", "b"], r=0.5, alpha=0.8), w)
    torch.testing.assert_close(merged, torch.tensor([1.25, 1.25, 3.0, 4 * 1.4]))


def test_without_making_up_it_is_ram(merge, family):
    fields = {"base_model": "m", "models": ["a", "b"], "epsilon": 0.1}
    expected = merge(Ram(**fields), family)
    torch.testing.assert_close(merge(RamplusTl(r=0, **fields), family), expected, rtol=0, atol=0)


def test_against_a_loop_in_float64(merge, family):
    op = RamplusTl(base_model="m", models=["a", "b", "c"], r=0.5, alpha=3, epsilon=0.1)
    merged = merge(op, family, rows=10)
    base = family["m"].double()
    deltas = [(family[ref] - family["m"]).double() for ref in "abc"]
    changed = torch.stack([delta.abs() > 0.1 for delta in deltas])
    several = changed.sum(0) > 1
    factors = [1 + 0.5 * min(int((c & several).sum()) / int((c & ~several).sum()), 3) for c in changed]
    for i in range(0, 64, 9):
        for j in range(48):
            values = [(float(d[i, j]), f) for d, f, c in zip(deltas, factors, changed, strict=True) if c[i, j]]
            if len(values) == 1:
                change = values[0][0] * values[0][1]
            else:
                change = sum(value for value, _ in values) / max(len(values), 1)
            assert merged[i, j].item() == pytest.approx(float(base[i, j]) + change, abs=2e-6)


def test_r_is_not_negative():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        RamplusTl(base_model="m", models=["a"], r=-1)
