"""Exactly the largest, found in blocks: by hand, with equal magnitudes, and beside a sort."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from hubforge.op import Place
from hubforge.tensors import selection
from hubforge.tensors.selection import TURNS, Cut, largest, narrow, survey


def search(tensor, counts, rows):
    """The cuts, and the tensor with all but what each chooses zero; `rows` at a time."""
    firsts = range(0, tensor.shape[0], rows)

    def at(first, **known):
        return Place("w", shape=tuple(tensor.shape), first=first, **known)

    def block(first):
        return tensor[first : first + rows]

    def read(first, seen):
        seen.append(first)
        return block(first)

    totals, reads = {}, []
    for turn in range(TURNS):
        known, seen = {"totals": totals, "turn": turn}, []
        found = [survey({"w": partial(read, first, seen)}, at(first, **known)) for first in firsts]
        totals = narrow(found, {"w": counts}, at(0, **known))
        reads.append(len(seen))
    assert all(isinstance(cut, Cut) for cut in totals["w"])
    return totals["w"], [torch.cat([largest(block(f), cut, at(f)) for f in firsts]) for cut in totals["w"]], reads


def by_sorting(tensor, count):
    chosen = tensor.abs().flatten().sort(descending=True, stable=True).indices[:count]
    expected = torch.zeros(tensor.numel())
    expected[chosen] = tensor.flatten()[chosen]
    return expected.view(tensor.shape)


def test_by_hand():
    (cut,), (found,), _ = search(torch.tensor([[3.0, -5.0], [0.0, 4.0]]), [2], rows=1)
    assert found.tolist() == [[0.0, -5.0], [0.0, 4.0]]
    assert cut.threshold == 4.0


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_of_equal_magnitudes_the_first_are_taken(rows):
    tensor = torch.tensor([1.0, -2.0, 2.0, -2.0, 3.0]).view(5, 1)
    _, (found,), _ = search(tensor, [3], rows)
    assert found.flatten().tolist() == [0.0, -2.0, 2.0, 0.0, 3.0]


def of(kind):
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 96, 101, generator=generator)
    if kind == "bfloat16 differences":
        return one.bfloat16().float() - two.bfloat16().float()
    if kind == "few values":
        return (one * 2).round()
    if kind == "mostly zeros":
        return one * (two > 1.5)
    return one * torch.arange(96.0)[:, None] ** 4  # rising by rows


@pytest.mark.parametrize("sample", [1 << 17, 500], ids=["searched whole", "sampled"])
@pytest.mark.parametrize("kind", ["bfloat16 differences", "few values", "mostly zeros", "rising by rows"])
def test_beside_a_sort(kind, sample, monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", sample)
    tensor = of(kind)
    counts = [0, 1, 17, 600, 1939, 5000, 9695, 9696, 20000]
    for rows in (1, 7, 96):
        _, found, _ = search(tensor, counts, rows)
        for count, chosen in zip(counts, found, strict=True):
            assert torch.equal(chosen, by_sorting(tensor, count)), (count, rows)


@pytest.mark.parametrize("kind", ["bfloat16 differences", "few values"])
def test_a_bracket_that_misses_costs_a_pass_and_changes_nothing(kind, monkeypatch):
    tensor, missed = of(kind), 0
    monkeypatch.setattr(selection, "SAMPLE", 500)
    counts = [100, 1939, 5000]
    cuts, _, (_, _, third) = search(tensor, counts, 10)
    assert third == 0, "a bracket of 6 standard errors missed"
    real = selection._bracket
    for dropped in (0, 40):  # from the sample's largest, so that brackets lie too high, and as many of the least

        def misled(sample, count, elements, dropped=dropped):
            return real(sample[dropped : dropped + len(sample) - 40], count, elements)

        with monkeypatch.context() as patch:
            patch.setattr(selection, "_SIGMAS", 0)
            patch.setattr(selection, "_bracket", misled)
            again, found, (_, _, third) = search(tensor, counts, 10)
        missed += third
        assert again == cuts
        for count, chosen in zip(counts, found, strict=True):
            assert torch.equal(chosen, by_sorting(tensor, count))
    assert missed > 0


def test_thresholds_rise_as_counts_fall():
    cuts, _, _ = search(of("bfloat16 differences"), [10, 100, 1000], 96)
    assert all(one.threshold > other.threshold for one, other in pairwise(cuts))
