"""`nearswap`: by hand, its laws, and against mergekit's weights in float64."""

import pytest
import torch

from hubforge.stages.nearswap import Nearswap


def test_no_element_moves_further_than_t(merge):
    w = {"m": [0.0, 0.0, 0.0, 1.0], "a": [0.3, -2.0, 2.0, 1.0]}
    assert merge(Nearswap(base_model="m", models=["a"], t=0.5), w).tolist() == [pytest.approx(0.3), -0.5, 0.5, 1.0]


def test_no_distance_is_the_base_and_a_large_one_the_other(merge, family):
    for t, ref in ((0, "m"), (100, "a")):
        assert torch.equal(merge(Nearswap(base_model="m", models=["a"], t=t), family), family[ref])


def test_against_mergekits_weights(merge, family):
    base, other = family["m"].double(), family["b"].double()
    weight = (0.05 / (base - other).abs().clamp(min=1e-6)).clamp(0, 1)
    expected = weight * other + (1 - weight) * base
    merged = merge(Nearswap(base_model="m", models=["b"], t=0.05), family, rows=9)
    torch.testing.assert_close(merged, expected.float(), rtol=0, atol=1e-6)


def test_t_may_follow_the_layers(merge):
    op = Nearswap(base_model="m", models=["a"], t=[0.0, 1.0])
    assert merge(op, {"m": [0.0], "a": [9.0]}, layer=1, known=5).tolist() == [0.25]


@pytest.mark.parametrize(
    ("fields", "message"), [({"t": -1}, "t is negative"), ({"t": 1, "models": ["a", "b"]}, "at most 1 item")]
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Nearswap(**{"base_model": "m", "models": ["a"]} | fields)
