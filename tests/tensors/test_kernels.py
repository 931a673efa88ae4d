"""The compiled kernels give torch's bits, and whole merges the same files with them as without."""

import hashlib
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from hubforge.combination import Combination
from hubforge.errors import StepError
from hubforge.op import Place
from hubforge.stages.apply import Apply
from hubforge.stages.dare_linear import DareLinear
from hubforge.stages.dare_ties import DareTies
from hubforge.stages.linear import Linear
from hubforge.stages.slerp import Slerp, products
from hubforge.stages.task_arithmetic import TaskArithmetic
from hubforge.tensors import kernels, packed, targets
from hubforge.tensors.rounding import gain_sums, round_packed, round_to

COUNT = 20_011  # no multiple of any tile or vector


def numbers(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def as_bits(tensor):
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.fixture
def models():
    """Four models, three of them near the first; small and large values, zeros of both signs, subnormals."""
    first = numbers(0, COUNT) * torch.logspace(-38, 30, COUNT)
    first[:64] = 0.0
    first[32:48] = -0.0
    return {name: (first * (1 + numbers(i, COUNT, scale=0.01 * i))).bfloat16() for i, name in enumerate("abcd")}


@pytest.mark.parametrize(
    "combination",
    [
        Combination({"a": 0.4, "b": 0.3, "c": 0.3}),
        Combination({"a": 0.4, "b": 0.3, "c": 0.3, "d": 0.1}, divisor=1.1),
        Combination({"a": 1.7, "d": -0.7}, divisor=-3.0),
        Combination({"d": 1.0}),
        Combination({"b": 0.5, "a": 0.25, "c": 0.25}),
        Combination({"b": 0.7}, origin="a"),
        Combination({"b": 0.4, "c": -0.3, "d": 1.3}, origin="a"),
    ],
    ids=str,
)
def test_combinations_have_torchs_bits(models, combination):
    w = {name: tensor.float() for name, tensor in models.items()}
    merged = combination.of(w)
    rows = np.stack([as_bits(tensor) for tensor in models.values()])
    picked = np.array(["abcd".index(name) for name in combination.weights])
    out = np.empty(COUNT, np.uint16)
    weights = np.array(list(combination.weights.values()), np.float32)
    divisor, relative = np.float32(combination.divisor), combination.origin is not None
    kernels.combine(rows, picked, weights, divisor, relative, out)
    assert np.array_equal(out, as_bits(merged.bfloat16()))


@pytest.mark.parametrize("density", [1.0, 0.6, [0.3, 1.0, 0.7]], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [[0.4, 0.3, 0.3], [1.0, -0.5, 0.2], [0.5, -0.5, 0.0]], ids=str)
@pytest.mark.parametrize("kind", [DareLinear, DareTies])
def test_thinned_sums_have_torchs_bits(kind, weights, normalize, density, models):
    op = kind(base_model="a", models=list("bcd"), weights=weights, density=density, normalize=normalize, scale=0.7)
    place = Place("layers.0.w", 0, (COUNT, 1), 0, 1)
    merged = op.tensor({name: tensor.float()[:, None] for name, tensor in models.items()}, place)[:, 0]
    asked = op.thinned_sum(frozenset(models), place)
    rows, out = np.stack([as_bits(tensor) for tensor in models.values()]), np.empty(COUNT, np.uint16)
    kept = np.ones((3, COUNT), bool)
    for part, chosen in zip(asked.parts, kept, strict=True):
        if part.kept:
            part.kept(chosen)
    picked = np.array(["abcd".index(part.ref) for part in asked.parts])
    factors, given = (np.array([getattr(p, of) for p in asked.parts], np.float32) for of in ("factor", "weight"))
    kernels.thin(rows, picked, kept, factors, given, asked.elects, asked.normalize, np.float32(asked.scale), out)
    assert np.array_equal(out, as_bits(merged.bfloat16()))


def test_nan_is_not_voted_down(models):
    """What is not a number must show in the sums, so that torch decides what becomes of it."""
    rows = np.stack([as_bits(tensor) for tensor in models.values()])
    rows[2, 77] = 0x7FC0
    kept, ones = np.ones((3, COUNT), bool), np.ones(3, np.float32)
    found = kernels.thin(rows, np.arange(1, 4), kept, ones, ones, True, True, np.float32(1), np.empty(COUNT, np.uint16))
    assert not math.isfinite(sum(found))


def test_gain_sums_are_those_of_a_float64_loop():
    models = {name: numbers(i, COUNT).bfloat16() for i, name in enumerate("ab")}
    merged = Combination({"a": 0.75, "b": 0.25}).of({name: tensor.float() for name, tensor in models.items()})
    base, wanted, stored = models["a"].double(), merged.double(), merged.bfloat16().double()
    expected = (float((stored - base).dot(wanted - base)), float((wanted - base).square().sum()))
    rows, out = np.stack([as_bits(tensor) for tensor in models.values()]), np.empty(COUNT, np.uint16)
    weights = np.array([0.75, 0.25], np.float32)
    assert kernels.combine(rows, np.arange(2), weights, np.float32(1), False, out) == pytest.approx(expected, rel=1e-6)
    rounded, *sums = round_packed(models["a"].float(), merged)
    assert torch.equal(rounded, merged.bfloat16())
    assert sums == pytest.approx(expected, rel=1e-6)
    assert gain_sums(models["a"].float(), merged, merged.bfloat16()) == pytest.approx(expected, rel=1e-5)


def test_every_bfloat16_and_what_lies_around_it_is_rounded_as_torch_does():
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    values = torch.from_numpy(np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]))
    values = values.view(torch.float32)
    rounded, *_ = round_packed(torch.zeros_like(values), values)
    expected = round_to(values, torch.bfloat16, "nearest", 0, "", 0)
    number = ~expected.isnan()  # of which torch writes several, its vectors one and its scalars another
    assert torch.equal(rounded.isnan(), ~number)
    assert np.array_equal(as_bits(rounded[number]), as_bits(expected[number]))


