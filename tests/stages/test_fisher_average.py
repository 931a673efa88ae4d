"""`fisher_average`: by hand, its laws, and against float64."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.fisher_average import FisherAverage
from hubforge.stages.linear import Linear


def average(**fields):
    return FisherAverage(**{"models": ["a", "b"], "fishers": ["f", "g"]} | fields)


def test_by_hand(merge):
    w = {"a": [0.0, 0.0, 2.0], "b": [4.0, 4.0, 4.0], "f": [1.0, 3.0, 0.0], "g": [3.0, 1.0, 0.0]}
    # (1 * 0 + 3 * 4) / 4, (3 * 0 + 1 * 4) / 4; on the third no model depends, so it is the mean.
    assert merge(average(), w).tolist() == [3.0, 1.0, 3.0]
    # With three times the weight: (3 * 0 + 3 * 4) / 6, 4 / 10, (3 * 2 + 4) / 4.
    torch.testing.assert_close(merge(average(weights=[3, 1]), w), torch.tensor([2.0, 0.4, 2.5]))


def test_equal_importance_is_the_mean(merge, family):
    ones = torch.full((64, 48), 2.0)
    found = merge(average(weights=[1, 3]), {"a": family["a"], "b": family["b"], "f": ones, "g": ones})
    expected = merge(Linear(models=["a", "b"], weights=[1, 3]), family)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_only_one_depends_on_is_that_ones(merge, family):
    w = {"a": family["a"], "b": family["b"], "f": torch.full((64, 48), 1e-20), "g": torch.zeros(64, 48)}
    assert torch.equal(merge(average(), w), family["a"])
    # A floor hides it.
    expected = (family["a"].double() + family["b"].double()).float() / 2
    torch.testing.assert_close(merge(average(floor=1e-6), w), expected, rtol=0, atol=1e-6)


def test_against_float64(merge, family):
    generator = torch.Generator().manual_seed(1)
    fishers = 10 ** (-6 + 3 * torch.randn(2, 64, 48, generator=generator))
    w = {"a": family["a"], "b": family["b"], "f": fishers[0], "g": fishers[1]}
    f, g = 0.3 * fishers[0].double(), 0.7 * fishers[1].double()
    expected = (f * w["a"].double() + g * w["b"].double()) / (f + g)
    torch.testing.assert_close(merge(average(weights=[0.3, 0.7]), w, rows=9), expected.float(), rtol=1e-5, atol=1e-6)


def test_a_tensor_without_fisher_is_the_mean(checkpoint_folder, context, run_op, tensors_of):
    tensors = {"a": torch.zeros(2, 2), "norm": torch.zeros(2)}
    ctx = context(
        a=("model", checkpoint_folder("a", tensors)),
        b=("model", checkpoint_folder("b", {name: tensor + 4 for name, tensor in tensors.items()})),
        f=("mask", checkpoint_folder("f", {"a": torch.ones(2, 2)})),
        g=("mask", checkpoint_folder("g", {"a": torch.full((2, 2), 3.0)})),
    )
    run_op(average(), ctx)
    assert {name: t.unique().tolist() for name, t in tensors_of(ctx.out).items()} == {"a": [3.0], "norm": [2.0]}


def test_a_fisher_that_is_no_number_is_named(checkpoint_folder, context, run_op):
    fisher = {"a": torch.tensor([[1.0, float("nan")]])}
    ctx = context(
        a=("model", checkpoint_folder("a", {"a": torch.zeros(1, 2)})),
        b=("model", checkpoint_folder("b", {"a": torch.ones(1, 2)})),
        f=("mask", checkpoint_folder("f", {"a": torch.ones(1, 2)})),
        g=("mask", checkpoint_folder("g", fisher)),
    )
    with pytest.raises(StepError, match=r"a of g \(.*\) holds NaN or infinity"):
        run_op(average(), ctx)


def test_a_mask_for_each_model():
    with pytest.raises(ValueError, match="fishers has 2 entries for 3 models"):
        average(models=["a", "b", "c"])


def test_weights_are_not_negative(merge):
    with pytest.raises(StepError, match="must be at least 0"):
        merge(average(weights=[1, -1]), {"a": [1.0], "b": [2.0], "f": [1.0], "g": [1.0]})
