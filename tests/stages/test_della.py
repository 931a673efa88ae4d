"""`della`: by hand, its laws, and against a loop in float64."""

import pytest
import torch

from hubforge.stages.della import Della
from hubforge.stages.della_linear import probabilities
from hubforge.tensors.random import uniform

UP = "model.layers.0.mlp.up_proj.weight"


def test_the_mean_of_what_agrees(merge):
    w = {"m": [0.0, 0.0], "a": [3.0, 1.0], "b": [1.0, -2.0]}
    # Weighted: (3, 1) and (2, -4); signs +, -. (3 + 2) / (1 + 2) and -4 / 2.
    merged = merge(Della(base_model="m", models=["a", "b"], weights=[1.0, 2.0], density=1), w)
    torch.testing.assert_close(merged, torch.tensor([5 / 3, -2.0]))


def test_one_model_whole_is_that_model(merge, family):
    merged = merge(Della(base_model="m", models=["a"], weights=[0.3], density=1), family)
    torch.testing.assert_close(merged, family["a"], rtol=0, atol=1e-6)


def test_against_a_loop_in_float64(merge, family):
    merged = merge(Della(base_model="m", models=["a", "b", "c"], weights=[1.0, 2.0, 0.5], density=0.5, seed=4), family)
    parts = []
    for index, ref in enumerate("abc"):
        p = probabilities(family[ref] - family["m"], 0.5, 0.15)
        drawn = uniform(4, (index, UP), 0, 64 * 48).view(64, 48)
        parts.append((family[ref].double() - family["m"].double()) / p.double() * (drawn < p))
    for i in range(0, 64, 9):
        for j in range(48):
            values = [(float(part[i, j]), weight) for part, weight in zip(parts, [1.0, 2.0, 0.5], strict=True)]
            positive = sum(value * weight for value, weight in values) >= 0
            agreeing = [(value, weight) for value, weight in values if value and (value > 0) == positive]
            change = sum(v * w for v, w in agreeing) / sum(w for _, w in agreeing) if agreeing else 0.0
            assert merged[i, j].item() == pytest.approx(float(family["m"][i, j]) + change, abs=2e-6)


def test_epsilon_is_not_negative():
    with pytest.raises(ValueError, match="epsilon is negative"):
        Della(base_model="m", models=["a"], epsilon=-0.1)
