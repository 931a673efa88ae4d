"""`della_linear`: by hand, its laws, and the chances it takes."""

import math

import pytest
import torch

from hubforge.stages.della_linear import DellaLinear, probabilities
from hubforge.stages.task_arithmetic import TaskArithmetic
from hubforge.tensors.random import uniform

UP = "model.layers.0.mlp.up_proj.weight"


def test_probabilities_rise_with_the_rank_in_the_row():
    delta = torch.tensor([[3.0, -1.0, 2.0], [0.1, 0.2, -0.3]])
    expected = torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.5, 0.6]])
    torch.testing.assert_close(probabilities(delta, density=0.5, epsilon=0.1), expected)


def test_of_equal_magnitudes_the_later_ranks_higher():
    torch.testing.assert_close(probabilities(torch.tensor([1.0, -1.0, 0.0]), 0.5, 0.2), torch.tensor([0.5, 0.7, 0.3]))


def test_against_a_loop_in_float64(merge, family):
    op = DellaLinear(base_model="m", models=["a", "b"], weights=[0.5, 2.0], density=0.4, epsilon=[0.1, 0.3], seed=2)
    merged = merge(op, family)
    expected = family["m"].double().clone()
    for index, (ref, weight, epsilon) in enumerate([("a", 0.5, 0.1), ("b", 2.0, 0.3)]):
        drawn = uniform(2, (index, UP), 0, 64 * 48).view(64, 48)
        delta = family[ref].double() - family["m"].double()
        for i in range(64):
            for rank, j in enumerate(delta[i].abs().argsort()):
                p = 0.4 - epsilon + 2 * epsilon * rank / 47
                if drawn[i, j] < p:
                    expected[i, j] += weight * delta[i, j] / p
    torch.testing.assert_close(merged, expected.float(), rtol=1e-5, atol=1e-5)


def test_density_one_is_task_arithmetic(merge, family):
    found = merge(DellaLinear(base_model="m", models=["a", "b"], weights=[0.5, 0.2]), family)
    expected = merge(TaskArithmetic(model="m", models=["a", "b"], weights=[0.5, 0.2]), family)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_expected_change_is_the_whole_change(merge):
    w = {"m": torch.zeros(200, 200), "a": torch.ones(200, 200)}
    merged = merge(DellaLinear(base_model="m", models=["a"], density=0.5, epsilon=0.2), w)
    # The variance of a kept one over p is 1/p - 1, at most 1/0.3 - 1.
    assert abs(merged.mean() - 1) < 5 * math.sqrt(1 / 0.3 - 1) / 200


def test_large_elements_are_kept_more_often(merge):
    w = {"m": torch.zeros(400, 100), "a": torch.arange(1.0, 101.0).expand(400, 100)}
    kept = merge(DellaLinear(base_model="m", models=["a"], density=0.5, epsilon=0.3), w) != 0
    share = kept.float().mean(0)
    # 400 rows: five standard errors of a share of 20 to 80 % are 0.1.
    assert abs(share[0] - 0.2) < 0.1 and abs(share[99] - 0.8) < 0.1 and abs(share.mean() - 0.5) < 0.02


def test_blocks_do_not_matter(merge, family):
    op = DellaLinear(base_model="m", models=["a", "b"], density=0.5)
    assert torch.equal(merge(op, family, rows=5), merge(op, family))


def test_probabilities_stay_within_zero_and_one():
    with pytest.raises(ValueError, match=r"density - epsilon to density \+ epsilon is 0.75 to 1.05"):
        DellaLinear(base_model="m", models=["a"], density=0.9)
