"""`average`: by hand, exactness over ranks, and beside PEFT's `cat`."""

import json

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.average import Average, stack_factors
from hubforge.tensors.adapter import delta, open_adapter


def deltas(folder):
    with open_adapter(folder) as adapter:
        return {name: delta(module, *adapter.factors(name)) for name, module in adapter.modules.items()}


def test_stacked_factors_add_up():
    one = (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
    two = (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 5.0]]))
    a, b = stack_factors([(one, 2.0), (two, -1.0)], rank=4)
    assert (a.shape, b.shape) == ((4, 2), (1, 4))
    # 2 * 3 * (1, 2) - (5, 1)
    assert (b @ a).tolist() == [[1.0, 11.0]]


def test_mean_of_adapters_of_any_rank(tiny_loras, context, run_op):
    ctx = context(**{name: ("adapter", tiny_loras[name]) for name in ("one", "low", "rs")})
    metrics = run_op(Average(adapters=["one", "low", "rs"], weights=[2.0, 1.0, 1.0]), ctx)
    assert metrics["rank"] == 8 + 4 + 4 and metrics["modules"] == 14
    merged = deltas(ctx.out)
    parts = [deltas(tiny_loras[name]) for name in ("one", "low", "rs")]
    assert merged.keys() == parts[0].keys()
    for name, found in merged.items():
        torch.testing.assert_close(found, (2 * parts[0][name] + parts[1][name] + parts[2][name]) / 4)


def test_average_of_one_adapter_twice_is_that_adapter(tiny_loras, context, run_op):
    ctx = context(a=("adapter", tiny_loras["rs"]), b=("adapter", tiny_loras["rs"]))
    run_op(Average(adapters=["a", "b"]), ctx)
    for name, found in deltas(tiny_loras["rs"]).items():
        torch.testing.assert_close(deltas(ctx.out)[name], found)


def test_average_has_the_factors_of_pefts_cat(tiny_llama, tiny_loras, context, run_op, tensors_of, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx = context(a=("adapter", tiny_loras["one"]), b=("adapter", tiny_loras["low"]))
    # PEFT stores what `cat` makes in the base's type, here bfloat16.
    run_op(Average(adapters=["a", "b"], weights=[0.75, 0.25], dtype="bfloat16"), ctx)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(model, tiny_loras["one"], adapter_name="a")
    model.load_adapter(tiny_loras["low"], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.75, 0.25], "merged", combination_type="cat")
    model.save_pretrained(tmp_path / "peft", selected_adapters=["merged"])
    expected, found = tensors_of(tmp_path / "peft" / "merged"), tensors_of(ctx.out)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_peft_loads_it_and_computes_the_mean(tiny_llama, tiny_loras, context, run_op):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx = context(a=("adapter", tiny_loras["one"]), b=("adapter", tiny_loras["rs"]))
    run_op(Average(adapters=["a", "b"]), ctx)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), ctx.out)
    module = model.base_model.model.model.layers[1].mlp.up_proj
    parts = [deltas(tiny_loras[name])["model.layers.1.mlp.up_proj"] for name in ("one", "rs")]
    torch.testing.assert_close(module.get_delta_weight("default"), (parts[0] + parts[1]) / 2)
    config = json.loads((ctx.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)


def test_modules_that_only_one_adapter_has_count_as_zero_elsewhere(adapter_folder, context, run_op):
    both = adapter_folder(
        "both", {"l.0.q": (torch.ones(1, 2), torch.ones(3, 1)), "l.0.v": (torch.ones(1, 2), torch.ones(2, 1))}
    )
    only = adapter_folder("only", {"l.0.q": (torch.ones(2, 2), torch.ones(3, 2))}, target_modules=["q"])
    ctx = context(a=("adapter", both), b=("adapter", only))
    run_op(Average(adapters=["a", "b"]), ctx)
    found = deltas(ctx.out)
    assert found["l.0.q"].unique().tolist() == [1.5]  # (1 + 2) / 2
    assert found["l.0.v"].unique().tolist() == [0.5]
    assert json.loads((ctx.out / "adapter_config.json").read_text())["target_modules"] == ["l.0.q", "l.0.v"]


def test_adapters_of_two_bases_are_refused(adapter_folder, context, run_op):
    one = adapter_folder("one", {"l.0.q": (torch.ones(1, 2), torch.ones(3, 1))})
    two = adapter_folder("two", {"l.0.q": (torch.ones(1, 4), torch.ones(3, 1))})
    ctx = context(a=("adapter", one), b=("adapter", two))
    with pytest.raises(StepError, match=r"the delta of l\.0\.q is \[3, 2\] in .*one/.*, but \[3, 4\] in .*two/"):
        run_op(Average(adapters=["a", "b"]), ctx)
    assert not (ctx.out / "adapter_model.safetensors").exists()


def test_weights_whose_sum_is_zero():
    with pytest.raises(ValueError, match="whose sum is not 0"):
        Average(adapters=["a", "b"], weights=[1.0, -1.0])
