"""A merge method over tensors at hand, as the engine runs it: in blocks of rows, measured first."""

import pytest
import torch

from hubforge.op import Place


@pytest.fixture
def merge():
    """merge(op, {ref: tensor}, rows=None): the output; `rows` at a time where the method allows it."""

    def run(op, w, rows=None, name="model.layers.0.mlp.up_proj.weight", layer=0, known=1):
        w = {ref: torch.as_tensor(tensor, dtype=torch.float32) for ref, tensor in w.items()}
        whole = next(iter(w.values()))
        step = whole.shape[0] if rows is None or op.whole() else rows
        firsts = range(0, whole.shape[0], step)

        def at(first, **more):
            return Place(name, layer, tuple(whole.shape), first, known, **more)

        def block(first):
            return {ref: tensor[first : first + step] for ref, tensor in w.items()}

        totals = {}
        for turn in range(op.measures()):
            so_far = {"totals": totals, "turn": turn}
            totals = op.combine([op.measure(block(first), at(first, **so_far)) for first in firsts], at(0, **so_far))
        before = {ref: tensor.clone() for ref, tensor in w.items()}
        merged = torch.cat([op.tensor(block(first), at(first, totals=totals)) for first in firsts])
        assert all(torch.equal(w[ref], before[ref]) for ref in w), "an input was changed in place"
        assert merged.dtype == torch.float32 and merged.shape == whole.shape
        return merged

    return run


@pytest.fixture
def family():
    """A base and fine-tunes a, b, c whose changes grow in size: {ref: (64, 48)}, float32."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 48, generator=generator) / 2
    sizes = {"a": 0.1, "b": 0.2, "c": 0.3}
    return {"m": base} | {ref: base + size * torch.randn(64, 48, generator=generator) for ref, size in sizes.items()}
