"""`arcee_fusion`: by hand, its laws, and against a loop in float64."""

import math

import pytest
import torch

from hubforge.stages.arcee_fusion import ArceeFusion, importance, outstanding

FUSION = ArceeFusion(base_model="m", models=["a"])


def test_importance_by_hand():
    # softmax (0, 0) is (1/2, 1/2), softmax (log 3, 0) is (3/4, 1/4): their divergence is 3/4 log 3/2 + 1/4 log 1/2.
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = importance(torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2))
    torch.testing.assert_close(found, torch.tensor([[math.log(3) * divergence, 0.0]]))


def test_what_stands_out():
    # Quartiles of 0 .. 8 are 2 and 6, the median 4.
    assert outstanding(2, 4, 6) == 4 + 1.5 * (6 - 2)


@pytest.mark.parametrize("rows", [1, 7])
def test_blocks_do_not_matter(rows, merge, family):
    assert torch.equal(merge(FUSION, family, rows), merge(FUSION, family))


def test_only_what_stands_out_is_taken(merge):
    # In one row the importance is in proportion to the change: quartiles 2, 4 and 6 put the threshold at 10.
    other = torch.tensor([[0.0, 3.0, 1.0, 12.0, 2.0, 4.0, 7.0, 6.0, 5.0]])
    merged = merge(FUSION, {"m": torch.zeros(1, 9), "a": other / 10})
    assert merged.tolist() == [[0, 0, 0, pytest.approx(1.2), 0, 0, 0, 0, 0]]


def test_every_element_is_one_or_the_others(merge, family):
    merged = merge(FUSION, family)
    assert torch.equal(merged.where(merged == family["a"], family["m"]), merged)
    assert 0 < (merged == family["a"]).float().mean() < 0.25


def test_a_model_with_itself_changes_nothing(merge, family):
    assert torch.equal(merge(FUSION, {"m": family["m"], "a": family["m"]}), family["m"])


def test_against_a_loop_in_float64(merge, family):
    base, other = family["m"].double().tolist(), family["b"].double().tolist()
    scores = []
    for p_row, q_row in zip(other, base, strict=True):
        p_sum, q_sum = sum(map(math.exp, p_row)), sum(map(math.exp, q_row))
        p, q = [math.exp(x) / p_sum for x in p_row], [math.exp(x) / q_sum for x in q_row]
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        scores.append([abs(a - b) * divergence for a, b in zip(p_row, q_row, strict=True)])
    ordered = sorted(score for row in scores for score in row)
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    merged = merge(ArceeFusion(base_model="m", models=["b"]), family)
    for i, row in enumerate(scores):
        for j, score in enumerate(row):
            if abs(score - threshold) > 1e-4 * threshold:  # float32 may see the closest the other way round
                assert merged[i, j] == family["b" if score > threshold else "m"][i, j]


def test_two_models_only():
    with pytest.raises(ValueError, match="at most 1 item"):
        ArceeFusion(base_model="m", models=["a", "b"])
