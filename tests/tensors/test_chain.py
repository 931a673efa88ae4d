"""A chain of ops in one pass: the values of one after another without rounding between, and each input read once."""

import hashlib
from collections import Counter
from dataclasses import replace

import pytest
import torch

from hubforge.errors import StepError
from hubforge.op import Fused, ModelRef, TensorOp
from hubforge.stages.apply import Apply
from hubforge.stages.dare_linear import DareLinear
from hubforge.stages.slerp import Slerp
from hubforge.stages.ties_models import TiesModels
from hubforge.tensors import targets
from hubforge.tensors.engine import run_tensor_op
from hubforge.tensors.reader import Checkpoint
from hubforge.tensors.writer import Writer


class Inner(TensorOp):
    """The model without its `model.` prefix, one tensor left out."""

    model: ModelRef

    def changes(self, name, present):
        return False

    def tensor(self, w, at):
        return w[self.model]

    def rename(self, name):
        return None if "tower" in name else name.removeprefix("model.")

    def config(self, config):
        return config | {"inner": True}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(targets, "BLOCK", 64)
    monkeypatch.setattr(targets, "PIECE", 3)
    monkeypatch.setattr(targets, "PRODUCT_ROWS", 1)


def numbers(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


UP, DOWN = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"
BASE = {
    "model.embed_tokens.weight": numbers(0, 40, 8).bfloat16(),
    **{f"{UP.format(i)}.weight": numbers(i + 1, 24, 8).bfloat16() for i in range(3)},
    **{f"{DOWN.format(i)}.weight": numbers(i + 10, 8, 24).bfloat16() for i in range(3)},
    "model.tower.weight": numbers(30, 4, 4).bfloat16(),
    "model.norm.weight": numbers(31, 8).bfloat16(),
}


@pytest.fixture
def family(checkpoint_folder, adapter_folder):
    """A base, two fine-tunes of it, two adapters, and an importance mask of what the first adapter changes."""

    def tuned(seed):
        return {name: (w.float() + numbers(seed, *w.shape, scale=0.1)).bfloat16() for name, w in BASE.items()}

    ups = {UP.format(i): (numbers(40 + i, 2, 8), numbers(50 + i, 24, 2, scale=0.1)) for i in range(3)}
    downs = {DOWN.format(i): (numbers(60 + i, 2, 24), numbers(70 + i, 8, 2, scale=0.1)) for i in range(2)}
    mask = checkpoint_folder("mask", {f"{name}.weight": numbers(80, 24, 8).abs() for name in ups})
    (mask / "layer_importance.json").write_text('{"layers": {"0": {"sum": 1}, "1": {"sum": 3}, "2": {"sum": 2}}}')
    return {
        "base": ("model", checkpoint_folder("base", BASE)),
        "one": ("model", checkpoint_folder("one", tuned(5), shards=3)),
        "two": ("model", checkpoint_folder("two", tuned(6))),
        "ups": ("adapter", adapter_folder("ups", ups)),
        "downs": ("adapter", adapter_folder("downs", downs)),
        "mask": ("mask", mask),
    }


STYLED = {"model": "base", "adapters": ["ups"], "importance": "mask", "scale": 0.7}
CHAINS = {
    "two applies into a slerp": [
        ("styled", Apply, STYLED),
        ("tuned", Apply, {"model": "base", "adapters": ["downs"]}),
        ("healed", Slerp, {"model": "styled", "to": "tuned", "t": 0.3}),
    ],
    "renamed at the end": [
        ("styled", Apply, STYLED),
        ("healed", Slerp, {"model": "styled", "to": "one", "t": 0.6}),
        ("inner", Inner, {"model": "healed"}),
    ],
    "renamed at the start, layers counted": [
        ("inner", Inner, {"model": "base"}),
        ("merged", DareLinear, {"base_model": "inner", "models": ["one"], "weights": [[0.2, 0.9]], "missing": "base"}),
    ],
    "whole tensors, one step used twice": [
        ("ties", TiesModels, {"base_model": "base", "models": ["one", "two"], "density": 0.4}),
        ("styled", Apply, {"model": "ties", "adapters": ["ups", "downs"]}),
        ("healed", Slerp, {"model": "styled", "to": "ties", "t": 0.5}),
    ],
}  # fmt: skip


def run_chain(steps, family, context, *, fused, between=None, out="", rounding="nearest", **run):
    """Runs the steps, in one pass or one after another; the context and metrics of the last, and what it fused.

    between: the dtype of the steps between; the last one's is bfloat16.
    """
    known, stored = {}, {}
    for name, kind, fields in steps:
        last = name == steps[-1][0]
        op = kind(**fields, **({"dtype": "bfloat16", "rounding": rounding} if last else {"dtype": between}))
        refs = [ref for value in fields.values() for ref in (value if isinstance(value, list) else [value])]
        held = {ref: (family | stored)[ref] for ref in refs if isinstance(ref, str) and ref in family | stored}
        ctx = context(f"{'fused' if fused else 'stored'}-{name}-{between}{out}", **held)
        ctx = replace(ctx, fused={ref: known[ref] for ref in refs if isinstance(ref, str) and ref in known})
        if fused and not last:
            known[name] = Fused(op, ctx)
        else:
            metrics = run_tensor_op(op, ctx, **{"threads": 2} | run)
            stored[name] = ("model", ctx.out)
    return ctx, metrics, known


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
def test_fused_is_exact_beside_float32_steps_and_within_a_rounding_of_others(steps, family, context, tensors_of):
    fused = tensors_of(run_chain(steps, family, context, fused=True)[0].out)
    exact = tensors_of(run_chain(steps, family, context, fused=False, between="float32")[0].out)
    rounded = tensors_of(run_chain(steps, family, context, fused=False)[0].out)
    assert fused.keys() == exact.keys() == rounded.keys()
    for name, tensor in fused.items():
        assert torch.equal(tensor, exact[name]), name
        # The steps between round to 2^-9 of a value each; the last one then goes to a neighbour at most.
        torch.testing.assert_close(tensor.float(), rounded[name].float(), rtol=2**-7, atol=2**-9)


def test_fused_differs_from_what_is_rounded_in_between(family, context):
    steps = CHAINS["two applies into a slerp"]
    one, other = (run_chain(steps, family, context, fused=fused)[0] for fused in (True, False))
    assert digest(one.out) != digest(other.out)


def test_each_input_is_read_once_and_nothing_but_the_output_is_written(family, context, monkeypatch):
    read, written = Counter(), Counter()
    read_bytes, write = Checkpoint.read_bytes, Writer.write

    def reading(self, name, first, last):
        read.update((self.path.name, name, row) for row in range(first, last))
        return read_bytes(self, name, first, last)

    def writing(self, piece, offset, data):
        written[self.folder.name] += len(data)
        return write(self, piece, offset, data)

    monkeypatch.setattr(Checkpoint, "read_bytes", reading)
    monkeypatch.setattr(Writer, "write", writing)
    # Three passes over the up projections (the mask's range, the angle, the writing) and two over the others.
    ctx, _, _ = run_chain(CHAINS["two applies into a slerp"], family, context, fused=True, threads=1)
    assert {key: count for key, count in read.items() if count > 1} == {}
    models = {"base": BASE, "mask": [f"{UP.format(i)}.weight" for i in range(3)]}
    for folder, names in models.items():
        assert {name for where, name, _ in read if where == folder} == set(names)
    assert dict(written) == {ctx.out.name: sum(w.nbytes for w in BASE.values())}


def test_what_memory_cannot_hold_is_read_again_to_the_same_bytes(family, context, monkeypatch):
    steps = CHAINS["two applies into a slerp"]
    whole = run_chain(steps, family, context, fused=True)[0]
    monkeypatch.setattr("hubforge.tensors.desk.Kept.put", lambda *_: None)
    assert digest(run_chain(steps, family, context, fused=True, out="-again")[0].out) == digest(whole.out)


@pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
def test_threads_and_devices_do_not_show(steps, family, context):
    ways = [{"threads": 1}, {"threads": 2}, {"threads": 3, "devices": ["cpu", "cpu"]}]
    runs = [run_chain(steps, family, context, fused=True, out=f"-{i}", **way) for i, way in enumerate(ways)]
    assert len({digest(ctx.out) for ctx, _, _ in runs}) == 1
    assert runs[0][1] == runs[1][1] == runs[2][1]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_interrupted_and_resumed_gives_the_same_bytes(rounding, family, context, monkeypatch):
    steps = CHAINS["two applies into a slerp"]
    whole = run_chain(steps, family, context, fused=True, out="-whole", rounding=rounding)[0]
    finish, calls = Writer.finish, []

    def failing(self, piece, facts=None):
        if len(calls) == 9:
            raise KeyboardInterrupt
        calls.append(piece.key)
        return finish(self, piece, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", failing)
        with pytest.raises(KeyboardInterrupt):
            run_chain(steps, family, context, fused=True, out="-killed", rounding=rounding)
    monkeypatch.setattr(
        Writer, "finish", lambda self, piece, *rest: calls.append(piece.key) or finish(self, piece, *rest)
    )
    resumed = run_chain(steps, family, context, fused=True, out="-killed", rounding=rounding)[0]
    assert len(calls) == len(set(calls)) == 13  # all pieces, none of them twice
    assert digest(resumed.out) == digest(whole.out)


def test_products_are_taken_of_more_rows(family, context, monkeypatch):
    seen = []
    original = Apply.tensor
    monkeypatch.setattr(Apply, "tensor", lambda self, w, at: seen.append((at.name, at.first)) or original(self, w, at))
    plain = run_chain([("out", Apply, STYLED)], family, context, fused=False, out="-plain")[0]
    name = f"{UP.format(0)}.weight"
    assert sorted(first for each, first in seen if each == name) == [0, 8, 16]  # 64 elements each
    seen.clear()
    monkeypatch.setattr(targets, "PRODUCT_ROWS", 16)
    more = run_chain([("out", Apply, STYLED)], family, context, fused=False, out="-more")[0]
    assert sorted(first for each, first in seen if each == name) == [0, 16]
    seen.clear()
    monkeypatch.setattr(targets, "PRODUCT_ROWS", 1 << 20)  # at most LIGHT blocks make one
    run_chain([("out", Apply, STYLED)], family, context, fused=False, out="-most")
    assert sorted(first for each, first in seen if each == name) == [0]
    assert digest(more.out) == digest(plain.out)


def test_config_and_files_pass_through_the_chain(family, context):
    import json

    ctx, metrics, known = run_chain(CHAINS["renamed at the end"], family, context, fused=True)
    assert json.loads((ctx.out / "config.json").read_text())["inner"] is True
    assert metrics["tensors"] == len(BASE) - 1
    assert known["styled"].metrics == {"parameters": sum(w.numel() for w in BASE.values()), "tensors": 9, "changed": 3}
    assert known["healed"].metrics["changed"] == len(BASE)


def test_nan_in_an_input_of_a_fused_step_is_named(family, context, checkpoint_folder):
    bad = checkpoint_folder("bad", BASE | {"model.norm.weight": torch.full((8,), float("nan")).bfloat16()})
    with pytest.raises(StepError, match=r"model\.norm\.weight of one \(.*bad.*\) holds NaN or infinity"):
        run_chain(CHAINS["renamed at the end"], family | {"one": ("model", bad)}, context, fused=True)


def test_a_tensor_that_a_fused_step_leaves_out_is_named(family, context):
    steps = [CHAINS["renamed at the end"][0], ("inner", Inner, {"model": "styled"})]
    steps.append(("healed", Slerp, {"model": "inner", "to": "one", "t": 0.5}))
    with pytest.raises(StepError, match=r"one has tensor model\.tower\.weight, which inner lacks"):
        run_chain(steps, family, context, fused=True)


def test_an_error_in_a_fused_step_names_its_line(family, context, checkpoint_folder):
    lacking = {name: w for name, w in BASE.items() if "norm" not in name}
    wrong = family | {"one": ("model", checkpoint_folder("lacking", lacking))}
    with pytest.raises(StepError, match=r"one has no tensor model\.norm\.weight") as caught:
        run_chain(CHAINS["renamed at the end"], wrong, context, fused=True)
    assert caught.value.where == "recipes/toy.yaml:7"
