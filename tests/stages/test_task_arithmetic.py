"""`task_arithmetic`: by hand, its laws, and one wrong input."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.op import Place
from hubforge.stages.dare_linear import DareLinear
from hubforge.stages.task_arithmetic import TaskArithmetic


def test_by_hand():
    w = {"m": torch.tensor([1.0, 1.0]), "a": torch.tensor([2.0, 1.0]), "b": torch.tensor([1.0, 5.0])}
    op = TaskArithmetic(model="m", models=["a", "b"], weights=[2.0, -1.0], scale=0.5)
    # 1 + .5 * 2 * 1, 1 - .5 * 4
    assert op.tensor(w, Place("w")).tolist() == [2.0, -1.0]


@pytest.mark.parametrize(
    "op",
    [
        TaskArithmetic(model="m", models=["a"], scale={"mlp": 0.5, "default": [1, 3]}),
        DareLinear(base_model="m", models=["a"], scale={"mlp": 0.5, "default": [1, 3]}),
    ],
    ids=["alone", "its family"],
)
def test_the_scale_may_differ_by_module_and_layer(op, merge):
    w = {"m": [1.0], "a": [3.0]}
    names = {"model.layers.2.mlp.up_proj.weight": 2, "model.layers.1.norm.weight": 1, "model.norm.weight": None}
    found = [merge(op, w, name=name, layer=layer, known=3).item() for name, layer in names.items()]
    assert found == [1 + 0.5 * 2, 1 + 2 * 2, 1 + 1 * 2]


def test_a_model_that_is_the_base_adds_nothing(tiny_llama, context, run_op, tensors_of):
    ctx = context(m=("model", tiny_llama), a=("model", tiny_llama))
    metrics = run_op(TaskArithmetic(model="m", models=["a"], scale=3.0), ctx)
    expected, found = tensors_of(tiny_llama), tensors_of(ctx.out)
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)
    assert metrics["gain"] == {"tensors": 0, "unchanged": 21}


def test_one_task_vector_is_the_fine_tuned_model(tiny_llama, tiny_llama_other, context, run_op, tensors_of):
    ctx = context(m=("model", tiny_llama), a=("model", tiny_llama_other))
    run_op(TaskArithmetic(model="m", models=["a"], dtype="float32"), ctx)
    expected, found = tensors_of(tiny_llama_other), tensors_of(ctx.out)
    for name in expected:
        # W + (Wa - W) rounds in the difference and in the sum.
        torch.testing.assert_close(found[name], expected[name].float(), rtol=1e-6, atol=1e-7)


def test_a_tensor_that_a_model_lacks(checkpoint_folder, context, run_op):
    one = checkpoint_folder("one", {"a": torch.zeros(2), "b": torch.ones(2)})
    two = checkpoint_folder("two", {"a": torch.ones(2)})
    ctx = context(m=("model", one), o=("model", two))
    with pytest.raises(StepError, match="o has no tensor b, which m has"):
        run_op(TaskArithmetic(model="m", models=["o"]), ctx)


def test_as_many_weights_as_models():
    with pytest.raises(ValueError, match="weights has 1 entries for 2 models"):
        TaskArithmetic(model="m", models=["a", "b"], weights=[1.0])
