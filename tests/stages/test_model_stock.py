"""`model_stock`: by hand, its laws, and against the paper's formula in float64."""

from itertools import combinations

import pytest
import torch

from hubforge.stages.linear import Linear
from hubforge.stages.model_stock import ModelStock, share


def test_by_hand(merge):
    # Changes (1, 0) and (1, 1): cos θ is 1 / sqrt 2, t is sqrt 2 / (1 + 1 / sqrt 2).
    t = 2**0.5 / (1 + 0.5**0.5)
    merged = merge(ModelStock(base_model="m", models=["a", "b"]), {"m": [5.0, 5.0], "a": [6.0, 5.0], "b": [6.0, 6.0]})
    torch.testing.assert_close(merged, torch.tensor([5 + t, 5 + t / 2]))


def test_at_right_angles_the_base_alike_the_mean(merge):
    op = ModelStock(base_model="m", models=["a", "b"])
    assert merge(op, {"m": [1.0, 1.0], "a": [2.0, 1.0], "b": [1.0, 3.0]}).tolist() == [1.0, 1.0]
    w = {"m": [1.0, 1.0], "a": [2.0, 2.0], "b": [4.0, 4.0]}
    torch.testing.assert_close(merge(op, w), merge(Linear(models=["a", "b"]), w))


@pytest.mark.parametrize("filter_wise", [False, True])
def test_against_the_papers_formula(filter_wise, merge, family):
    op = ModelStock(base_model="m", models=["a", "b", "c"], filter_wise=filter_wise)
    merged = merge(op, family, rows=10)
    shape = (64, 48) if filter_wise else (1, -1)
    base = family["m"].double().reshape(shape)
    models = [family[ref].double().reshape(shape) for ref in "abc"]
    for i in range(base.shape[0]):
        cosines = [
            torch.nn.functional.cosine_similarity(one[i] - base[i], two[i] - base[i], dim=0)
            for one, two in combinations(models, 2)
        ]
        cosine = sum(cosines) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        expected = t * sum(model[i] for model in models) / 3 + (1 - t) * base[i]
        torch.testing.assert_close(merged.reshape(base.shape)[i].double(), expected, rtol=0, atol=1e-6)


def test_without_any_angle():
    assert share([0.0], 2) == 0.0  # no change in one of them
    assert share([-1.0], 2) == 0.0  # opposite changes: the formula's pole
    assert share([], 1) == 1.0


def test_at_least_two_fine_tunes():
    with pytest.raises(ValueError, match="at least 2 items"):
        ModelStock(base_model="m", models=["a"])
