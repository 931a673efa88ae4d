"""Merging on devices: within one rounding of the CPU, and the same bytes however many workers share the tensors."""

import hashlib
from dataclasses import replace

import pytest
import torch

from hubforge.errors import StepError
from hubforge.events import Note
from hubforge.op import Fused, ModelRef, Settings, TensorOp
from hubforge.stages.apply import Apply
from hubforge.stages.linear import Linear
from hubforge.stages.slerp import Slerp
from hubforge.stages.task_arithmetic import TaskArithmetic
from hubforge.tensors import targets
from hubforge.tensors.engine import find_devices, run_tensor_op


def numbers(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


UP = "model.layers.{}.mlp.up_proj"
OPS = {
    "linear": Linear(models=["base", "one", "two"], weights=[0.5, 0.3, 0.2]),
    "task_arithmetic": TaskArithmetic(model="base", models=["one", "two"], weights=[0.7, 0.4]),
    "apply": Apply(model="base", adapters=["ups"]),
    "stochastic": Slerp(model="one", to="two", t=0.3, rounding="stochastic"),
    "fused": Slerp(model="styled", to="two", t=0.3),
}


@pytest.fixture
def family(checkpoint_folder, adapter_folder, monkeypatch):
    monkeypatch.setattr(targets, "BLOCK", 4096)
    base = {f"{UP.format(i)}.weight": numbers(i, 256, 64).bfloat16() for i in range(4)}
    base |= {"model.norm.weight": numbers(9, 64).bfloat16()}
    ups = {UP.format(i): (numbers(40 + i, 8, 64), numbers(50 + i, 256, 8, scale=0.1)) for i in range(4)}
    tuned = [
        {n: (w.float() + numbers(seed, *w.shape, scale=0.1)).bfloat16() for n, w in base.items()} for seed in (5, 6)
    ]
    folders = {"base": base, "one": tuned[0], "two": tuned[1]}
    held = {name: ("model", checkpoint_folder(name, tensors)) for name, tensors in folders.items()}
    return held | {"ups": ("adapter", adapter_folder("ups", ups))}


def merge(name, family, context, out, devices):
    ctx = context(out, **family)
    assert ctx.out not in [path for _, path in family.values()], "the output would clear an input away"
    inner = context("styled", **family)
    fused = {"styled": Fused(Apply(model="base", adapters=["ups"], scale=0.5), inner)} if name == "fused" else {}
    run_tensor_op(OPS[name], replace(ctx, fused=fused), devices=devices)
    return ctx.out


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OPS)
def test_a_device_is_within_a_rounding_of_the_cpu_and_shares_without_a_trace(name, device, family, context, tensors_of):
    first, last = find_devices(device)[0], find_devices(device)[-1]
    cpu = merge(name, family, context, "on_cpu", ["cpu"])
    alone = merge(name, family, context, "alone", [first])
    shared = merge(name, family, context, "shared", [first, last, first])
    assert digest(alone) == digest(shared)
    for tensor, value in tensors_of(alone).items():
        torch.testing.assert_close(value.float(), tensors_of(cpu)[tensor].float(), rtol=2**-7, atol=2**-12)


class Plain(TensorOp):
    """An op that says nothing of GPUs."""

    model: ModelRef

    def changes(self, name, present):
        return True

    def tensor(self, w, at):
        assert w[self.model].device.type == "cpu"
        return w[self.model] / 2


def test_an_op_that_is_not_known_to_work_on_a_gpu_computes_on_the_cpu(family, context):
    events = []
    ctx = context(report=events.append, m=family["base"])
    run_tensor_op(Plain(model="m"), ctx, devices=["cuda:0"])
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == ["computed on the CPU: Plain is not known to work on a GPU"]


def test_devices():
    assert find_devices("auto") == find_devices("cpu") == ["cpu"]
    count = torch.cuda.device_count()
    with pytest.raises(StepError, match=f"there is no device cuda:{count}: {count} GPUs are found"):
        find_devices(f"cuda:{count}")


@pytest.mark.gpu
def test_the_setting_takes_all_gpus(family, context):
    assert find_devices("cuda") == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    ctx = replace(context(**family), settings=Settings(device="cuda"))
    run_tensor_op(OPS["linear"], ctx)
    assert digest(ctx.out) == digest(merge("linear", family, context, "again", ["cuda:0"]))
