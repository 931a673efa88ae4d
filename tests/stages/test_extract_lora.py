"""`extract_lora`: by hand, its laws, the float64 optimum, what is left out, and wrong inputs."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubforge.errors import SourceError, StepError
from hubforge.stages.apply import Apply
from hubforge.stages.extract_lora import ExtractLora
from hubforge.tensors.adapter import delta, open_adapter

Q = "model.layers.0.self_attn.q_proj"


def deltas(folder):
    with open_adapter(folder) as adapter:
        return {name: delta(module, *adapter.factors(name)) for name, module in adapter.modules.items()}


@pytest.fixture
def pair(checkpoint_folder, context):
    """A context of a base of zeros in one or more tensors, and of a model with other values."""

    def make(tensors, **tuned):
        base = checkpoint_folder("base_folder", {name: torch.zeros_like(value) for name, value in tensors.items()})
        model = checkpoint_folder("tuned_folder", tuned.get("tuned", tensors))
        return context(tuned=("model", model), base=("model", base))

    return make


def test_by_hand(pair, run_op):
    # Singular values 8, 6 and 0: rank 1 keeps 64 of the energy of 100.
    ctx = pair({f"{Q}.weight": torch.tensor([[0.0, 8.0], [6.0, 0.0], [0.0, 0.0]])})
    metrics = run_op(ExtractLora(model="tuned", base_model="base", rank=1), ctx)
    torch.testing.assert_close(deltas(ctx.out)[Q], torch.tensor([[0.0, 8.0], [0.0, 0.0], [0.0, 0.0]]))
    ranks = json.loads((ctx.out / "ranks.json").read_text())
    assert ranks == {Q: pytest.approx({"rank": 1, "norm": 10.0, "kept": 0.64, "error": 0.6})}
    assert metrics["energy"]["covered"] == 1 and metrics["energy"]["left_out"] == []
    assert sorted(path.name for path in ctx.out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ranks.json",
    ]


@pytest.mark.parametrize(("energy", "rank"), [(0.64, 1), (0.641, 2), (1.0, 2)])
def test_energy_takes_the_smallest_rank_that_holds_it(energy, rank, pair, run_op):
    ctx = pair({f"{Q}.weight": torch.tensor([[0.0, 8.0], [6.0, 0.0], [0.0, 0.0]])})
    assert run_op(ExtractLora(model="tuned", base_model="base", energy=energy), ctx)["rank"] == rank


@pytest.mark.parametrize("flip", [False, True], ids=["wide", "tall"])
def test_the_error_is_the_optimum_of_float64(flip, pair, run_op):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 24, generator=generator))[0] for n in (24, 60))
    W = left @ torch.diag(1 / torch.arange(1.0, 25.0)) @ right.T  # A slowly decaying spectrum.
    W = W.T.contiguous() if flip else W
    ctx = pair({f"{Q}.weight": W})
    metrics = run_op(ExtractLora(model="tuned", base_model="base", rank=6), ctx)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = U[:, :6] @ torch.diag(S[:6]) @ Vh[:6]
    torch.testing.assert_close(deltas(ctx.out)[Q].double(), best, rtol=0, atol=1e-6)
    assert metrics["energy"]["error"] == pytest.approx(float(S[6:].norm() / S.norm()), rel=1e-5)
    a = load_file(ctx.out / "adapter_model.safetensors")[f"base_model.model.{Q}.lora_A.weight"]
    torch.testing.assert_close(a @ a.T, torch.eye(6), rtol=0, atol=1e-5)


def test_it_gives_back_the_adapter_that_was_applied(tiny_llama, tiny_loras, context, run_op):
    applied = context(out="applied", m=("model", tiny_llama), a=("adapter", tiny_loras["one"]))
    run_op(Apply(model="m", adapters=["a"], dtype="float32"), applied)
    ctx = context(tuned=("model", applied.out), base=("model", tiny_llama))
    metrics = run_op(ExtractLora(model="tuned", base_model="base", rank=8), ctx)
    assert (metrics["rank"], metrics["modules"]) == (8, 14)
    expected, found = deltas(tiny_loras["one"]), deltas(ctx.out)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        # W + Δ was rounded to float32, 2^-24 of weights near 0.2.
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-7)
    assert metrics["energy"]["error"] < 1e-5
    config = json.loads((ctx.out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    assert (config["base_model_name_or_path"], config["task_type"]) == ("base", "CAUSAL_LM")


def test_at_full_rank_peft_computes_the_fine_tuned_model(tiny_llama, tiny_llama_other, context, run_op):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx = context(tuned=("model", tiny_llama_other), base=("model", tiny_llama))
    metrics = run_op(ExtractLora(model="tuned", base_model="base", energy=1), ctx)
    base, tuned = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny_llama, tiny_llama_other))
    # Norms, embeddings and head differ too, which the adapter cannot hold: 2 per layer and 3.
    assert len(metrics["energy"]["left_out"]) == 7 and metrics["energy"]["covered"] < 0.9
    merged = PeftModel.from_pretrained(base, ctx.out).merge_and_unload()
    for name, weight in merged.model.layers.named_parameters():
        if "proj" in name:
            torch.testing.assert_close(weight, tuned.model.layers.get_parameter(name), rtol=0, atol=2e-6)


def test_what_differs_elsewhere_is_named(pair, run_op):
    tensors = {f"{Q}.weight": torch.tensor([[3.0]]), "model.norm.weight": torch.tensor([4.0]), "same": torch.zeros(2)}
    ctx = pair(tensors)
    metrics = run_op(ExtractLora(model="tuned", base_model="base", rank=1), ctx)
    assert metrics["energy"]["left_out"] == ["model.norm.weight"]
    assert metrics["energy"]["covered"] == pytest.approx(9 / 25)


def test_a_killed_extraction_goes_on(pair, run_op, monkeypatch):
    from hubforge.stages import extract_lora

    names = [f"model.layers.{n}.mlp.up_proj" for n in range(3)]
    ctx = pair({f"{name}.weight": torch.full((2, 3), 1.0 + n) for n, name in enumerate(names)})
    op, seen, reduce_matrix = ExtractLora(model="tuned", base_model="base", rank=2), [], extract_lora.reduce_matrix

    def killed(W, *rest):
        seen.append(float(W[0, 0]))
        if seen == [1.0, 2.0]:
            raise KeyboardInterrupt
        return reduce_matrix(W, *rest)

    monkeypatch.setattr(extract_lora, "reduce_matrix", killed)
    with pytest.raises(KeyboardInterrupt):
        run_op(op, ctx)
    run_op(op, ctx)
    assert seen == [1.0, 2.0, 2.0, 3.0]
    assert {name: float(found[1, 1]) for name, found in deltas(ctx.out).items()} == {
        name: pytest.approx(1.0 + n) for n, name in enumerate(names)
    }


def test_matrices_that_do_not_differ_are_left_out(tiny_llama, context, run_op, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_llama, tuned)
    for file in tuned.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{Q}.weight" in tensors:
            tensors[f"{Q}.weight"][0, 0] += 1
            save_file(tensors, file, metadata={"format": "pt"})
    ctx = context(tuned=("model", tuned), base=("model", tiny_llama))
    metrics = run_op(ExtractLora(model="tuned", base_model="base", rank=4), ctx)
    assert metrics["modules"] == 1
    # q_proj of layer 1 has no delta, so "q_proj" alone would name too many.
    assert json.loads((ctx.out / "adapter_config.json").read_text())["target_modules"] == [Q]


def test_models_that_do_not_differ(tiny_llama, context, run_op):
    ctx = context(tuned=("model", tiny_llama), base=("model", tiny_llama))
    with pytest.raises(StepError, match=r"toy\.yaml:7: the models do not differ in any targeted matrix"):
        run_op(ExtractLora(model="tuned", base_model="base", rank=4), ctx)


def test_another_architecture(pair):
    ctx = pair({f"{Q}.weight": torch.zeros(2, 3)}, tuned={f"{Q}.weight": torch.zeros(2, 4)})
    op = ExtractLora(model="tuned", base_model="base", rank=1)
    for step in (op.preflight, op.run):
        with pytest.raises(SourceError, match=r"q_proj.weight is of shape \[2, 4\], but \[2, 3\] in "):
            step(ctx)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.experts.weight"])
def test_targets_that_are_no_linear_layers(name, pair, run_op):
    ctx = pair({name: torch.ones((2, 2, 2) if "experts" in name else (2, 2))})
    with pytest.raises(StepError, match=f"{name} of shape .* is no linear layer"):
        run_op(ExtractLora(model="tuned", base_model="base", rank=1, targets="embed|experts"), ctx)


@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight"], ids=["a matrix", "what is left out"])
def test_nan_is_named_with_its_model(name, pair, run_op):
    ctx = pair({f"{Q}.weight": torch.ones(2, 2)} | {name: torch.full((2, 2), math.nan)})
    with pytest.raises(StepError, match=rf"{name} of tuned \(.*/tuned_folder/model.safetensors\) holds NaN"):
        run_op(ExtractLora(model="tuned", base_model="base", rank=1), ctx)


def test_infinite_bounds_that_both_have_are_no_difference(pair, run_op):
    bounds = {"model.layers.0.clip": torch.tensor([-math.inf, math.inf])}
    ctx = pair({f"{Q}.weight": torch.ones(2, 2)} | bounds)
    base = ctx.inputs["base"].path / "model.safetensors"
    save_file(load_file(base) | bounds, base)
    metrics = run_op(ExtractLora(model="tuned", base_model="base", rank=1), ctx)
    assert metrics["energy"]["covered"] == 1 and metrics["energy"]["left_out"] == []


def test_rank_or_energy_must_be_given():
    with pytest.raises(ValueError, match="either rank or energy"):
        ExtractLora(model="a", base_model="b")


def test_gemma_4_without_the_weights_that_its_model_has_no_place_for(tiny_gemma4, context, run_op, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hubforge.lab.gemma4 import tiny_gemma4 as make

    shutil.copytree(tiny_gemma4, tmp_path / "base")
    make(tmp_path / "tuned", seed=1)
    for value, folder in enumerate([tmp_path / "base", tmp_path / "tuned"]):
        # As Google's checkpoints do, hold the keys of a layer that uses another's.
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file, dead = next(iter(index["weight_map"].values())), "model.layers.3.self_attn.k_proj.weight"
        save_file(load_file(folder / file) | {dead: torch.full((4, 4), float(value))}, folder / file)
        index["weight_map"][dead] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ctx = context(tuned=("model", tmp_path / "tuned"), base=("model", tmp_path / "base"))
    run_op(ExtractLora(model="tuned", base_model="base", rank=3), ctx)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gemma4), ctx.out)
    with open_adapter(ctx.out) as adapter:
        names = set(adapter.modules)
    injected = {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert names == injected and len(names) > 20
