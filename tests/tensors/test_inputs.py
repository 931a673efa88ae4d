"""What a merge makes of checkpoints that do not line up: tied heads, buffers, wrappers, tensors that only some have."""

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.linear import Linear
from hubforge.stages.task_arithmetic import TaskArithmetic

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MEAN = Linear(models=["m", "o"])


def rows(*values):
    return torch.tensor([[float(value)] * 2 for value in values])


@pytest.fixture
def merged(checkpoint_folder, context, run_op, tensors_of):
    """merged(op, tensors of m, of o, config of o): the output's tensors, as lists."""

    def run(op, one, two, **config):
        ctx = context(
            m=("model", checkpoint_folder("one", one)),
            o=("model", checkpoint_folder("two", two, config=config or None)),
        )
        run_op(op, ctx)
        return {name: tensor.tolist() for name, tensor in tensors_of(ctx.out).items()}

    return run


def test_a_head_that_the_other_ties_is_its_embeddings(merged):
    one = {EMBED: rows(1, 3), HEAD: rows(5, 7)}
    found = merged(MEAN, one, {EMBED: rows(3, 5)}, tie_word_embeddings=True)
    assert found == {EMBED: rows(2, 4).tolist(), HEAD: rows(4, 6).tolist()}


def test_a_head_that_only_repeats_tied_embeddings_is_left_out(merged):
    found = merged(MEAN, {EMBED: rows(1, 3)}, {EMBED: rows(3, 5), HEAD: rows(3, 5)})
    assert found == {EMBED: rows(2, 4).tolist()}


def test_a_head_that_the_base_lacks_is_named(merged):
    with pytest.raises(StepError, match=r"o has tensor lm_head.weight, which .* lacks"):
        merged(MEAN, {EMBED: rows(1, 3)}, {EMBED: rows(3, 5), HEAD: rows(3, 6)})


def test_a_head_without_ties_must_be_there(merged):
    with pytest.raises(StepError, match=r"o has no tensor lm_head.weight, which m has"):
        merged(MEAN, {EMBED: rows(1, 3), HEAD: rows(5, 7)}, {EMBED: rows(3, 5)})


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("base", {"a": [2.0], "b": [1.0]}), ("skip", {"a": [2.0]})],
)
def test_tensors_that_only_some_have(missing, expected, merged):
    op = MEAN.model_copy(update={"missing": missing})
    one, two = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.full((1,), 3.0), "c": torch.ones(1)}
    assert merged(op, one, two) == expected


def test_counts_and_flags_keep_the_base_s_values(merged):
    one = {"a": torch.ones(2), "position_ids": torch.arange(3), "seen": torch.tensor([True])}
    two = {"a": torch.zeros(2), "position_ids": torch.arange(3) + 5, "seen": torch.tensor([False])}
    assert merged(MEAN, one, two) == {"a": [0.5, 0.5], "position_ids": [0, 1, 2], "seen": [True]}


@pytest.mark.parametrize("wrapper", ["model.language_model.", "language_model.model.", ""])
def test_names_under_other_wrappers(wrapper, merged):
    name = "layers.0.mlp.up_proj.weight"
    found = merged(MEAN, {f"model.{name}": rows(1)}, {f"{wrapper}{name}": rows(3)})
    assert found == {f"model.{name}": rows(2).tolist()}


def test_mixed_dtypes_are_merged_in_float32_and_keep_the_base_s(checkpoint_folder, context, run_op, tensors_of):
    one = {name: torch.full((2,), 1.0, dtype=dtype) for name, dtype in [("a", torch.bfloat16), ("b", torch.float16)]}
    two = {name: torch.full((2,), 1 + 2**-9) for name in one}
    ctx = context(m=("model", checkpoint_folder("one", one)), o=("model", checkpoint_folder("two", two)))
    run_op(TaskArithmetic(model="m", models=["o"]), ctx)
    found = tensors_of(ctx.out)
    # 2^-9 is half of bfloat16's last place at 1, which goes to even; float16 holds it.
    assert found["a"].tolist() == [1.0, 1.0] and found["a"].dtype == torch.bfloat16
    assert found["b"].tolist() == [1 + 2**-9] * 2 and found["b"].dtype == torch.float16


def test_experts_in_three_dimensions(merged):
    one = {"model.layers.0.mlp.experts.gate_up_proj": torch.arange(24.0).reshape(2, 3, 4)}
    two = {name: tensor + 2 for name, tensor in one.items()}
    expected = (torch.arange(24.0).reshape(2, 3, 4) + 1).tolist()
    assert merged(MEAN, one, two) == dict.fromkeys(one, expected)
