"""`dare_ties`: by hand, its laws, and against a loop in float64."""

import pytest
import torch

from hubforge.stages.dare_linear import DareLinear
from hubforge.stages.dare_ties import DareTies
from hubforge.tensors.random import bernoulli

UP = "model.layers.0.mlp.up_proj.weight"


def test_what_disagrees_is_left_out(merge):
    w = {"m": [1.0, 1.0, 1.0], "a": [3.0, 3.0, 0.0], "b": [0.0, 2.0, 2.0]}
    # Changes (2, 2, -1) and (-1, 1, 1), their sums 1, 3, 0: of the first only a's counts, of the last b's.
    assert merge(DareTies(base_model="m", models=["a", "b"]), w).tolist() == [3.0, 4.0, 2.0]
    assert merge(DareTies(base_model="m", models=["a", "b"], normalize=True), w).tolist() == [3.0, 2.5, 2.0]


def test_one_model_is_dare_linear(merge, family):
    fields = {"base_model": "m", "models": ["b"], "density": 0.4, "seed": 3}
    assert torch.equal(merge(DareTies(**fields), family), merge(DareLinear(**fields), family))


def test_against_a_loop_in_float64(merge, family):
    op = DareTies(base_model="m", models=["a", "b", "c"], weights=[0.5, 0.7, -0.3], density=0.5, scale=0.8)
    merged = merge(op, family, rows=10)
    base = family["m"].double()
    parts = []
    for index, (ref, weight) in enumerate([("a", 0.5), ("b", 0.7), ("c", -0.3)]):
        kept = bernoulli(0, (index, UP), 0, 64 * 48, 0.5).view(64, 48)
        parts.append(weight * (family[ref].double() - base) / 0.5 * kept)
    for i in range(0, 64, 9):
        for j in range(48):
            values = [float(part[i, j]) for part in parts]
            agreeing = [value for value in values if (value > 0) == (sum(values) >= 0)]
            assert merged[i, j].item() == pytest.approx(float(base[i, j]) + 0.8 * sum(agreeing), abs=2e-6)


def test_wrong_density():
    with pytest.raises(ValueError, match=r"density is 1.2, but must lie in \(0, 1\]"):
        DareTies(base_model="m", models=["a"], density=1.2)
