"""Every merge of models gives the same bytes for any threads, shards of its inputs, and kills on the way."""

import pytest
import torch

from hubforge import catalog
from hubforge.stages._models import Models
from hubforge.tensors import targets
from hubforge.tensors.writer import Writer

METHODS = [name for name in catalog.names("stages") if issubclass(catalog.find("stages", name), Models)]
FIELDS = {
    "slerp": {"model": "m", "to": "a", "t": [0.2, 0.7]},
    "task_arithmetic": {"model": "m", "models": ["a", "b"], "rounding": "stochastic"},
    "nearswap": {"base_model": "m", "models": ["a"], "t": 0.01},
    "arcee_fusion": {"base_model": "m", "models": ["a"]},
    "nuslerp": {"models": ["a", "b"], "base_model": "m", "weights": [0.7, 0.4]},
    "sce": {"base_model": "m", "models": ["a", "b"], "select_topk": 0.3},
    "fisher_average": {"models": ["a", "b"], "fishers": ["f", "g"]},
}


def method(name):
    kind = catalog.find("stages", name)
    of_base = "base_model" in kind.model_fields and kind.model_fields["base_model"].is_required()
    given = {"base_model": "m", "models": ["a", "b"]} if of_base else {"models": ["m", "a", "b"]}
    given |= {"density": 0.4} if "density" in kind.model_fields else {}
    return kind(**FIELDS.get(name, given), max_shard_size=4e-6)


@pytest.fixture
def inputs(checkpoint_folder, monkeypatch):
    """inputs(shards): a base, two fine-tunes and two Fisher masks, whose tensors are of many blocks."""
    monkeypatch.setattr(targets, "BLOCK", 64)
    monkeypatch.setattr(targets, "PIECE", 3)
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))]
    base = {name: torch.randn(40, 16, generator=generator) for name in names} | {"model.norm.weight": torch.ones(16)}
    tensors = {"m": base}
    for ref in "ab":
        tensors[ref] = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    for ref in "fg":
        tensors[ref] = {n: torch.rand(w.shape, generator=generator) for n, w in base.items()}

    def make(shards):
        held = {ref: {name: tensor.bfloat16() for name, tensor in each.items()} for ref, each in tensors.items()}
        return {
            ref: ("mask" if ref in "fg" else "model", checkpoint_folder(f"{ref}{shards}", each, shards=shards))
            for ref, each in held.items()
        }

    return make


@pytest.mark.parametrize("name", METHODS)
def test_bytes_depend_on_neither_threads_nor_shards_nor_kills(name, inputs, context, run_op, monkeypatch):
    op, single = method(name), inputs(1)
    run_op(op, whole := context("whole", **single), 1)
    assert len(whole.sha256) > 2  # files of several shards, and their index
    run_op(op, other := context("other", **inputs(3)), 4)
    assert other.sha256 == whole.sha256
    finish, done = Writer.finish, []

    def killed(self, piece, facts=None):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(piece.key)
        finish(self, piece, facts)

    ctx = context("killed", **single)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "finish", killed)
        run_op(op, ctx)
    assert not list(ctx.out.glob("*.safetensors"))
    again = []
    monkeypatch.setattr(
        Writer, "finish", lambda self, piece, *rest: again.append(piece.key) or finish(self, piece, *rest)
    )
    run_op(op, ctx)
    assert ctx.sha256 == whole.sha256 and again and not set(again) & set(done)
