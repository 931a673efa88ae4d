"""Random numbers that belong to elements: where they come from, how they lie, and what they do not depend on."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from hubforge.tensors.random import _key, bernoulli, resolved, uniform


def test_numbers_are_the_upper_bits_of_philox():
    words = np.random.Philox(key=_key(7, (0, "w"))).random_raw(2)
    lanes = [int(words[0]) & 0xFFFFFFFF, int(words[0]) >> 32, int(words[1]) & 0xFFFFFFFF, int(words[1]) >> 32]
    expected = [(((lane >> 8) + (1 << 23)) % (1 << 24)) / (1 << 24) for lane in lanes]
    assert uniform(7, (0, "w"), 0, 4).tolist() == expected


def test_they_stay_what_they_were():
    # Written down from the first run: any change gives every random merge other bytes, and needs a new `version`.
    assert uniform(0, (0, "model.norm.weight"), 0, 3).tolist() == [
        0.6748380064964294,
        0.30116432905197144,
        0.4516042470932007,
    ]


@pytest.mark.parametrize("draw", [uniform, partial(bernoulli, chance=0.3)], ids=["uniform", "bernoulli"])
@pytest.mark.parametrize("cuts", [(1,), (8, 16), (3, 5, 64, 999), tuple(range(1, 1000, 7))])
def test_blocks_do_not_matter(cuts, draw):
    whole = draw(3, (1, "w"), 0, 1000)
    ends = [0, *cuts, 1000]
    parts = [draw(3, (1, "w"), first, last - first) for first, last in pairwise(ends)]
    assert torch.equal(torch.cat(parts), whole)


def test_far_elements_are_reached_at_once():
    assert torch.equal(uniform(0, ("w",), 10**12 + 5, 20)[3:], uniform(0, ("w",), 10**12 + 8, 17))


def test_uniform_in_mean_variance_and_bins():
    numbers = uniform(0, (0, "w"), 0, 1 << 18).double()
    count = len(numbers)
    assert numbers.min() >= 0 and numbers.max() < 1
    # Five standard errors.
    assert abs(numbers.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(numbers.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    bins = torch.histc(numbers, 256, 0, 1)
    chi2 = ((bins - count / 256) ** 2 / (count / 256)).sum()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize(
    "other", [(1, (0, "w")), (0, (1, "w")), (0, (0, "v")), (0, ("0", "w"))], ids=["seed", "place", "name", "type"]
)
def test_streams_are_independent(other):
    one, two = uniform(0, (0, "w"), 0, 1 << 16).double(), uniform(*other, 0, 1 << 16).double()
    for shift in (0, 1, 8):
        products = (one[: len(one) - shift] - 0.5) * (two[shift:] - 0.5)
        assert abs(products.mean()) < 5 / 12 / math.sqrt(len(products))


def test_neighbours_are_independent():
    numbers = uniform(0, (0, "w"), 0, 1 << 17).double() - 0.5
    for shift in (1, 2, 7, 8, 48):
        products = numbers[:-shift] * numbers[shift:]
        assert abs(products.mean()) < 5 / 12 / math.sqrt(len(products))


def test_a_chance_is_that_of_sixteen_bits_below_it():
    words = np.random.Philox(key=_key(7, (0, "w"))).random_raw(4)
    lanes = [(int(word) >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    for chance in (0.2, 0.5, lanes[3] / 65536, (lanes[3] + 1) / 65536):
        below = round(chance * 65536)
        assert bernoulli(7, (0, "w"), 0, 16, chance).tolist() == [float(lane < below) for lane in lanes]


@pytest.mark.parametrize("chance", [2.0**-16, 0.01, 0.2, 0.5, 1 - 2.0**-16])
def test_chances_are_exact(chance):
    # All 65,536 values of 16 bits, equally likely: that share of them lies below. Drawn, within 5 standard errors.
    count = 1 << 20
    drawn = bernoulli(0, ("w",), 0, count, chance).double()
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    p = resolved(chance)
    assert abs(p - chance) <= 2.0**-17
    assert abs(drawn.sum() - count * p) < 5 * math.sqrt(count * p * (1 - p))


def test_a_chance_of_one_is_certain_and_the_least_is_not_nothing():
    assert bernoulli(0, ("w",), 0, 1000, 1.0).sum() == 1000
    assert resolved(1e-9) == 2.0**-16


def test_chances_of_neighbours_are_independent():
    drawn = bernoulli(0, (0, "w"), 0, 1 << 18, 0.25).double() - 0.25
    for shift in (1, 2, 3, 4, 15, 16, 64):
        products = drawn[:-shift] * drawn[shift:]
        assert abs(products.mean()) < 5 * 0.1875 / math.sqrt(len(products))
