"""Random numbers that belong to elements: where they come from, how they lie, and what they do not depend on."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hubforge.tensors.random import _key, uniform


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


@pytest.mark.parametrize("cuts", [(1,), (8, 16), (3, 5, 64, 999), tuple(range(1, 1000, 7))])
def test_blocks_do_not_matter(cuts):
    whole = uniform(3, (1, "w"), 0, 1000)
    ends = [0, *cuts, 1000]
    parts = [uniform(3, (1, "w"), first, last - first) for first, last in pairwise(ends)]
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
