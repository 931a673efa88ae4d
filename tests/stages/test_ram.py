"""`ram`: by hand, its laws, and against a loop in float64."""

import pytest
import torch

from hubforge.stages.ram import Ram
from hubforge.stages.task_arithmetic import TaskArithmetic


def test_alone_is_added_and_shared_is_averaged(merge):
    w = {"m": [1.0, 1.0, 1.0, 1.0], "a": [3.0, 1.0, 5.0, 1.0], "b": [1.0, 0.0, 3.0, 1.0]}
    assert merge(Ram(base_model="m", models=["a", "b"]), w).tolist() == [3.0, 0.0, 4.0, 1.0]


def test_changes_in_different_places_are_task_arithmetic(merge):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 8, generator=generator)
    a, b = base.clone(), base.clone()
    a[:4] += 1
    b[4:] -= 1
    w = {"m": base, "a": a, "b": b}
    expected = merge(TaskArithmetic(model="m", models=["a", "b"]), w)
    torch.testing.assert_close(merge(Ram(base_model="m", models=["a", "b"]), w), expected, rtol=0, atol=1e-6)


def test_against_a_loop_in_float64(merge, family):
    merged = merge(Ram(base_model="m", models=["a", "b", "c"], epsilon=0.1), family, rows=10)
    base = family["m"].double()
    deltas = [family[ref].double() - base for ref in "abc"]
    for i in range(0, 64, 9):
        for j in range(48):
            values = [float(delta[i, j]) for delta in deltas if abs(delta[i, j]) > 0.1]
            change = sum(values) / len(values) if values else 0.0
            assert merged[i, j].item() == pytest.approx(float(base[i, j]) + change, abs=1e-6)


def test_epsilon_is_not_negative():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Ram(base_model="m", models=["a"], epsilon=-1)
