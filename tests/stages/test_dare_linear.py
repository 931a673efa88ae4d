"""`dare_linear`: by hand, its laws, the chances it takes, and what it does not depend on."""

import math

import pytest
import torch

from hubforge.stages.dare_linear import DareLinear
from hubforge.stages.task_arithmetic import TaskArithmetic
from hubforge.tensors import targets
from hubforge.tensors.random import bernoulli, resolved

UP = "model.layers.0.mlp.up_proj.weight"


def dare(**fields):
    return DareLinear(**{"base_model": "m", "models": ["a", "b"], "density": 0.3} | fields)


def test_kept_elements_are_scaled_up(merge):
    # A change of 1 everywhere: what is kept becomes 1 / 0.25, the rest stays.
    merged = merge(dare(models=["a"], density=0.25, seed=1), {"m": torch.zeros(4, 8), "a": torch.ones(4, 8)})
    kept = bernoulli(1, (0, UP), 0, 32, 0.25).view(4, 8)
    assert torch.equal(merged, kept * 4.0)
    assert 0 < kept.sum() < 32


def test_density_one_is_task_arithmetic(merge, family):
    weights = [0.5, -0.3, 2.0]
    found = merge(dare(models=["a", "b", "c"], density=1, weights=weights, scale=0.7), family)
    expected = merge(TaskArithmetic(model="m", models=["a", "b", "c"], weights=weights, scale=0.7), family)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_against_a_loop_in_float64(merge, family):
    merged = merge(dare(weights=[0.5, 2.0], density=[0.3, 0.8], seed=5, normalize=True, scale=1.5), family)
    expected = family["m"].double().clone()
    for index, (ref, weight, density) in enumerate([("a", 0.5, 0.3), ("b", 2.0, 0.8)]):
        kept = bernoulli(5, (index, UP), 0, 64 * 48, density).view(64, 48)
        expected += 1.5 * weight / 2.5 * (family[ref].double() - family["m"].double()) / resolved(density) * kept
    torch.testing.assert_close(merged, expected.float(), rtol=0, atol=2e-6)


def test_the_expected_change_is_the_whole_change(merge):
    # 40,000 draws of 4 with probability 1/4: the mean is 1 but for chance, sqrt(3) / 200 a standard error.
    merged = merge(dare(models=["a"], density=0.25), {"m": torch.zeros(200, 200), "a": torch.ones(200, 200)})
    assert abs(merged.mean() - 1) < 5 * math.sqrt(3) / 200


def test_without_rescaling_what_is_kept_keeps_its_size(merge, family):
    merged = merge(dare(models=["a"], density=0.5, rescale=False), family)
    close = torch.isclose(merged, family["a"], atol=1e-6)
    assert torch.equal(close | (merged == family["m"]), torch.ones(64, 48, dtype=torch.bool))


def test_each_model_tensor_and_seed_has_its_own_choice(merge):
    w = {"m": torch.zeros(64, 64), "a": torch.ones(64, 64), "b": torch.ones(64, 64)}

    def both(**more):
        return merge(dare(models=["a"], density=0.5), w, **more) > 0

    other_place = merge(dare(weights=[0.0, 1.0], density=0.5), w) > 0
    other_seed = merge(dare(models=["a"], density=0.5, seed=1), w) > 0
    for other in (other_place, other_seed, both(name="model.layers.1.mlp.up_proj.weight")):
        # Independent halves agree on half of the 4,096 elements; 5 standard errors are 160.
        assert abs((both() == other).sum() - 2048) < 160


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_blocks_do_not_matter(rows, merge, family):
    assert torch.equal(merge(dare(), family, rows), merge(dare(), family))


def test_neither_threads_nor_shards_nor_blocks_nor_names_matter(
    checkpoint_folder, context, run_op, family, monkeypatch
):
    tensors = {ref: {f"model.layers.{i}.w": family[ref] + i for i in range(3)} for ref in "mab"}
    digests = []
    for shards, threads, block, (m, a, b) in [(1, 1, 1 << 19, "mab"), (3, 2, 480, "xyz")]:
        monkeypatch.setattr(targets, "BLOCK", block)
        folders = [checkpoint_folder(f"{ref}{shards}", tensors[ref], shards=shards) for ref in "mab"]
        ctx = context(
            f"out{shards}", **{ref: ("model", folder) for ref, folder in zip((m, a, b), folders, strict=True)}
        )
        run_op(dare(base_model=m, models=[a, b], density=[0.3, [0.2, 0.9]], seed=9), ctx, threads)
        digests.append(ctx.sha256["model.safetensors"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("density", [0, 1.5, {"mlp": 2.0, "default": 0.5}, [0.5, -0.1]])
def test_density_is_a_share(density):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        dare(density=density)
