"""`breadcrumbs`: by hand, its laws, and against a sort in float64."""

import pytest
import torch

from hubforge.stages.breadcrumbs import Breadcrumbs
from hubforge.stages.task_arithmetic import TaskArithmetic


def test_the_largest_and_the_smallest_go(merge):
    delta = [1.0, -10.0, 3.0, 2.0, -4.0, 5.0, 6.0, -7.0, 8.0, 9.0]
    op = Breadcrumbs(base_model="m", models=["a"], density=0.5, gamma=0.1)
    # One of ten goes as an outlier, the next five stay.
    assert merge(op, {"m": [0.0] * 10, "a": delta}).tolist() == [0, 0, 0, 0, 0, 5.0, 6.0, -7.0, 8.0, 9.0]


def test_density_wins_over_gamma(merge):
    op = Breadcrumbs(base_model="m", models=["a"], density=0.75, gamma=0.5)
    assert merge(op, {"m": [0.0] * 4, "a": [1.0, 2.0, 3.0, 4.0]}).tolist() == [1.0, 2.0, 3.0, 0.0]


def test_density_one_is_task_arithmetic(merge, family):
    found = merge(Breadcrumbs(base_model="m", models=["a", "b"], weights=[0.5, 0.2]), family)
    expected = merge(TaskArithmetic(model="m", models=["a", "b"], weights=[0.5, 0.2]), family)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_against_a_sort_in_float64(merge, family):
    op = Breadcrumbs(base_model="m", models=["a", "c"], weights=[1.0, -0.4], density=0.3, gamma=[0.02, 0.1], scale=2)
    expected = family["m"].double().clone()
    for ref, weight, gamma in [("a", 1.0, 0.02), ("c", -0.4, 0.1)]:
        # The difference is taken in float32, as the op does: only then have both the same order.
        delta = (family[ref] - family["m"]).flatten().double()
        order = delta.abs().argsort(stable=True)
        last = delta.numel() - int(gamma * delta.numel())
        kept = torch.zeros_like(delta)
        chosen = order[last - int(0.3 * delta.numel()) : last]
        kept[chosen] = delta[chosen]
        expected += 2 * weight * kept.view(64, 48)
    torch.testing.assert_close(merge(op, family, rows=8), expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"), [({"density": 0}, r"must lie in \(0, 1\]"), ({"gamma": 1}, r"gamma must lie in \[0, 1\)")]
)
def test_wrong_shares(fields, message):
    with pytest.raises(ValueError, match=message):
        Breadcrumbs(base_model="m", models=["a"], **fields)


def test_what_is_kept_can_be_scaled_to_the_size_of_the_whole(merge):
    w = {"m": [0.0] * 4, "a": [8.0, -4.0, 2.0, 2.0]}
    # Without the largest and the two smallest -4 is left, of magnitudes that sum up to 16.
    op = Breadcrumbs(base_model="m", models=["a"], density=0.25, gamma=0.25, rescale=True)
    assert merge(op, w, rows=2).tolist() == [0.0, -16.0, 0.0, 0.0]
