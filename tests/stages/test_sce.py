"""`sce`: by hand, its laws, and against a loop in float64."""

import pytest
import torch

from hubforge.stages.sce import Sce


def test_by_hand(merge):
    # Squares 4 + 4 and 1 + 1: weights .8 and .2. Both signs agree at the first; at the second the larger change wins.
    w = {"m": [0.0, 0.0], "a": [2.0, 2.0], "b": [1.0, -1.0]}
    merged = merge(Sce(base_model="m", models=["a", "b"]), w)
    torch.testing.assert_close(merged, torch.tensor([1.8, 2.0]))


def test_small_changes_are_weighted_as_large_ones(merge, family):
    small = {ref: (tensor - family["m"]) * 1e-5 for ref, tensor in family.items()}
    large = {ref: tensor - family["m"] for ref, tensor in family.items()}
    op = Sce(base_model="m", models=["a", "b", "c"])
    torch.testing.assert_close(merge(op, small) * 1e5, merge(op, large), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("topk", "expected"), [(0.5, [0, 0, 3.0, 0]), (0.4, [0, 0, 0, 0])])
def test_where_nothing_varies_nothing_is_selected(topk, expected, merge):
    # Two of four vary; half of those is the one that varies most.
    w = {"m": [0.0] * 4, "a": [1.0, 1.0, 3.0, 0.0], "b": [1.0, 2.0, -3.0, 0.0]}
    assert merge(Sce(base_model="m", models=["a", "b"], select_topk=topk), w).tolist() == expected


@pytest.mark.parametrize("rows", [1, 7])
def test_blocks_do_not_matter(rows, merge, family):
    op = Sce(base_model="m", models=["a", "b", "c"], select_topk=0.3)
    torch.testing.assert_close(merge(op, family, rows), merge(op, family), rtol=0, atol=1e-7)


@pytest.mark.parametrize("topk", [1.0, 0.3])
def test_against_a_loop_in_float64(topk, merge, family):
    merged = merge(Sce(base_model="m", models=["a", "b", "c"], select_topk=topk), family, rows=10)
    deltas = torch.stack([(family[ref] - family["m"]).double() for ref in "abc"])
    if topk < 1:
        variance = deltas.var(0, correction=0).flatten()
        mask = torch.zeros_like(variance)
        mask[variance.argsort(descending=True)[: int(topk * len(variance))]] = 1
        deltas = deltas * mask.view(64, 48)
    weights = [float(delta.square().sum() / deltas.square().sum()) for delta in deltas]
    for i in range(0, 64, 9):
        for j in range(48):
            values = [(float(delta[i, j]), weight) for delta, weight in zip(deltas, weights, strict=True)]
            positive = sum(value for value, _ in values) >= 0
            agreeing = [(value, weight) for value, weight in values if value and (value > 0) == positive]
            change = sum(v * w for v, w in agreeing) / sum(w for _, w in agreeing) if agreeing else 0.0
            assert merged[i, j].item() == pytest.approx(float(family["m"][i, j]) + change, abs=1e-6)


def test_one_model_is_that_model(merge, family):
    torch.testing.assert_close(merge(Sce(base_model="m", models=["a"]), family), family["a"], rtol=0, atol=1e-6)


def test_select_topk_is_a_share():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Sce(base_model="m", models=["a"], select_topk=2)
