"""Exactly the largest: by hand, with equal magnitudes, and beside a sort."""

import pytest
import torch

from hubforge.tensors.selection import kth_smallest, largest


def test_by_hand():
    assert largest(torch.tensor([[3.0, -5.0], [0.0, 4.0]]), 2).tolist() == [[False, True], [False, True]]


def test_of_equal_magnitudes_the_first_are_taken():
    assert largest(torch.tensor([1.0, -2.0, 2.0, -2.0, 3.0]), 3).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("count", [0, 1, 17, 500, 999, 1000])
def test_as_many_as_asked_for_of_bfloat16_differences(count):
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 1000, generator=generator).bfloat16().float()
    chosen = largest(one - two, count)
    assert chosen.sum() == count
    magnitudes = (one - two).abs()
    expected = magnitudes.flatten().sort(descending=True).values[:count]
    assert torch.equal(magnitudes[chosen].sort(descending=True).values, expected)


def test_kth_smallest():
    values = torch.tensor([5.0, 1.0, 4.0, 1.0])
    assert [kth_smallest(values, index) for index in range(4)] == [1.0, 1.0, 4.0, 5.0]
