"""`linear`: by hand, its laws, and against float64."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.op import Place
from hubforge.stages.linear import Linear


def mean(tensors, **fields):
    w = {name: torch.tensor(values) for name, values in tensors.items()}
    return Linear(models=list(tensors), **fields).tensor(w, Place("w"))


def test_weighted_mean():
    tensors = {"a": [1.0, 2.0], "b": [5.0, 0.0]}
    assert mean(tensors).tolist() == [3.0, 1.0]
    assert mean(tensors, weights=[3.0, 1.0]).tolist() == [2.0, 1.5]
    assert mean(tensors, weights=[3.0, 1.0], normalize=False).tolist() == [8.0, 6.0]


def test_the_sum_is_divided_and_not_the_weights():
    assert mean({"a": [4.0], "b": [10.0], "c": [1.0]}).tolist() == [5.0]  # By thirds in float32: 5.0000005.


def test_a_single_weight_keeps_the_models_bits():
    values = torch.linspace(0.1, 0.9, 100).tolist()
    assert mean({"a": values, "b": values[::-1]}, weights=[0.7, 0.0]).tolist() == torch.tensor(values).tolist()


def test_agrees_with_float64_rounded_once(tiny_llama, tiny_llama_other, context, run_op, tensors_of):
    ctx = context(a=("model", tiny_llama), b=("model", tiny_llama_other))
    run_op(Linear(models=["a", "b"], weights=[1.0, 3.0]), ctx)
    a, b, found = tensors_of(tiny_llama), tensors_of(tiny_llama_other), tensors_of(ctx.out)
    assert found.keys() == a.keys()
    for name in found:
        # A quarter and three quarters of bfloat16 values are exact in float32 but for the last of their sum's bits.
        expected = 0.25 * a[name].double() + 0.75 * b[name].double()
        torch.testing.assert_close(found[name].double(), expected, rtol=2**-8, atol=0)
        assert (found[name] == expected.bfloat16()).float().mean() > 0.999


def test_a_weight_of_zero_leaves_the_other_bit_for_bit(tiny_llama, tiny_llama_other, context, run_op, tensors_of):
    ctx = context(a=("model", tiny_llama), b=("model", tiny_llama_other))
    run_op(Linear(models=["a", "b"], weights=[0.0, 2.0]), ctx)
    expected, found = tensors_of(tiny_llama_other), tensors_of(ctx.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_model_alone_is_multiplied(tiny_llama, context, run_op, tensors_of):
    ctx = context(a=("model", tiny_llama))
    run_op(Linear(models=["a"], weights=[{"mlp": [1.0, 2.0], "default": 0.5}], normalize=False), ctx)
    before, found = tensors_of(tiny_llama), tensors_of(ctx.out)
    factors = {name: 0.5 if ".mlp." not in name else 1.0 if ".layers.0." in name else 2.0 for name in before}
    assert all(torch.equal(found[name], before[name] * factor) for name, factor in factors.items())


def test_a_tensor_that_one_lacks(checkpoint_folder, context, run_op, tensors_of):
    one = checkpoint_folder("one", {"a": torch.zeros(2), "b": torch.ones(2)})
    two = checkpoint_folder("two", {"a": torch.ones(2)})
    ctx = context(m=("model", one), o=("model", two))
    with pytest.raises(StepError, match="o has no tensor b, which m has"):
        run_op(Linear(models=["m", "o"]), ctx)
    run_op(Linear(models=["m", "o"], weights=[1.0, 3.0], missing="base"), ctx)
    assert {name: t.tolist() for name, t in tensors_of(ctx.out).items()} == {"a": [0.75, 0.75], "b": [1.0, 1.0]}


def test_weights_that_sum_to_zero_in_one_tensor(tiny_llama, tiny_llama_other, context, run_op):
    ctx = context(a=("model", tiny_llama), b=("model", tiny_llama_other))
    with pytest.raises(StepError, match=r"that have model.layers.1.* sum to 0\n.*`normalize: false`"):
        run_op(Linear(models=["a", "b"], weights=[1.0, [1.0, -1.0]]), ctx)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ["a", "b"], "weights": [1.0]}, "weights has 1 entries for 2 models"),
        ({"models": ["a", "b"], "weights": [1.0, -1.0]}, "whose sum is not 0"),
        ({"models": ["a", "a"]}, "names one model twice"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Linear(**fields)
