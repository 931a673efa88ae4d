"""`ties_models`: by hand, its laws, against a loop in float64, and through the engine."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.events import Warned
from hubforge.stages.task_arithmetic import TaskArithmetic
from hubforge.stages.ties import Ties
from hubforge.stages.ties_models import TiesModels


def test_by_hand(merge):
    w = {"m": [1.0, 1.0, 1.0, 1.0], "a": [5.0, 0.0, 3.0, 1.1], "b": [0.0, -2.0, 5.0, 1.2]}
    # Half of (4, -1, 2, .1) and of (-1, -3, 4, .2): (4, 0, 2, 0), (0, -3, 4, 0); the third is their mean.
    assert merge(TiesModels(base_model="m", models=["a", "b"], density=0.5), w).tolist() == [5.0, -2.0, 4.0, 1.0]


def test_what_is_kept_can_be_scaled_to_the_size_of_the_whole(merge):
    w = {"m": [1.0, 1.0, 1.0, 1.0], "a": [4.0, 0.0, 2.0, 2.0], "b": [1.0, 1.0, 1.0, 1.0]}
    # Of (3, -1, 1, 1), whose magnitudes sum up to 6, a quarter is 3. b changes nothing, and so stays.
    op = TiesModels(base_model="m", models=["a", "b"], density=0.25, rescale=True)
    assert merge(op, w).tolist() == [7.0, 1.0, 1.0, 1.0] and merge(op, w, rows=1).tolist() == [7.0, 1.0, 1.0, 1.0]
    assert op.measures() == op.model_copy(update={"rescale": False}).measures() + 1
    assert op.model_copy(update={"density": 1.0}).measures() == 0


def test_signs_are_elected_after_weighting(merge):
    w = {"m": [0.0], "a": [3.0], "b": [-2.0]}
    op = TiesModels(base_model="m", models=["a", "b"], weights=[0.1, 10.0], density=1)
    assert merge(op, w).tolist() == [-2.0]


def test_at_least_one_element_is_kept(merge):
    assert merge(TiesModels(base_model="m", models=["a"]), {"m": [0.0] * 3, "a": [1.0, 3.0, 2.0]}).tolist() == [0, 3, 0]


def test_one_model_whole_is_task_arithmetic(merge, family):
    found = merge(TiesModels(base_model="m", models=["a"], density=1, scale=0.6), family)
    expected = merge(TaskArithmetic(model="m", models=["a"], scale=0.6), family)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_against_a_loop_in_float64(merge, family):
    op = TiesModels(
        base_model="m", models=["a", "b", "c"], weights=[1.0, 0.5, -0.3], density=[0.2, 0.5, 0.7], scale=0.9
    )
    merged = merge(op, family, rows=10)
    parts = []
    for ref, density in [("a", 0.2), ("b", 0.5), ("c", 0.7)]:
        delta = (family[ref] - family["m"]).flatten().double()
        kept = torch.zeros_like(delta)
        chosen = delta.abs().argsort(descending=True)[: int(density * delta.numel())]
        kept[chosen] = delta[chosen]
        parts.append(kept.view(64, 48))
    for i in range(0, 64, 9):
        for j in range(48):
            values = [(float(part[i, j]), weight) for part, weight in zip(parts, [1.0, 0.5, -0.3], strict=True)]
            positive = sum(v * w for v, w in values) >= 0
            agreeing = [(v * w, w) for v, w in values if v * w != 0 and (v * w > 0) == positive]
            total = sum(w for _, w in agreeing)
            change = sum(value for value, _ in agreeing) / (total or 1)
            assert merged[i, j].item() == pytest.approx(float(family["m"][i, j]) + 0.9 * change, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_blocks_do_not_matter(rows, merge, family):
    op = TiesModels(base_model="m", models=["a", "b", "c"], weights=[1.0, 0.5, -0.3], density=[0.3, 0.2, 1.0])
    # Few distinct values: most of what is at the threshold is equal to it.
    coarse = {ref: (tensor * 8).round() / 8 for ref, tensor in family.items()}
    for w in (family, coarse):
        assert torch.equal(merge(op, w, rows), merge(op, w))


def test_schedules_include_and_exclude(checkpoint_folder, context, run_op, tensors_of):
    names = [f"model.layers.{i}.{module}.weight" for i in range(3) for module in ("mlp.up_proj", "self_attn.q_proj")]
    base = {name: torch.zeros(1, 4) for name in [*names, "model.norm.weight"]}
    tuned = {name: torch.tensor([[1.0, 2.0, 3.0, 4.0]]) for name in base}
    ctx = context(m=("model", checkpoint_folder("m", base)), a=("model", checkpoint_folder("a", tuned)))
    op = TiesModels(
        base_model="m",
        models=["a"],
        density={"mlp.*": [0.25, 0.75], "default": 1.0},
        exclude=["layers.2.self_attn", "norm"],
    )
    run_op(op, ctx)
    found = {name: int(tensor.count_nonzero()) for name, tensor in tensors_of(ctx.out).items()}
    assert [found[name] for name in names] == [1, 4, 2, 4, 3, 0]
    assert found["model.norm.weight"] == 0
    ctx = context("only", m=("model", ctx.path("m")), a=("model", ctx.path("a")))
    run_op(TiesModels(base_model="m", models=["a"], density=1, include=["layers.1.*"]), ctx)
    found = {name: int(tensor.count_nonzero()) for name, tensor in tensors_of(ctx.out).items()}
    assert [found[name] for name in names] == [0, 0, 4, 4, 0, 0]


def test_patterns_that_fit_nothing_are_told(checkpoint_folder, context, run_op):
    said, folder = [], checkpoint_folder("m", {"model.layers.0.mlp.up_proj.weight": torch.zeros(1, 4)})
    ctx = context(m=("model", folder), a=("model", folder), report=said.append)
    fields = {
        "density": {"mpl.*": 0.3, "up_proj": 0.4, "default": 0.2},
        "weights": [{"mlp": 1, "k_proj": 2, "default": 1}],
    }
    run_op(TiesModels(base_model="m", models=["a"], exclude=["layers.7", "up_proj.bias"], **fields), ctx)
    assert [event.text for event in said if isinstance(event, Warned)] == [
        "exclude: 'layers.7' fits no tensor of m",
        "exclude: 'up_proj.bias' fits no tensor of m",
        "weights: 'k_proj' fits no tensor of m",
        "density: 'mpl.*' fits no tensor of m",
    ]
    with pytest.raises(StepError, match="include and exclude leave no tensor of m to merge"):
        run_op(TiesModels(base_model="m", models=["a"], include=["mpl.*"]), ctx)


def test_a_merged_model_loads(tiny_llama, tiny_llama_other, context, run_op):
    from transformers import AutoModelForCausalLM

    ctx = context(m=("model", tiny_llama), o=("model", tiny_llama_other))
    run_op(TiesModels(base_model="m", models=["o"]), ctx)
    _, report = AutoModelForCausalLM.from_pretrained(ctx.out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_tensor_that_a_model_lacks(checkpoint_folder, context, run_op, tensors_of):
    base = checkpoint_folder("one", {"a": torch.zeros(2), "b": torch.ones(2)})
    lacking = checkpoint_folder("two", {"a": torch.ones(2)})
    ctx = context(m=("model", base), o=("model", lacking))
    with pytest.raises(StepError, match="o has no tensor b, which m has"):
        run_op(TiesModels(base_model="m", models=["o"]), ctx)
    run_op(TiesModels(base_model="m", models=["o"], density=1, missing="base"), ctx)
    assert {name: t.tolist() for name, t in tensors_of(ctx.out).items()} == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ["a", "b"], "weights": [1.0]}, "weights has 1 entries for 2 models"),
        ({"models": ["a", "a"]}, "names one model twice"),
        ({"density": 0}, r"must lie in \(0, 1\]"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        TiesModels(**{"base_model": "m", "models": ["a"]} | fields)


def test_ties_of_adapters_points_here():
    with pytest.raises(ValueError, match="`op: ties_models` merges models"):
        Ties(models=["a", "b"], base_model="m")
