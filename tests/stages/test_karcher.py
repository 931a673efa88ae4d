"""`karcher`: by hand, its laws, and the condition that makes it the mean."""

import math

import numpy as np
import pytest
import torch

from hubforge.stages.karcher import Karcher, mean_on_sphere
from hubforge.stages.slerp import Slerp


def test_half_way_at_the_mean_length(merge):
    # Directions at 0 and 90 degrees, lengths 2 and 4.
    merged = merge(Karcher(models=["a", "b"]), {"a": [2.0, 0.0], "b": [0.0, 4.0]})
    torch.testing.assert_close(merged, torch.tensor([3 * 0.5**0.5] * 2))


def test_on_a_circle_it_is_the_mean_angle(merge):
    angles = [0.1, 0.3, 1.4]
    w = {ref: [math.cos(angle), math.sin(angle)] for ref, angle in zip("abc", angles, strict=True)}
    merged = merge(Karcher(models=["a", "b", "c"]), w)
    torch.testing.assert_close(merged, torch.tensor([math.cos(0.6), math.sin(0.6)]), rtol=0, atol=1e-5)


def test_two_of_one_length_are_slerp_half_way(merge, family):
    w = {ref: tensor / tensor.norm() for ref, tensor in family.items()}
    expected = merge(Slerp(model="a", to="b", t=0.5), w)
    torch.testing.assert_close(merge(Karcher(models=["a", "b"]), w, rows=5), expected, rtol=1e-5, atol=1e-8)


def test_a_model_with_its_copies_is_that_model(merge, family):
    w = {"a": family["a"], "b": family["a"], "c": family["a"]}
    torch.testing.assert_close(merge(Karcher(models=["a", "b", "c"]), w), family["a"], rtol=1e-6, atol=1e-7)


def test_the_ways_to_all_models_cancel_out(merge, family):
    """At the mean, the directions to the models, each as long as its angle, sum to zero."""
    merged = merge(Karcher(models=["a", "b", "c"], max_iter=50, tol=1e-9), family, rows=9).double().flatten()
    units = [family[ref].double().flatten() for ref in "abc"]
    lengths = [float(unit.norm()) for unit in units]
    assert float(merged.norm()) == pytest.approx(sum(lengths) / 3, rel=1e-6)
    x = merged / merged.norm()
    ways = []
    for unit, length in zip(units, lengths, strict=True):
        cosine = float(x @ unit) / length
        across = unit / length - cosine * x
        ways.append(math.acos(cosine) * across / across.norm())
    assert min(float(way.norm()) for way in ways) > 0.1
    assert float(sum(ways).norm()) < 1e-6


def test_a_zero_tensor_has_no_direction():
    assert mean_on_sphere(np.zeros((2, 2))) == [0.0, 0.0]
    # The mean length of 4 and 0, in the direction of the first.
    assert mean_on_sphere(np.diag([16.0, 0.0])) == [0.5, 0.0]


def test_at_least_two_models():
    with pytest.raises(ValueError, match="at least 2 items"):
        Karcher(models=["a"])
