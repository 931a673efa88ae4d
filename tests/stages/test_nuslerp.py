"""`nuslerp`: by hand, its laws, and against the textbook formula in float64."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.nuslerp import Nuslerp
from hubforge.stages.slerp import Slerp


def test_by_hand(merge):
    op = Nuslerp(models=["a", "b"])
    torch.testing.assert_close(merge(op, {"a": [1.0, 0.0], "b": [0.0, 1.0]}), torch.tensor([0.5**0.5] * 2))


def test_from_a_base(merge):
    op = Nuslerp(base_model="m", models=["a", "b"])
    merged = merge(op, {"m": [1.0, 1.0], "a": [2.0, 1.0], "b": [1.0, 2.0]})
    torch.testing.assert_close(merged, torch.tensor([1 + 0.5**0.5] * 2))


def test_of_whole_tensors_it_is_slerp(merge, family):
    expected = merge(Slerp(model="a", to="b", t=0.25), family)
    assert torch.equal(merge(Nuslerp(models=["a", "b"], weights=[3, 1]), family), expected)


@pytest.mark.parametrize("weights", [[1, 0], [0, 5]], ids=["first", "second"])
@pytest.mark.parametrize("along", ["tensor", "rows", "columns"])
def test_one_weight_alone_is_that_model(weights, along, merge, family):
    merged = merge(Nuslerp(models=["a", "b"], weights=weights, along=along), family)
    assert torch.equal(merged, family["a" if weights[0] else "b"])


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_each_row_or_column_has_its_own_arc(along, merge, family):
    merged = merge(Nuslerp(base_model="m", models=["a", "b"], weights=[0.7, 0.3], along=along), family, rows=9)
    one, two = (family[ref].double() - family["m"].double() for ref in "ab")
    if along == "columns":
        one, two, merged, base = one.T, two.T, merged.T, family["m"].T
    else:
        base = family["m"]
    for x, y, found, origin in zip(one, two, merged, base, strict=True):
        theta = torch.arccos(x @ y / (x.norm() * y.norm()))
        expected = (torch.sin(0.7 * theta) * x + torch.sin(0.3 * theta) * y) / torch.sin(theta) + origin
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)


def test_without_an_arc_it_goes_straight(merge):
    w = {"a": [[2.0, 4.0], [1.0, 0.0]], "b": [[4.0, 8.0], [0.0, 0.0]]}
    merged = merge(Nuslerp(models=["a", "b"], weights=[3, 1], along="rows"), w)
    torch.testing.assert_close(merged, torch.tensor([[2.5, 5.0], [0.75, 0.0]]))


def test_vectors_have_one_angle_whatever_it_is_taken_along(merge):
    w = {"a": [1.0, 2.0, 0.0], "b": [0.0, 1.0, 1.0]}
    expected = merge(Nuslerp(models=["a", "b"]), w)
    for along in ("rows", "columns"):
        assert torch.equal(merge(Nuslerp(models=["a", "b"], along=along), w), expected)


def test_weights_that_sum_to_zero(merge):
    with pytest.raises(StepError, match="sum to 0"):
        merge(Nuslerp(models=["a", "b"], weights=[1, -1]), {"a": [1.0, 0.0], "b": [0.0, 1.0]})


def test_two_models_exactly():
    with pytest.raises(ValueError, match="at most 2 items"):
        Nuslerp(models=["a", "b", "c"])
