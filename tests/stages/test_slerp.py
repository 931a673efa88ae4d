"""`slerp`: by hand, its laws, and against the textbook formula in float64."""

import math

import pytest
import torch

from hubforge.errors import StepError
from hubforge.op import Place
from hubforge.stages.slerp import Slerp, angle, shares


def slerp(a, b, t):
    op = Slerp(model="a", to="b", t=t)
    w = {"a": torch.as_tensor(a, dtype=torch.float32), "b": torch.as_tensor(b, dtype=torch.float32)}
    return op.tensor(w, Place("w", totals=op.measure(w, Place("w"))))


def test_half_way_between_right_angles():
    torch.testing.assert_close(slerp([1.0, 0.0], [0.0, 1.0], 0.5), torch.tensor([0.5**0.5, 0.5**0.5]))


def test_a_third_of_the_way_is_thirty_degrees_of_ninety():
    expected = torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    torch.testing.assert_close(slerp([1.0, 0.0], [0.0, 1.0], 1 / 3), expected)


def test_lengths_take_part():
    # Between (2, 0) and (0, 1) the arc's shares at the middle are sin 45° / sin 90° each.
    torch.testing.assert_close(slerp([2.0, 0.0], [0.0, 1.0], 0.5), torch.tensor([2 * 0.5**0.5, 0.5**0.5]))


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.9])
def test_agrees_with_the_arccosine_where_that_is_accurate(t):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(100, generator=generator), torch.randn(100, generator=generator)
    x, y = a.double(), b.double()
    theta = torch.arccos(x @ y / (x.norm() * y.norm()))
    expected = (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)
    torch.testing.assert_close(slerp(a, b, t), expected.float())


def test_the_angle_of_nearly_equal_models_is_exact():
    # A float32 arccosine of 1 - 5e-15 is 0.
    assert angle(aa=1.0, ad=0.0, dd=1e-14) == pytest.approx(1e-7, rel=1e-12)
    assert angle(aa=1.0, ad=-1.0, dd=2.0) == pytest.approx(math.pi / 2, rel=1e-15)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.0, 0.0], [2.0, 4.0], [0.5, 1.0]),
        ([2.0, 4.0], [0.0, 0.0], [1.5, 3.0]),
        ([2.0, 4.0], [4.0, 8.0], [2.5, 5.0]),
        ([2.0, 4.0], [-2.0, -4.0], [1.0, 2.0]),
    ],
    ids=["zero model", "zero other", "parallel", "opposite"],
)
def test_without_an_arc_it_goes_straight(a, b, expected):
    torch.testing.assert_close(slerp(a, b, 0.25), torch.tensor(expected), rtol=1e-5, atol=0)


def test_shares_of_the_ends():
    assert shares(1.0, 0.0) == (1.0, 0.0)
    assert shares(1.0, 1.0) == (0.0, 1.0)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_are_the_models_bit_for_bit(t, tiny_llama, tiny_llama_other, context, run_op, tensors_of):
    ctx = context(m=("model", tiny_llama), o=("model", tiny_llama_other))
    run_op(Slerp(model="m", to="o", t=t), ctx)
    expected, found = tensors_of(tiny_llama_other if t else tiny_llama), tensors_of(ctx.out)
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)


def test_a_model_with_itself_changes_no_bit(tiny_llama, context, run_op, tensors_of):
    ctx = context(m=("model", tiny_llama), o=("model", tiny_llama))
    metrics = run_op(Slerp(model="m", to="o", t=0.3), ctx)
    expected, found = tensors_of(tiny_llama), tensors_of(ctx.out)
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)
    assert metrics["gain"]["tensors"] == 0


def test_a_merged_model_loads_and_lies_between(tiny_llama, tiny_llama_other, context, run_op, tensors_of):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ctx = context(m=("model", tiny_llama), o=("model", tiny_llama_other))
    metrics = run_op(Slerp(model="m", to="o", t=0.3, max_shard_size=1e-4), ctx)
    model, report = AutoModelForCausalLM.from_pretrained(ctx.out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.num_parameters() == metrics["parameters"]
    assert AutoTokenizer.from_pretrained(ctx.out)("a").input_ids
    ours, theirs, merged = tensors_of(tiny_llama), tensors_of(tiny_llama_other), tensors_of(ctx.out)
    for name in merged:
        expected = slerp(ours[name].float(), theirs[name].float(), 0.3).bfloat16()
        assert torch.equal(merged[name], expected), name


def test_whole_models_have_one_angle(checkpoint_folder, context, run_op, tensors_of):
    one = checkpoint_folder("one", {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[0.0], [1.0]])})
    two = checkpoint_folder("two", {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([[1.0], [2.0]])})
    ctx = context(m=("model", one), o=("model", two))
    run_op(Slerp(model="m", to="o", t=0.5, scope="whole"), ctx)
    # (1, 0, 0, 1) · (0, 3, 1, 2) = 2, the lengths are √2 and √14.
    theta = math.acos(2 / math.sqrt(2 * 14))
    share = math.sin(theta / 2) / math.sin(theta)
    found = tensors_of(ctx.out)
    torch.testing.assert_close(found["a"], share * torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found["b"], share * torch.tensor([[1.0], [3.0]]))


def test_the_angle_of_whole_models_does_not_depend_on_threads_or_shards(checkpoint_folder, context, run_op, family):
    made = []
    for shards, threads in ((1, 1), (2, 2)):
        folders = [checkpoint_folder(f"{r}{shards}", {"x": family[r], "y": family[r].T}, shards=shards) for r in "ab"]
        ctx = context(f"out{shards}", m=("model", folders[0]), o=("model", folders[1]))
        run_op(Slerp(model="m", to="o", t=[0.3, 0.6], scope="whole"), ctx, threads)
        made.append(ctx.sha256["model.safetensors"])
    assert made[0] == made[1]


def test_whole_models_take_no_tokenizer():
    with pytest.raises(ValueError, match="takes no tokenizer"):
        Slerp(model="a", to="b", t=0.5, scope="whole", tokenizer="base")


def test_a_tensor_that_one_model_lacks(checkpoint_folder, context, run_op, tensors_of):
    one = checkpoint_folder("one", {"a": torch.ones(2), "b": torch.ones(2)})
    two = checkpoint_folder("two", {"a": -torch.ones(2), "c": torch.ones(2)})
    ctx = context(m=("model", one), o=("model", two))
    with pytest.raises(StepError, match=r"o has tensor c, which .*one lacks"):
        run_op(Slerp(model="m", to="o", t=0.5), ctx)
    run_op(Slerp(model="m", to="o", t=0.25, missing="base"), ctx)
    assert {name: tensor.tolist() for name, tensor in tensors_of(ctx.out).items()} == {"a": [0.5, 0.5], "b": [1.0, 1.0]}


def test_shapes_that_differ_are_named_with_both_files(checkpoint_folder, context, run_op):
    ctx = context(
        m=("model", checkpoint_folder("one", {"a": torch.ones(2, 3)})),
        o=("model", checkpoint_folder("two", {"a": torch.ones(3, 2)})),
    )
    with pytest.raises(StepError, match=r"a is \[2, 3\] in .*one/model.safetensors, but a is \[3, 2\] in .*two/model"):
        run_op(Slerp(model="m", to="o", t=0.5), ctx)


def test_t_lies_between_zero_and_one():
    with pytest.raises(ValueError, match="must lie in"):
        Slerp(model="a", to="b", t=1.5)