def test_products_are_those_of_float64(models):
    one, other = models["a"].clamp(-8, 8), models["d"].clamp(-8, 8)
    found = kernels.products(as_bits(one), as_bits(other))
    assert found == pytest.approx(tuple(products(one.float(), other.float()).values()), rel=1e-12)


OPS = {
    "linear": Linear(models=["base", "one", "two"], weights=[0.4, 0.3, 0.4]),
    "linear where one lacks a tensor": Linear(models=["base", "one", "lacks"], missing="base"),
    "task_arithmetic": TaskArithmetic(model="base", models=["one", "two"], weights=[0.7, -0.2]),
    "dare_linear": DareLinear(base_model="base", models=["one", "two"], density=0.4, weights=[0.7, -0.2]),
    "dare_linear, normalised": DareLinear(
        base_model="base", models=["one", "two"], density=[0.4, 1.0], normalize=True, rescale=False
    ),
    "dare_ties": DareTies(base_model="base", models=["one", "two"], density={"layers.1": 1.0, "default": 0.3}),
    "dare_ties where one lacks a tensor": DareTies(
        base_model="base", models=["lacks", "one"], missing="base", normalize=True, scale=0.5, weights=[0.3, -0.9]
    ),
    "slerp": Slerp(model="base", to="one", t={"layers.1": 1.0, "layers.2": 0.0, "default": 0.3}),
    "whole slerp": Slerp(model="base", to="one", t=0.3, scope="whole"),
    "apply": Apply(model="base", adapters=["ups"], scale=0.5),
    "float32 out": Linear(models=["base", "one"], dtype="float32"),
    "stochastic": Linear(models=["base", "one"], rounding="stochastic"),
    "one in float32": Linear(models=["base", "wide"]),
}
TENSORS = {
    "model.embed_tokens.weight": (40, 8),
    **{f"model.layers.{i}.mlp.up_proj.weight": (24, 8) for i in range(4)},
    "model.norm.weight": (8,),
    "model.scalar": (),
}


@pytest.fixture
def family(checkpoint_folder, adapter_folder):
    def model(name, seed, dtype=torch.bfloat16, leave_out=()):
        base = {key: numbers(i, *shape) for i, (key, shape) in enumerate(TENSORS.items())}
        tensors = {key: (w + numbers(seed, *w.shape, scale=0.1 * (seed > 0))).to(dtype) for key, w in base.items()}
        tensors |= {"model.positions": torch.arange(8)}
        return "model", checkpoint_folder(name, {key: w for key, w in tensors.items() if key not in leave_out})

    ups = {f"model.layers.{i}.mlp.up_proj": (numbers(40 + i, 2, 8), numbers(50 + i, 24, 2)) for i in range(4)}
    return {
        "base": model("base", 0),
        "one": model("one", 100),
        "two": model("two", 101),
        "lacks": model("lacks", 102, leave_out=["model.layers.3.mlp.up_proj.weight"]),
        "wide": model("wide", 103, torch.float32),
        "ups": ("adapter", adapter_folder("ups", ups)),
    }


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(targets, "BLOCK", 16)
    monkeypatch.setattr(targets, "PIECE", 8)


def with_kernels(monkeypatch):
    """However little there is to compute."""
    monkeypatch.setattr(packed, "_WORTH", 0)
    monkeypatch.setattr(packed, "_WORTH_ROUNDING", 0)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("name", OPS)
