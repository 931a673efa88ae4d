"""Stochastic rounding: unbiased, only ever to a neighbour, and the same numbers whatever the blocks."""

import pytest
import torch

from hubforge.tensors.rounding import round_to

TYPES = [torch.bfloat16, torch.float16]


def numbers(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_value_a_quarter_of_the_way_is_rounded_up_a_quarter_of_the_time(kind):
    low, step = 1.0, float(torch.finfo(kind).eps)
    value = low + step / 4
    rounded = round_to(torch.full((40_000,), value), kind, "stochastic", 1, "w", 0).float()
    assert set(rounded.tolist()) == {low, low + step}
    share = float((rounded > low).float().mean())
    assert abs(share - 0.25) < 0.01  # four standard errors
    down = round_to(torch.full((40_000,), -value), kind, "stochastic", 1, "w", 0).float()
    assert torch.equal(down, -rounded)  # the magnitude is rounded


def test_below_the_normal_range_of_float16_the_mean_is_right_too():
    value = 2.0**-24 * 10.5  # float16 has steps of 2^-24 there
    rounded = round_to(torch.full((40_000,), -value), torch.float16, "stochastic", 1, "w", 0).float() * 2.0**24
    assert set(rounded.tolist()) == {-10.0, -11.0}
    assert abs(float(rounded.mean()) + 10.5) < 0.01


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_what_the_type_holds_is_kept_and_all_else_goes_to_a_neighbour(kind):
    held = torch.cat([numbers(5000).to(kind).float(), torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    assert torch.equal(round_to(held, kind, "stochastic", 3, "w", 0).float(), held)
    free = numbers(5000) * torch.logspace(-9, 4, 5000)
    rounded, nearest = round_to(free, kind, "stochastic", 3, "w", 0).float(), free.to(kind).float()
    step = torch.maximum((free.abs().log2().floor()).exp2() * torch.finfo(kind).eps, torch.tensor(2.0**-24))
    assert bool(((rounded - free).abs() < step).all())
    assert 0.2 < float((rounded != nearest).float().mean()) < 0.3  # a quarter, for remainders spread evenly


def test_an_element_draws_its_own_number():
    values = numbers(1000)
    whole = round_to(values, torch.bfloat16, "stochastic", 5, "w", 0)
    parts = [round_to(values[i : i + 250], torch.bfloat16, "stochastic", 5, "w", i) for i in range(0, 1000, 250)]
    assert torch.equal(torch.cat(parts), whole)
    for seed, name in [(6, "w"), (5, "v")]:
        assert not torch.equal(round_to(values, torch.bfloat16, "stochastic", seed, name, 0), whole)


def test_nearest_is_torchs_rounding():
    assert torch.equal(round_to(numbers(100), torch.bfloat16, "nearest", 0, "w", 0), numbers(100).bfloat16())
