"""`resize_rank`: by hand, its laws, the float64 optimum, and one wrong input."""

import json

import pytest
import torch

from hubforge.errors import SourceError
from hubforge.stages.resize_rank import ResizeRank
from hubforge.tensors.adapter import delta, open_adapter


def deltas(folder):
    with open_adapter(folder) as adapter:
        return {name: delta(module, *adapter.factors(name)) for name, module in adapter.modules.items()}


def test_by_hand(adapter_folder, context, run_op):
    # 2 · B · A is diag(8, 6): rank 1 keeps the 8, 64 of the energy of 100, and is off by 6 / 10.
    factors = (torch.tensor([[0.0, 3.0], [2.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    ctx = context(a=("adapter", adapter_folder("a", {"l.0.q": factors}, lora_alpha=4)))
    metrics = run_op(ResizeRank(adapter="a", rank=1), ctx)
    torch.testing.assert_close(deltas(ctx.out)["l.0.q"], torch.diag(torch.tensor([8.0, 0.0])))
    ranks = json.loads((ctx.out / "ranks.json").read_text())
    assert ranks == {"l.0.q": pytest.approx({"rank": 1, "norm": 10.0, "kept": 0.64, "error": 0.6})}
    assert metrics["rank"] == 1 and metrics["energy"] == {
        "kept": pytest.approx(0.64),
        "error": pytest.approx(0.6),
        "least": ["l.0.q", pytest.approx(0.64)],
    }


@pytest.mark.parametrize(("name", "rank"), [("one", 8), ("one", 11), ("rs", 4)])
def test_a_rank_that_is_enough_keeps_the_deltas(name, rank, tiny_loras, context, run_op, tensors_of):
    ctx = context(a=("adapter", tiny_loras[name]))
    metrics = run_op(ResizeRank(adapter="a", rank=rank), ctx)
    expected, found = deltas(tiny_loras[name]), deltas(ctx.out)
    assert expected.keys() == found.keys()
    for module, values in expected.items():
        # Two roundings of factors to float32, of values near 0.02.
        torch.testing.assert_close(found[module], values, rtol=1e-5, atol=1e-7)
    assert {min(tensor.shape) for tensor in tensors_of(ctx.out).values()} == {rank}
    assert metrics["energy"]["error"] < 1e-7


def test_the_error_is_the_optimum_of_float64(tiny_loras, context, run_op):
    ctx = context(a=("adapter", tiny_loras["one"]))
    run_op(ResizeRank(adapter="a", rank=3), ctx)
    ranks, found = json.loads((ctx.out / "ranks.json").read_text()), deltas(ctx.out)
    for module, values in deltas(tiny_loras["one"]).items():
        S = torch.linalg.svdvals(values.double())
        optimum = float((S[3:] ** 2).sum().sqrt())
        assert float((values - found[module]).double().norm()) == pytest.approx(optimum, rel=1e-5)
        assert ranks[module]["error"] == pytest.approx(optimum / float(S.norm()), rel=1e-5)


def test_mixed_ranks_become_one_that_peft_loads(tiny_llama, context, run_op, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hubforge.lab.tiny import tiny_lora

    mixed = tiny_lora(
        tmp_path / "mixed", tiny_llama, 4, 5, rank_pattern={"up_proj": 9}, alpha_pattern={"up_proj": 3}, use_rslora=True
    )
    ctx = context(a=("adapter", mixed))
    run_op(ResizeRank(adapter="a", rank=9), ctx)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), mixed, adapter_name="mixed")
    model.load_adapter(ctx.out, adapter_name="resized")
    layer = model.base_model.model.model.layers[1]
    for module in (layer.mlp.up_proj, layer.self_attn.k_proj):
        assert module.r["resized"] == 9 and module.scaling["resized"] == 1
        expected = module.get_delta_weight("mixed")
        torch.testing.assert_close(module.get_delta_weight("resized"), expected, rtol=1e-5, atol=1e-7)


def test_a_damaged_adapter_is_named(adapter_folder, context, run_op):
    broken = adapter_folder("a", {"l.0.q": (torch.full((1, 2), torch.nan), torch.ones(3, 1))})
    with pytest.raises(SourceError, match=r"/a/adapter_model.safetensors: .*q.lora_A.weight holds NaN or infinity"):
        run_op(ResizeRank(adapter="a", rank=1), context(a=("adapter", broken)))
