"""`ties`: by hand, its laws, and the bits of PEFT's."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.ties import Ties
from hubforge.tensors.peft_merge import combine, elect_sign, trim


def test_by_hand():
    one, two = torch.tensor([4.0, -1.0, 2.0, 0.1]), torch.tensor([-1.0, -3.0, 4.0, 0.2])
    # Half of each is kept: (4, 0, 2, 0) and (0, -3, 4, 0). Signs: +, -, +, + (a zero sum). Means of what agrees:
    # 4, -3, (2 + 4) / 2; the last has nothing to take the mean of.
    assert combine("ties", [one, two], [1.0, 1.0], density=0.5).tolist() == [4.0, -3.0, 3.0, 0.0]


def test_signs_are_elected_before_weighting():
    one, two = torch.tensor([3.0]), torch.tensor([-2.0])
    assert combine("ties", [one, two], [0.1, 10.0], density=1).tolist() == [pytest.approx(0.3)]


def test_total_and_frequency_differ():
    votes = [torch.tensor([5.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    assert (elect_sign(votes, "total").item(), elect_sign(votes, "frequency").item()) == (1, -1)
    assert elect_sign([torch.tensor([1.0]), torch.tensor([-1.0])], "total").item() == 1


@pytest.mark.parametrize(("density", "kept"), [(0.01, 0), (0.2, 2), (0.29, 2), (1.0, 10)])
def test_trim_keeps_the_largest(density, kept):
    trimmed = trim(torch.arange(1.0, 11.0), density)
    assert trimmed.count_nonzero() == kept
    assert trimmed[10 - kept :].tolist() == list(range(11 - kept, 11))


def test_one_tensor_twice_is_that_tensor():
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(combine("ties", [tensor, tensor], [1.0, 1.0], density=1), tensor)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.7])
def test_of_bfloat16_factors_it_has_pefts_bits(sign, count, density):
    from peft.utils import merge_utils

    # Rounded to bfloat16, as adapters are saved, many magnitudes are equal at the threshold.
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(16, 300, generator=generator).bfloat16().float() for _ in range(count)]
    weights = [0.7 - 0.3 * i for i in range(count)]
    expected = merge_utils.ties(tensors, torch.tensor(weights), density, sign)
    found = combine("ties", tensors, weights, density, sign)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.fixture(scope="module")
def rs_loras(tiny_llama, tmp_path_factory):
    """Two adapters with rsLoRA, and one with patterns of alpha."""
    from hubforge.lab.tiny import tiny_lora

    folder = tmp_path_factory.mktemp("more")
    return {
        "rs1": tiny_lora(folder / "rs1", tiny_llama, rank=8, seed=11, use_rslora=True),
        "alpha": tiny_lora(
            folder / "alpha", tiny_llama, rank=8, seed=13, alpha_pattern={"up_proj": 3, "layers.1.mlp.down_proj": 5}
        ),
    }


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize(
    ("density", "weights", "names"),
    [
        (0.2, [0.4, 0.3, 0.3], ["one", "two", "alpha"]),
        (0.5, [1.0, 1.0], ["one", "two"]),
        (1.0, [2.0, -0.7], ["one", "alpha"]),
        (0.9, [-1.0, -1.0], ["two", "one"]),
        (0.2, [1.0, 1.0], ["rs1", "one"]),
    ],
)
def test_ties_has_the_bits_of_pefts(
    method, density, weights, names, tiny_llama, tiny_loras, rs_loras, context, run_op, tensors_of, tmp_path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folders = tiny_loras | rs_loras
    ctx = context(**{name: ("adapter", folders[name]) for name in names})
    run_op(Ties(adapters=names, weights=weights, density=density, majority_sign_method=method), ctx)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(model, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    options = {"combination_type": "ties", "density": density, "majority_sign_method": method}
    model.add_weighted_adapter(names, weights, "merged", **options)
    model.save_pretrained(tmp_path / "peft", selected_adapters=["merged"])
    expected, found = tensors_of(tmp_path / "peft" / "merged"), tensors_of(ctx.out)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)), name


def test_the_merged_adapter_loads_with_scaling_one(tiny_llama, tiny_loras, rs_loras, context, run_op, tensors_of):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx = context(a=("adapter", rs_loras["rs1"]), b=("adapter", tiny_loras["one"]))
    metrics = run_op(Ties(adapters=["a", "b"], density=0.5), ctx)
    assert (metrics["rank"], metrics["modules"], metrics["dtype"]) == (8, 14, "float32")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), ctx.out)
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    factors = tensors_of(ctx.out)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    torch.testing.assert_close(module.get_delta_weight("default"), factors[key.format("B")] @ factors[key.format("A")])


def test_adapters_of_two_ranks_are_sent_to_average(tiny_loras, context, run_op):
    ctx = context(one=("adapter", tiny_loras["one"]), low=("adapter", tiny_loras["low"]))
    with pytest.raises(StepError, match=r"one rank, but that of model\.layers\.\d.* is 8 in one, 4 in low\n.*average"):
        run_op(Ties(adapters=["one", "low"]), ctx)


@pytest.mark.parametrize("density", [0.0, 1.3])
def test_density_lies_in_zero_to_one(density):
    with pytest.raises(ValueError, match="density"):
        Ties(adapters=["a", "b"], density=density)
