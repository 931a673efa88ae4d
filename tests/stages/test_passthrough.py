"""`passthrough`: which tensor goes where, its laws, through Transformers, and wrong slices."""

import json

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.passthrough import Passthrough


@pytest.fixture
def tower(checkpoint_folder):
    """Writes a model of numbered layers: every element is `start`, 10 more a layer; 1 before, 2 behind."""

    def write(name, start, layers=3, wrapper="model.", **config):
        tensors = {f"{wrapper}embed_tokens.weight": torch.tensor([start + 1.0])}
        tensors |= {
            f"{wrapper}layers.{i}.mlp.down_proj.weight": torch.tensor([start + 10.0 * i]) for i in range(layers)
        }
        tensors |= {f"{wrapper}norm.weight": torch.tensor([start + 2.0])}
        return checkpoint_folder(name, tensors, config={"model_type": "toy", "num_hidden_layers": layers} | config)

    return write


def stack(*slices, **fields):
    parts = [{"model": model, "layers": layers, **more} for model, layers, more in slices]
    return Passthrough(slices=parts, **fields)


def test_layers_of_two_models_in_turn(tower, context, run_op, tensors_of):
    kinds = ["full", "sliding", "full"]
    ctx = context(
        a=("model", tower("a", 100, layer_types=kinds)),
        b=("model", tower("b", 500, wrapper="model.language_model.", layer_types=kinds[::-1])),
    )
    metrics = run_op(stack(("a", (0, 2), {}), ("b", (1, 3), {"scale": 0.5}), ("b", (0, 1), {})), ctx)
    found = {name: tensor.item() for name, tensor in tensors_of(ctx.out).items()}
    layers = [found.pop(f"model.layers.{i}.mlp.down_proj.weight") for i in range(5)]
    assert layers == [100, 110, 255, 260, 500]
    assert found == {"model.embed_tokens.weight": 101, "model.norm.weight": 502}
    config = json.loads((ctx.out / "config.json").read_text())
    assert config["num_hidden_layers"] == metrics["layers"] == 5
    assert config["layer_types"] == ["full", "sliding", "sliding", "full", "full"]


def test_all_layers_are_the_model_bit_for_bit(tiny_llama, context, run_op, tensors_of):
    ctx = context(m=("model", tiny_llama))
    run_op(stack(("m", (0, 2), {})), ctx)
    expected, found = tensors_of(tiny_llama), tensors_of(ctx.out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (ctx.out / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()


def test_a_layer_that_adds_nothing_leaves_the_logits(tiny_llama, context, run_op):
    from transformers import AutoModelForCausalLM

    ctx = context(m=("model", tiny_llama))
    silent = {"scale": {"o_proj": 0, "down_proj": 0, "default": 1}}
    run_op(stack(("m", (0, 2), {}), ("m", (1, 2), silent), dtype="float32"), ctx)
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(ids).logits for p in (tiny_llama, ctx.out)]
    assert AutoModelForCausalLM.from_pretrained(ctx.out).config.num_hidden_layers == 3
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)


def test_a_stack_of_shards_taken_up_again_is_the_same(tiny_llama, context, run_op, monkeypatch):
    from hubforge.stages.passthrough import Source

    op = stack(("m", (0, 2), {}), ("m", (0, 2), {"scale": 0.5}), max_shard_size=1e-4)
    whole = context("whole", m=("model", tiny_llama))
    run_op(op, whole)
    write, written = Source.write, []

    def killed(self, writer, piece):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(self.name)
        write(self, writer, piece)

    ctx = context(m=("model", tiny_llama))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Source, "write", killed)
        run_op(op, ctx)
    again = []
    monkeypatch.setattr(Source, "write", lambda self, *rest: (again.append(self.name), write(self, *rest)))
    run_op(op, ctx)
    assert ctx.sha256 == whole.sha256 and len(ctx.sha256) > 2
    assert not set(again) & set(written)


def test_layers_that_are_not_there(tower, context, run_op):
    ctx = context(a=("model", tower("a", 0)))
    with pytest.raises(StepError, match=r"a has 3 layers, so there are no layers \[2, 4\]"):
        run_op(stack(("a", (2, 4), {})), ctx)
    with pytest.raises(ValueError, match="holds no layers"):
        stack(("a", (2, 2), {}))


def test_layers_that_depend_on_their_place(tower, context, run_op):
    ctx = context(a=("model", tower("a", 0, num_kv_shared_layers=1)))
    with pytest.raises(StepError, match="num_kv_shared_layers is 1"):
        run_op(stack(("a", (0, 2), {})), ctx)


def test_layers_of_another_width(tower, context, run_op):
    ctx = context(a=("model", tower("a", 0, hidden_size=8)), b=("model", tower("b", 0, hidden_size=16)))
    with pytest.raises(StepError, match="hidden_size is 8 in a, but 16 in b"):
        run_op(stack(("a", (0, 2), {}), ("b", (0, 1), {})), ctx)