def test_merges_have_the_same_files_with_kernels_as_without(
    name, family, small_blocks, context, run_op, monkeypatch, tensors_of
):
    plain = context("plain", **family)
    found = run_op(OPS[name], plain, 2)
    with_kernels(monkeypatch)
    called = []
    for kernel in ("combine", "thin", "finish"):
        original = getattr(kernels, kernel)
        monkeypatch.setattr(kernels, kernel, lambda *args, run=original: called.append(args) or run(*args))
    compiled = context("compiled", **family)
    metrics = run_op(OPS[name], compiled, 2)
    assert digests(compiled.out) == digests(plain.out)
    assert metrics == found
    assert bool(called) == (name not in ("float32 out", "stochastic"))


def test_rows_that_were_not_kept_are_read_again(family, small_blocks, context, run_op, monkeypatch):
    with_kernels(monkeypatch)
    kept, again = context("kept", **family), context("again", **family)
    run_op(OPS["slerp"], kept)
    monkeypatch.setattr("hubforge.tensors.engine._KEPT", 1 << 40)  # of the memory: nothing
    run_op(OPS["slerp"], again)
    assert digests(again.out) == digests(kept.out)


def test_nan_that_is_kept_has_torchs_bits(checkpoint_folder, context, run_op, monkeypatch):
    bad = numbers(0, 24, 8).bfloat16()
    bad[3, 3] = math.nan
    held = {name: ("model", checkpoint_folder(name, {"model.up_proj.weight": bad + i})) for i, name in enumerate("ab")}
    made = []
    for worth in (1 << 40, 0):
        monkeypatch.setattr(packed, "_WORTH", worth)
        monkeypatch.setattr(packed, "_WORTH_ROUNDING", worth)
        made.append(context(str(worth), **held))
        run_op(Linear(models=["a", "b"], nan="keep"), made[-1])
    assert digests(made[0].out) == digests(made[1].out)


def test_what_is_not_finite_is_judged_as_without_kernels(checkpoint_folder, context, run_op, monkeypatch, tensors_of):
    with_kernels(monkeypatch)
    good = {"model.layers.0.mlp.up_proj.weight": numbers(0, 24, 8).bfloat16(), "model.clip_max": torch.tensor(math.inf)}
    good = {name: tensor.bfloat16() for name, tensor in good.items()}
    bad = {name: tensor.clone() for name, tensor in good.items()}
    bad["model.layers.0.mlp.up_proj.weight"][3, 3] = math.nan
    one, two = ("model", checkpoint_folder("one", good)), ("model", checkpoint_folder("two", good))
    ctx = context("same", one=one, two=two)
    run_op(Linear(models=["one", "two"]), ctx)
    assert tensors_of(ctx.out)["model.clip_max"] == math.inf  # a bound that both have
    ctx = context("nan", one=one, bad=("model", checkpoint_folder("bad", bad)))
    with pytest.raises(StepError, match=r"up_proj\.weight of bad .*holds NaN or infinity"):
        run_op(Linear(models=["one", "bad"]), ctx)


def test_without_numba_torch_does_it(family, context, run_op, monkeypatch):
    with_kernels(monkeypatch)
    monkeypatch.setitem(sys.modules, "hubforge.tensors.kernels", None)
    monkeypatch.delattr("hubforge.tensors.kernels")
    ctx = context(**family)
    run_op(OPS["linear"], ctx)
    assert (ctx.out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "worth", "loads"), [("linear", 1097, True), ("linear", 1098, False), ("apply", 1, False)]
)
def test_kernels_are_loaded_where_they_pay(name, worth, loads, family, context, run_op, monkeypatch):
    """A model of 1,097 elements, of which an `apply` changes 768, rounding what torch computed."""
    monkeypatch.setattr(packed, "_WORTH", worth)
    asked = []
    monkeypatch.setattr(kernels, "combine", lambda *args, run=kernels.combine: asked.append("combine") or run(*args))
    monkeypatch.setattr(kernels, "finish", lambda *args, run=kernels.finish: asked.append("finish") or run(*args))
    run_op(OPS[name], context(**family))
    assert bool(asked) == loads


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "slerp", "dare_linear", "dare_ties"])
def test_a_merge_of_bfloat16_files_needs_no_torch(name, family, tmp_path):
    """Importing it takes longer than merging a small model."""
    op = type(OPS[name])
    code = f"""
        import sys
        from pathlib import Path
        from hubforge.op import Artifact, Context
        from hubforge.stages.{name} import {op.__name__}
        from hubforge.tensors import packed
        from hubforge.tensors.engine import run_tensor_op

        packed._WORTH = 0
        folder = Path({str(tmp_path)!r})
        held = {{ref: Artifact(ref, "model", ref, folder / ref) for ref in ("base", "one", "two")}}
        op = {op.__name__}.model_validate_json({OPS[name].model_dump_json()!r})
        run_tensor_op(op, Context("made", folder / "made", held))
        assert "torch" not in sys.modules, "torch was imported"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert (tmp_path / "made" / "model.safetensors").is_file()
