"""`multislerp`: by hand, its laws, and against the published steps in float64."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.multislerp import Multislerp
from hubforge.stages.slerp import Slerp


def test_by_hand(merge):
    # Directions (1, 0) and (0, 1), lengths 2 and 4: 45 degrees, at length 3.
    w = {"a": [2.0, 0.0], "b": [0.0, 4.0]}
    torch.testing.assert_close(merge(Multislerp(models=["a", "b"]), w), torch.tensor([3 * 0.5**0.5] * 2))


def test_from_a_base(merge):
    w = {"m": [1.0, 1.0], "a": [3.0, 1.0], "b": [1.0, 5.0]}
    merged = merge(Multislerp(base_model="m", models=["a", "b"]), w)
    torch.testing.assert_close(merged, torch.tensor([1 + 3 * 0.5**0.5] * 2))


def test_two_of_one_length_are_slerp_half_way(merge, family):
    w = {ref: tensor / tensor.norm() for ref, tensor in family.items()}
    expected = merge(Slerp(model="a", to="b", t=0.5), w)
    torch.testing.assert_close(merge(Multislerp(models=["a", "b"]), w, rows=5), expected, rtol=1e-5, atol=1e-8)


def test_one_weight_alone_is_that_model(merge, family):
    merged = merge(Multislerp(models=["a", "b", "c"], weights=[0, 2, 0]), family)
    torch.testing.assert_close(merged, family["b"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", [None, "m"])
def test_against_the_published_steps(base, merge, family):
    weights = torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64)
    op = Multislerp(base_model=base, models=["a", "b", "c"], weights=weights.tolist(), normalize_weights=False)
    merged = merge(op, family, rows=10)
    origin = family["m"].double().flatten() * (base is not None)
    points = torch.stack([family[ref].double().flatten() - origin for ref in "abc"])
    norms = points.norm(dim=1, keepdim=True)
    units = points / norms
    mean = weights @ units
    mean = mean / mean.norm()
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    angle = tangent.norm() + 1e-8
    expected = (mean * angle.cos() + tangent * (angle.sin() / angle)) * (weights @ norms[:, 0]) + origin
    torch.testing.assert_close(merged, expected.float().view(64, 48), rtol=0, atol=2e-6)


def test_opposite_models(merge):
    w = {"a": [1.0, 2.0], "b": [-1.0, -2.0], "c": [0.0, 0.0]}
    assert merge(Multislerp(models=["a", "b"]), w).tolist() == [0.0, 0.0]
    with pytest.raises(StepError, match="the weighted mean of the directions is zero"):
        merge(Multislerp(models=["a", "b", "c"]), w)


def test_weights_that_sum_to_zero(merge):
    with pytest.raises(StepError, match="sum to 0"):
        merge(Multislerp(models=["a", "b"], weights=[1, -1]), {"a": [1.0], "b": [2.0]})
