"""`passthrough`: which tensor goes where, its laws, through Transformers, and wrong slices."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubforge.errors import StepError
from hubforge.events import Warned
from hubforge.lab.tiny import tiny_llama as make_llama
from hubforge.stages.passthrough import Passthrough
from hubforge.stages.task_arithmetic import TaskArithmetic


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


@pytest.mark.parametrize(
    ("before", "layer", "behind"),
    [
        ("gpt_neox.embed_in.weight", "gpt_neox.layers.{}.w", "embed_out.weight"),
        ("transformer.wte.weight", "transformer.h.{}.w", "transformer.ln_f.weight"),
        ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.{}.w", "bert.pooler.dense.weight"),
        ("model.vision_tower.encoder.layers.0.w", "model.language_model.layers.{}.w", "lm_head.weight"),
    ],
)
def test_names_of_other_architectures(before, layer, behind, checkpoint_folder, context, run_op, tensors_of):
    inputs = {}
    for name, start in (("a", 0.0), ("b", 100.0)):
        tensors = {before: start + 10, behind: start + 20} | {layer.format(i): start + i for i in range(3)}
        config = {"model_type": "toy", "num_hidden_layers": 3}
        tensors = {key: torch.tensor([value]) for key, value in tensors.items()}
        inputs[name] = ("model", checkpoint_folder(name, tensors, config=config))
    run_op(stack(("a", (0, 2), {}), ("b", (1, 3), {"scale": [1, 2]})), ctx := context(**inputs))
    layers = {layer.format(i): value for i, value in enumerate([0, 1, 101, 204])}
    found = {name: tensor.item() for name, tensor in tensors_of(ctx.out).items()}
    assert found == {before: 10, behind: 120} | layers


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


def test_eight_bit_floats_become_plain_layers(checkpoint_folder, context, run_op, tensors_of):
    weight, name = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), "model.layers.0.mlp.up_proj.weight"
    toy = {"model_type": "toy", "num_hidden_layers": 1, "dtype": "bfloat16"}
    small = {name: weight.to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(0.5)}
    config = toy | {"quantization_config": {"quant_method": "fp8"}}
    ctx = context(
        q=("model", checkpoint_folder("q", small, config=config)),
        m=("model", checkpoint_folder("m", {name: weight.bfloat16()}, config=toy)),
    )
    run_op(stack(("q", (0, 1), {}), ("m", (0, 1), {}), ("q", (0, 1), {"scale": 2})), ctx)
    found = tensors_of(ctx.out)
    assert {n: (t.dtype, t.tolist()) for n, t in found.items()} == {
        f"model.layers.{i}.mlp.up_proj.weight": (torch.bfloat16, (weight * factor).tolist())
        for i, factor in enumerate([0.5, 1, 1])
    }
    assert json.loads((ctx.out / "config.json").read_text()) == toy | {"num_hidden_layers": 3}


@pytest.mark.parametrize("fields", [{}, {"dtype": "bfloat16"}], ids=["beside plain layers", "as another dtype"])
def test_layers_that_are_quantised_can_only_be_copied(fields, tower, context, run_op):
    gptq = {"quantization_config": {"quant_method": "gptq"}}
    ctx = context(a=("model", tower("a", 0, **gptq)), b=("model", tower("b", 0)))
    with pytest.raises(StepError, match="a is quantised by gptq"):
        run_op(stack(("b", (0, 1), {}) if not fields else ("a", (0, 1), {}), ("a", (1, 2), {}), **fields), ctx)
    run_op(stack(("a", (0, 1), {}), ("a", (1, 2), {})), ctx)
    assert json.loads((ctx.out / "config.json").read_text())["quantization_config"] == {"quant_method": "gptq"}


def test_layers_of_other_shapes_are_named_with_both_files(tiny_llama, context, run_op, tmp_path):
    wide = make_llama(tmp_path / "wide", intermediate_size=160)
    ctx = context(a=("model", tiny_llama), b=("model", wide))
    with pytest.raises(
        StepError, match=r"_proj.weight is \[.*128.*\] in .*/model-.*, but \[.*160.*\] in .*/wide/model-"
    ):
        run_op(stack(("a", (0, 1), {}), ("b", (1, 2), {})), ctx)
    assert not list(ctx.out.iterdir())


def test_a_head_for_other_tokens_gets_the_way_out(checkpoint_folder, context, run_op, tensors_of):
    def model(name, tokens):
        rows = torch.arange(2.0 * len(tokens)).view(-1, 2)
        tensors = {"model.embed_tokens.weight": rows, "model.layers.0.w": torch.ones(1), "lm_head.weight": rows.clone()}
        folder = checkpoint_folder(name, tensors, config={"model_type": "toy", "num_hidden_layers": 1})
        vocabulary = {"model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}}}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        return "model", folder

    a, b = model("a", "xy"), model("b", "zyx")
    with pytest.raises(StepError, match=r"lm_head.weight is \[2, 2\] in .*, but \[3, 2\] in ") as caught:
        run_op(stack(("a", (0, 1), {}), ("b", (0, 1), {})), context(a=a, b=b))
    assert "{op: task_arithmetic, model: b, models: [a], weights: [0], tokenizer: a}" in caught.value.mend
    ctx = context("same", a=a, b=b)
    run_op(TaskArithmetic(model="b", models=["a"], weights=[0], tokenizer="a"), ctx)
    run_op(stack(("a", (0, 1), {}), ("same", (0, 1), {})), stacked := context("stacked", a=a, same=("model", ctx.out)))
    assert tensors_of(stacked.out)["lm_head.weight"].tolist() == [[4, 5], [2, 3]]  # b's rows of x and y


@pytest.mark.parametrize(
    ("value", "fields", "message"),
    [
        (
            float("nan"),
            {"scale": 0.5},
            r"layers.1.mlp.down_proj.weight \(.*/a/model.safetensors\) holds NaN or infinity",
        ),
        (1e30, {"dtype": "float16"}, "layers.1.mlp.down_proj.weight does not fit into float16"),
    ],
    ids=["nan", "overflow"],
)
def test_what_is_computed_is_finite(value, fields, message, tower, context, run_op):
    path = tower("a", 0)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"model.layers.1.mlp.down_proj.weight": torch.tensor([value])}, path / "model.safetensors")
    scale = {"scale": fields.pop("scale", 1)}
    with pytest.raises(StepError, match=message):
        run_op(stack(("a", (0, 2), scale), **fields), context(a=("model", path)))


def test_patterns_that_fit_nothing_are_told(tower, context, run_op):
    said = []
    scale = {"scale": {"down_prj": 0, "down_proj": 0.5, "default": 1}}
    run_op(stack(("a", (0, 2), scale)), context(a=("model", tower("a", 0)), report=said.append))
    told = [event.text for event in said if isinstance(event, Warned)]
    assert told == ["slices: 'down_prj' fits no tensor of layers [0, 2] of a"]
