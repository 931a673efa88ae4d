"""`apply`: by hand, its laws, and beside PEFT."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hubforge.errors import SourceError, StepError
from hubforge.events import Warned
from hubforge.op import Place
from hubforge.stages.apply import Apply, Known, layer_importance
from hubforge.tensors.gate import normalized


def test_apply_adds_the_scaled_product():
    op = Apply(model="m", adapters=["a", "b"], weights=[1.0, -2.0], scale=0.5)
    w = {"m": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([[2.0, 0.0]]), "b": torch.tensor([[0.0, 3.0]])}
    # 1 + 0.5 * 2, 2 - 0.5 * 2 * 3
    assert op.tensor(w, Place("w")).tolist() == [[2.0, -1.0]]


def test_scale_and_weights_may_differ_by_module_and_layer():
    fields = {"weights": [{"mlp": 2, "default": 1}, [0, 4]], "scale": [1, 3]}
    op = Apply(model="m", adapters=["a", "b"], **fields)
    w = {ref: torch.ones(1, 1) for ref in "mab"}
    found = {}
    for module, layer in [("mlp", 0), ("mlp", 2), ("self_attn", 1)]:
        found[module, layer] = op.tensor(w, Place(f"model.layers.{layer}.{module}.x", layer, known=Known({}, depth=3)))
    expected = {("mlp", 0): 1 + 1 * (2 + 0), ("mlp", 2): 1 + 3 * (2 + 4), ("self_attn", 1): 1 + 2 * (1 + 2)}
    assert {key: tensor.item() for key, tensor in found.items()} == expected


def test_modules_that_a_schedule_leaves_out_keep_their_bits(tiny_llama, tiny_loras, context, run_op, tensors_of):
    said = []
    ctx = context(m=("model", tiny_llama), a=("adapter", tiny_loras["one"]), report=said.append)
    run_op(Apply(model="m", adapters=["a"], scale={"mlp.*": 1, "mpl.*": 2, "default": 0}), ctx)
    found, before = tensors_of(ctx.out), tensors_of(tiny_llama)
    assert {name for name in found if not torch.equal(found[name], before[name])} == {n for n in before if ".mlp." in n}
    assert [event.text for event in said if isinstance(event, Warned)][:1] == ["scale: 'mpl.*' fits no tensor of m"]


def test_importance_damps_weights_and_layers():
    op = Apply(model="m", adapters=["a"], importance="f")
    w = {"m": torch.zeros(1, 3), "a": torch.ones(1, 3), "f": torch.tensor([[2.0, 3.0, 4.0]])}
    at = Place("w", layer=1, known=Known({0: 0.0, 1: 0.25}), totals=op.measure(w, Place("w")))
    # F_param = [0, .5, 1], F_layer = .25
    assert op.tensor(w, at).tolist() == [[0.75, 0.375, 0.0]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("minmax", [0.0, 0.0, 9 / 99, 1.0]),
        ("log", [0.0, 0.0, 0.5, 1.0]),
        ("rank", [1 / 6, 1 / 6, 2 / 3, 1.0]),
    ],
)
def test_normalized(how, expected):
    fisher = torch.tensor([1.0, 1.0, 10.0, 100.0])
    torch.testing.assert_close(normalized(fisher, how, {"min": 1.0, "max": 100.0}), torch.tensor(expected))


def test_clip_counts_the_top_percent_as_one():
    fisher = torch.arange(200.0)
    fisher[-1] = 1e9
    found = normalized(fisher, "clip", {})
    assert found[198] == found[199] == 1.0
    assert found[99] == 99 / 197


def test_equal_importance_damps_nothing():
    assert normalized(torch.full((4,), 3.0), "minmax", {"min": 3.0, "max": 3.0}).tolist() == [0.0] * 4


@pytest.mark.parametrize("how", ["minmax", "log", "sqrt", "rank", "clip"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "holds values from nan to nan"), (-1.0, "holds values from -1 to 0"), (0.0, "is zero throughout")],
    ids=["nan", "negative", "zero"],
)
def test_a_damaged_fisher_damps_nothing_and_is_named(
    how, value, message, tiny_llama, tiny_loras, checkpoint_folder, context, run_op, tensors_of
):
    fisher = {
        name: torch.ones_like(tensor).cumsum(1) for name, tensor in tensors_of(tiny_llama).items() if "proj" in name
    }
    name = "model.layers.1.mlp.up_proj.weight"
    fisher[name] = torch.zeros_like(fisher[name])
    fisher[name][3, 5] = value
    inputs = {
        "m": ("model", tiny_llama),
        "a": ("adapter", tiny_loras["one"]),
        "f": ("mask", checkpoint_folder("f", fisher)),
    }
    op = Apply(model="m", adapters=["a"], importance="f", normalize=how, layer_damping=False)
    with pytest.raises(StepError, match=f"{name} of f {message}"):
        run_op(op, context(**inputs))


def test_layer_importance_is_minmax_of_sums():
    facts = {"layers": {"0": {"sum": 1.0}, "1": {"sum": 3.0}, "10": {"sum": 5.0}}}
    assert layer_importance(facts) == {0: 0.0, 1: 0.5, 10: 1.0}


def test_scale_zero_is_the_model_bit_for_bit(tiny_llama, tiny_loras, context, run_op, tensors_of):
    ctx = context(m=("model", tiny_llama), a=("adapter", tiny_loras["one"]))
    metrics = run_op(Apply(model="m", adapters=["a"], scale=0.0), ctx)
    before, after = tensors_of(tiny_llama), tensors_of(ctx.out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)
    assert metrics["changed"] == 0


@pytest.mark.parametrize("adapter", ["one", "low", "rs"])
def test_apply_gives_the_bits_of_pefts_merge(adapter, tiny_llama, tiny_loras, context, run_op, tensors_of):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx = context(m=("model", tiny_llama), a=("adapter", tiny_loras[adapter]))
    metrics = run_op(Apply(model="m", adapters=["a"]), ctx)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, tiny_loras[adapter]).merge_and_unload().state_dict()
    found = tensors_of(ctx.out)
    assert found.keys() == merged.keys()
    assert metrics["changed"] == 14
    for name in found:
        assert torch.equal(found[name], merged[name]), name


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"modules_to_save": ("input_layernorm", "up_proj")},
        {"use_dora": True, "modules_to_save": ("norm",)},
    ],
    ids=["dora", "dora and rslora", "whole modules", "both"],
)
def test_dora_and_whole_modules_as_peft_merges_them(more, tiny_llama, tmp_path, context, run_op, tensors_of):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hubforge.lab.tiny import tiny_lora

    folder = tiny_lora(tmp_path / "a", tiny_llama, seed=3, target_modules=("q_proj", "down_proj"), **more)
    ctx = context(m=("model", tiny_llama), a=("adapter", folder))
    run_op(Apply(model="m", adapters=["a"], dtype="float32"), ctx)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    found, before, changed = tensors_of(ctx.out), tensors_of(tiny_llama), set()
    for name in found:
        # Both in float32; PEFT holds the norms in its own order.
        torch.testing.assert_close(found[name], merged[name], rtol=1e-6, atol=1e-6)
        if not torch.equal(found[name], before[name].float()):
            changed.add(name.split(".")[-2])
    ends = ("q_proj", "down_proj", *more.get("modules_to_save", ()))
    assert changed == {name.split(".")[-2] for name in found if name.endswith(tuple(f"{end}.weight" for end in ends))}
    assert any(not torch.equal(merged[name], plain[name]) for name in plain)


def tiny_gpt2(folder):
    """A GPT-2, whose layers are Conv1D: their weights are (in_features, out_features)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(folder)
    Tokenizer(WordLevel({"a": 0}, "a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def dora_on(folder, base, *targets, spread=0.1, use_dora=True, **more):
    """An adapter by PEFT with all its factors drawn, and its magnitudes too unless `spread` is 0."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, use_dora=use_dora, target_modules=list(targets), **more)
    adapted, generator = get_peft_model(model, config), torch.Generator().manual_seed(1)
    for name, value in adapted.named_parameters():
        if "lora_magnitude_vector" in name:
            value.data *= 1 + spread * torch.randn(value.shape, generator=generator)
        elif "lora_" in name:
            value.data = spread * torch.randn(value.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "targets", "more"),
    [
        ("llama", ("embed_tokens", "q_proj"), {}),
        ("llama", ("embed_tokens",), {"use_rslora": True}),
        ("gpt2", ("c_attn", "c_fc", "c_proj"), {"fan_in_fan_out": True}),
        ("gpt2", ("attn.c_proj", "c_fc", "lm_head"), {}),
        ("gpt2", ("c_attn", "wte"), {"fan_in_fan_out": True, "rank_pattern": {"wte": 2}}),
    ],
    ids=["embeddings", "embeddings and rslora", "conv1d", "conv1d and linear", "both"],
)
def test_dora_by_columns_as_peft_merges_it(family, targets, more, tiny_llama, tmp_path, context, run_op, tensors_of):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_llama if family == "llama" else tiny_gpt2(tmp_path / "gpt2")
    folder = dora_on(tmp_path / "a", base, *targets, **more)
    ctx = context(m=("model", base), a=("adapter", folder))
    run_op(Apply(model="m", adapters=["a"], dtype="float32"), ctx)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    found, before, changed = tensors_of(ctx.out), tensors_of(base), set()
    for name in found:
        # Both in float32; PEFT holds the norms in its own order.
        torch.testing.assert_close(found[name], merged[name], rtol=1e-6, atol=1e-6)
        if not torch.equal(found[name], before[name].float()):
            changed.add(name.split(".")[-2])
    assert changed == {target.split(".")[-1] for target in targets}


@pytest.mark.parametrize("tied", [False, True], ids=["a head", "tied"])
def test_tables_that_peft_saves_where_tokens_were_added(tied, tmp_path, context, run_op, tensors_of):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from hubforge.lab.tiny import draw_weights, tiny_llama

    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m", tie_word_embeddings=tied))
    tokens = model.get_input_embeddings().weight.shape[0] + 2
    model.resize_token_embeddings(tokens, mean_resizing=False)
    shutil.copytree(tmp_path / "m", tmp_path / "more", ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(tmp_path / "more")
    draw_weights(model.get_input_embeddings(), 1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "a")
    assert tensors_of(tmp_path / "a")["base_model.model.lm_head.weight"].shape[0] == tokens
    run_op(
        Apply(model="m", adapters=["a"]), ctx := context(m=("model", tmp_path / "more"), a=("adapter", tmp_path / "a"))
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    merged = PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload().state_dict()
    found, before = tensors_of(ctx.out), tensors_of(tmp_path / "more")
    assert all(torch.equal(found[name], merged[name]) for name in before)
    assert not torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_embeddings_that_an_adapter_was_trained_on_take_their_place(
    use_dora, tiny_llama, tiny_llama_other, tmp_path, context, run_op, tensors_of
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # PEFT saves adapted embeddings whole, beside the factors, and loads them so.
    folder = dora_on(tmp_path / "a", tiny_llama_other, "embed_tokens", use_dora=use_dora)
    ctx = context(m=("model", tiny_llama), a=("adapter", folder))
    run_op(Apply(model="m", adapters=["a"], dtype="float32"), ctx)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    found = tensors_of(ctx.out)
    for name in found:
        torch.testing.assert_close(found[name], merged[name], rtol=1e-6, atol=1e-6)


def test_dora_of_embeddings_that_changes_nothing_gives_them(tiny_llama, tmp_path, context, run_op, tensors_of):
    folder = dora_on(tmp_path / "a", tiny_llama, "embed_tokens", spread=0.0)
    ctx = context(m=("model", tiny_llama), a=("adapter", folder))
    run_op(Apply(model="m", adapters=["a"], dtype="float32"), ctx)
    for name, tensor in tensors_of(tiny_llama).items():
        # Times the magnitude, over the norm, minus the base and plus it: five roundings of float32.
        torch.testing.assert_close(tensors_of(ctx.out)[name], tensor.float(), rtol=5 * 2**-23, atol=0)


def test_dora_by_columns_is_the_same_in_any_blocks(tmp_path, tiny_llama, context, run_op, tensors_of, monkeypatch):
    folder = dora_on(tmp_path / "a", tiny_llama, "embed_tokens")
    found = []
    for number, (threads, block) in enumerate([(1, 1 << 18), (4, 1 << 10)]):
        monkeypatch.setattr("hubforge.tensors.targets.BLOCK", block)
        ctx = context(f"out{number}", m=("model", tiny_llama), a=("adapter", folder))
        run_op(Apply(model="m", adapters=["a"]), ctx, threads)
        found.append(tensors_of(ctx.out))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_dora_adapter_that_changes_nothing_gives_the_model(tiny_llama, tmp_path, context, run_op, tensors_of):
    from hubforge.lab.tiny import tiny_lora

    # std 0: B and A are zero and the magnitudes are the rows' norms.
    folder = tiny_lora(tmp_path / "a", tiny_llama, std=0.0, use_dora=True)
    ctx = context(m=("model", tiny_llama), a=("adapter", folder))
    run_op(Apply(model="m", adapters=["a"], dtype="float32"), ctx)
    for name, tensor in tensors_of(tiny_llama).items():
        # PEFT takes the norms in the base's bfloat16: half a unit in the last of its 8 bits.
        torch.testing.assert_close(tensors_of(ctx.out)[name], tensor.float(), rtol=2**-8, atol=1e-7)


def test_merged_model_computes_what_the_adapter_computes(tiny_llama, tiny_loras, context, run_op):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx = context(m=("model", tiny_llama), a=("adapter", tiny_loras["rs"]))
    run_op(Apply(model="m", adapters=["a"], dtype="float32"), ctx)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tiny_loras["rs"])(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(ctx.out)
        assert merged.dtype == torch.float32
        # float32 sums in another order.
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (plain - adapted).abs().max() > 0.1


def fisher_folder(tmp_path, model_tensors, names, layers):
    folder = tmp_path / "fisher"
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    fisher = {n: torch.rand(model_tensors[n].shape, generator=generator).square().bfloat16() for n in names}
    save_file(fisher, folder / "fisher.safetensors")
    save_file({"other.U": torch.zeros(1)}, folder / "subspace.safetensors")  # published folders hold both masks
    sums = {str(i): {"sum": float(i), "mean": 0.0, "count": 1} for i in range(layers)}
    (folder / "layer_importance.json").write_text(json.dumps({"layers": sums}))
    return folder, fisher


@pytest.mark.parametrize("how", ["minmax", "log", "rank", "clip"])
def test_damped_merge_equals_the_formula(how, tmp_path, tiny_llama, tiny_loras, context, run_op, tensors_of):
    weights = tensors_of(tiny_llama)
    names = [name for name in weights if "proj" in name]
    folder, fisher = fisher_folder(tmp_path, weights, names, 2)
    ctx = context(m=("model", tiny_llama), a=("adapter", tiny_loras["one"]), f=("mask", folder))
    run_op(Apply(model="m", adapters=["a"], importance="f", scale=0.3, normalize=how, dtype="float32"), ctx)
    found = tensors_of(ctx.out)
    lora = tensors_of(tiny_loras["one"])
    for name in names:
        f = fisher[name].float()
        gate = 1 - normalized(
            f, how, {"min": float(f[f > 0].min() if how == "log" else f.min()), "max": float(f.max())}
        )
        key = f"base_model.model.{name.removesuffix('.weight')}"
        delta = 2.0 * (lora[f"{key}.lora_B.weight"].float() @ lora[f"{key}.lora_A.weight"].float())
        layer = 1.0 - int(name.split(".")[2])  # sums 0 and 1: the top layer does not change
        torch.testing.assert_close(found[name], weights[name].float() + 0.3 * layer * gate * delta)


def test_a_mask_may_be_given_as_its_file(tmp_path, tiny_llama, tiny_loras, context, run_op, tensors_of):
    names = [name for name in tensors_of(tiny_llama) if "proj" in name]
    folder, _ = fisher_folder(tmp_path, tensors_of(tiny_llama), names, 2)
    inputs = {"m": ("model", tiny_llama), "a": ("adapter", tiny_loras["one"])}
    merged = []
    for mask in (folder, folder / "fisher.safetensors"):
        ctx = context(**inputs, f=("mask", mask))
        run_op(Apply(model="m", adapters=["a"], importance="f"), ctx)
        merged.append(tensors_of(ctx.out))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_a_mask_that_lacks_a_tensor_is_named(tmp_path, tiny_llama, tiny_loras, context, run_op, tensors_of):
    weights = tensors_of(tiny_llama)
    folder, _ = fisher_folder(tmp_path, weights, ["model.layers.0.mlp.up_proj.weight"], 2)
    ctx = context(m=("model", tiny_llama), a=("adapter", tiny_loras["one"]), f=("mask", folder))
    with pytest.raises(StepError, match=r"f has no importance for model\.layers\.0\.\w+\.\w+\.weight"):
        run_op(Apply(model="m", adapters=["a"], importance="f"), ctx)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(checkpoint_folder, adapter_folder, context, run_op):
    model = checkpoint_folder("m", {"model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4).bfloat16()})
    adapter = adapter_folder("a", {"model.layers.0.mlp.up_proj": (torch.ones(2, 5), torch.ones(6, 2))})
    ctx = context(m=("model", model), a=("adapter", adapter))
    with pytest.raises(SourceError, match=r"up_proj is \[6, 5\], but .*up_proj\.weight in .* is \[6, 4\]"):
        run_op(Apply(model="m", adapters=["a"]), ctx)


def test_as_many_weights_as_adapters():
    with pytest.raises(ValueError, match="weights has 1 entries for 2 adapters"):
        Apply(model="m", adapters=["a", "b"], weights=[1.0])
