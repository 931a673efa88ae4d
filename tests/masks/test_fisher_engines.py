"""Every engine gives the sums of squared per-example gradients: a plain loop in float64, on every architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from hubforge.errors import StepError
from hubforge.lab.gemma4 import text_settings
from hubforge.lab.tiny import draw_weights
from hubforge.masks import _engine, _targets
from hubforge.masks._accumulators import Accumulators
from hubforge.masks._engine import Run
from hubforge.masks._fused import add_squares
from hubforge.masks._layers import Layers, cuts
from hubforge.masks._losses import Example, Losses
from hubforge.masks._memory import Plan

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
PLAIN = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 8}),
    "gemma3": ("Gemma3", {**SMALL, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma4": ("Gemma4", {**text_settings(300), **PLAIN}),
    "gemma4-ple-shared": ("Gemma4", text_settings(300)),
    "gemma4-k-is-v": ("Gemma4", {**text_settings(300), **PLAIN, "attention_k_eq_v": True}),
    "gemma4-moe": ("Gemma4", {**text_settings(300), **PLAIN, **MOE}),
}
EXAMPLES = [
    Example(torch.randint(5, 290, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (9, 21, 14, 30, 5)
]
# engine, examples at a time, groups from the top
ENGINES = {
    "device": Plan("device", 1, 0, 0, 0),
    "device-batched": Plan("device", 3, 0, 0, 0),
    "disk": Plan("disk", 1, 0, 0, 0),
    "disk-batched": Plan("disk", 2, 0, 0, 0),
    "groups": Plan("groups", 1, 0, 0, 0, ((2, 4), (1, 2), (0, 1))),
    "groups-batched": Plan("groups", 3, 0, 0, 0, ((3, 4), (1, 3), (0, 1))),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    family, fields = ARCHITECTURES[name]
    kind = f"{family}Text" if family in ("Gemma3", "Gemma4") else family
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    draw_weights(model, 0, std=0.02)
    if family in ("Gemma3", "Gemma4"):
        # Their scores are scaled by trained norms alone: at 1 those of random weights are so far apart that rounding
        # decides which token is looked at, and a plain loop in float32 is off by 3e-5, on a GPU by 2e-4.
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data.fill_(0.25 if family == "Gemma4" else -0.75)
    return model.to(dtype).eval()


def covered(model: Any, targets: str | None = None) -> dict[str, nn.Parameter]:
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    names = _targets.select(shapes, model.config.to_dict(), targets).names
    return {name: weight for name, weight in model.named_parameters() if name in names}


@contextmanager
def truly_double() -> Iterator[None]:
    """Transformers computes norms in float32 whatever the model's dtype is; a reference in float64 must not."""
    single = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else single(self)  # type: ignore
    try:
        yield
    finally:
        torch.Tensor.float = single  # type: ignore


def loop(model: Any, names: list[str], reduction: str = "mean") -> dict[str, torch.Tensor]:
    """The definition: a batch of one, all gradients, squared and summed in float64."""
    model = copy.deepcopy(model)
    weights = dict(model.named_parameters())
    sums = {name: torch.zeros_like(weights[name], dtype=torch.float64) for name in names}
    for example in EXAMPLES:
        model.zero_grad()
        ids = torch.tensor([example.ids])
        logits = model(ids, use_cache=False).logits[0]
        cross_entropy(logits[example.start - 1 : -1], ids[0, example.start :], reduction=reduction).backward()
        for name in names:
            sums[name] += weights[name].grad.double() ** 2
    return sums


def run(model: Any, plan: Plan, folder: Path, targets: str | None = None, **how: Any) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    more = {name: how.pop(name) for name in ("estimator", "device") if name in how}
    made = Run(model, covered(model, targets), plan, EXAMPLES, Losses(**how), folder=folder, **more)
    made.run(lambda name, total, even, whole: sums.update({name: total.clone()}))
    return sums


def worst(sums: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest error of any weight, relative to the largest value of its tensor."""
    assert sums.keys() == expected.keys()
    return max(float((sums[n].double() - expected[n]).abs().max() / expected[n].max()) for n in expected)


def engines(name: str) -> dict[str, Plan]:
    """Layers that share keys and values cannot be parted: there is one group then."""
    one = ((0, 4),)
    return {e: replace(p, groups=one) if p.groups and "shared" in name else p for e, p in ENGINES.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_engine_agrees_with_a_loop_in_float64(name: str, tmp_path: Path) -> None:
    """In float64 nothing but our float32 sums rounds; in float32 the model's own gradients do too."""
    model = build(name)
    names = list(covered(model))
    double = copy.deepcopy(model).double()
    if "moe" in name:
        double.set_experts_implementation("eager")  # Grouped matrix products know no float64.
    with truly_double():
        expected = loop(double, names)
    for engine, plan in engines(name).items():
        with truly_double():
            exact = worst(run(double, plan, tmp_path / engine), expected)
        assert exact < 1e-6, f"{engine}: {exact}"
        single = worst(run(model, plan, tmp_path / engine), expected)
        assert single < 1e-5, f"{engine}: {single}"


@pytest.mark.parametrize("plan", ENGINES.values(), ids=ENGINES)
def test_the_sum_of_the_tokens_losses_is_one_of_the_reductions(plan: Plan, tmp_path: Path) -> None:
    model = build("llama")
    expected = loop(model, list(covered(model)), "sum")
    assert worst(run(model, plan, tmp_path, reduction="sum"), expected) < 1e-5


EXPERTS = r"experts\.(?:gate_up|down)_proj$"


@pytest.mark.parametrize("engine", ["device", "disk", "groups"])
def test_stacked_experts_are_weighed_one_example_at_a_time(engine: str, tmp_path: Path) -> None:
    model = build("gemma4-moe")
    names = list(covered(model, EXPERTS))
    assert [model.get_parameter(name).dim() for name in names] == [3] * 8
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    with truly_double():
        expected = loop(double, names)
    assert worst(run(model, ENGINES[engine], tmp_path, EXPERTS), expected) < 1e-5


def test_stacked_experts_in_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="not every target is the weight of a linear layer"):
        run(build("gemma4-moe"), ENGINES["device-batched"], tmp_path, EXPERTS)


@pytest.mark.parametrize("plan", ENGINES.values(), ids=ENGINES)
def test_the_token_estimator_squares_each_tokens_gradient_by_itself(plan: Plan, tmp_path: Path) -> None:
    """By hand: the outer product of a token's output gradient and input, squared, summed over tokens and examples."""
    model = build("qwen2")
    expected: dict[str, torch.Tensor] = {}
    inputs, hooks = {}, []
    for name in covered(model):
        module = model.get_submodule(name.removesuffix(".weight"))

        def keep(module: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
            x = args[0].detach()
            output.register_hook(lambda g: inputs.update({name: torch.einsum("bto,bti->btoi", g, x)}))

        hooks.append(module.register_forward_hook(keep))
    for example in EXAMPLES:
        ids = torch.tensor([example.ids])
        cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:]).backward()
        for name, outer in inputs.items():
            expected[name] = expected.get(name, 0) + outer.double().square().sum((0, 1))
    for hook in hooks:
        hook.remove()
    assert worst(run(model, plan, tmp_path, estimator="token"), expected) < 1e-5


def test_the_layers_of_a_group_are_all_that_is_differentiated(tmp_path: Path) -> None:
    """The backward pass of a group stops below its lowest layer: what lies there sees no gradient."""
    model, seen = build("llama"), set()
    for number, layer in enumerate(model.model.layers):
        layer.register_full_backward_hook(lambda *_, number=number: seen.add(number))
    run(model, Plan("groups", 1, 0, 0, 0, ((3, 4),)), tmp_path, r"layers\.3\.")
    assert seen <= {3}


def test_a_decoder_can_be_cut_where_no_layer_above_needs_more_than_the_hidden_states() -> None:
    """E4B's upper 18 layers use the keys and values of layers 22 (sliding) and 23 (full)."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 7
    e4b = {"num_hidden_layers": 42, "num_kv_shared_layers": 18, "layer_types": kinds}
    assert cuts({"text_config": e4b}) == set(range(23))
    assert cuts({"num_hidden_layers": 4}) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4-moe"])
def test_running_the_layers_in_two_parts_is_running_the_model(name: str) -> None:
    model = build(name)
    layers, ids = Layers(model), torch.tensor([EXAMPLES[0].ids])
    with torch.no_grad():
        middle = layers.run(ids, 0, 2)
        end = layers.run(ids, 2, 4, middle)
        assert torch.equal(layers.head(end)(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("engine", "after", "resumed"),
    [
        ("device", 2, "2 of 5 samples"),
        ("device-batched", 1, "3 of 5 samples"),
        ("disk", 3, "3 of 5 samples"),
        ("disk-batched", 2, "4 of 5 samples"),
        ("groups", 7, "2 of 5 samples of group 1 of 3"),  # Five of them went up before.
        ("groups", 14, "4 of 5 samples of group 2 of 3"),
        ("groups-batched", 7, "3 of 5 samples of group 3 of 3"),
    ],
)
def test_a_killed_run_goes_on_and_gives_the_same_sums(
    engine: str, after: int, resumed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(_engine, "SAVE_SHARE", float("inf"))
    model, plan = build("llama"), ENGINES[engine]
    whole = run(model, plan, tmp_path / "whole")
    found: dict[str, torch.Tensor] = {}
    calls: list[int] = []
    notes: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        calls.append(done)
        if len(calls) == after:
            raise Killed

    def go() -> Run:
        made = Run(model, covered(model), plan, EXAMPLES, Losses(), folder=tmp_path / "cut", progress=progress)
        made.note = notes.append
        made.run(lambda name, total, even, half: found.update({name: total.clone()}), set(found))
        return made

    with pytest.raises(Killed):
        go()
    assert go().loss > 0
    assert notes == ["resumed after " + resumed]
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_weights_that_accelerate_keeps_on_the_disk(tmp_path: Path) -> None:
    """Parameters are on the meta device between uses; inputs and output gradients of the linears do all the same."""
    from accelerate import dispatch_model

    model = build("llama")
    names = list(covered(model))
    expected = loop(model, names)
    places: dict[str, Any] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    places |= {f"model.layers.{n}": "cpu" if n < 2 else "disk" for n in range(4)}
    sharded = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "offload"))
    weights = {name: sharded.get_parameter(name) for name in names}
    assert weights["model.layers.3.mlp.up_proj.weight"].is_meta
    for engine in ("device", "groups-batched"):
        sums: dict[str, torch.Tensor] = {}
        made = Run(sharded, weights, ENGINES[engine], EXAMPLES, Losses(), folder=tmp_path / engine)
        made.run(lambda name, total, even, whole, sums=sums: sums.update({name: total.clone()}))
        assert worst(sums, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [*ENGINES, "host", "host-batched"])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4-moe"])
def test_on_a_gpu_every_engine_agrees_with_a_loop_in_float64(name: str, engine: str, tmp_path: Path) -> None:
    """With the sums in host memory or files they travel on a stream of their own, and are added up in a thread."""
    model = build(name)
    expected = loop(model, list(covered(model)))
    model.to("cuda")
    plan = ENGINES[engine.replace("host", "disk")]
    plan = replace(plan, engine="host") if "host" in engine else plan
    sums = run(model, plan, tmp_path, device="cuda")
    assert all(total.is_cuda == (plan.where == "device") for total in sums.values())
    assert worst({name: total.cpu() for name, total in sums.items()}, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(3, 100, 150, 140), (1, 64, 128, 256), (8, 256, 1100, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_kernel_sums_the_squares_of_each_example(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, rows, columns = sizes
    draw = torch.Generator("cuda").manual_seed(0)
    g, x = (torch.randn(batch, length, n, device="cuda", generator=draw).to(dtype) for n in (rows, columns))
    sums = torch.ones(rows, columns, device="cuda")
    assert add_squares(sums, g, x)
    expected = 1 + torch.einsum("bto,bti->boi", g.double(), x.double()).square().sum(0)
    # In float32 throughout: a product rounded to 16 bits would be off by 1e-3.
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["sequence", "token"])
def test_in_bfloat16_a_gpu_agrees_with_the_cpu_within_its_rounding(estimator: str, tmp_path: Path) -> None:
    model = build("gemma4", torch.bfloat16)
    expected = run(model, ENGINES["device-batched"], tmp_path, estimator=estimator)
    sums = run(model.to("cuda"), ENGINES["device-batched"], tmp_path, device="cuda", estimator=estimator)
    for name, total in sums.items():
        assert float((total.cpu() - expected[name]).norm() / expected[name].norm()) < 0.05, name


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["host", "disk"])
def test_what_travels_from_a_gpu_arrives_whole(where: Any, tmp_path: Path) -> None:
    """More parcels than buffers, of different sizes, each overwritten on the device once it is on its way."""
    shapes = {f"w{n}": (37 * n + 1, 64) for n in range(8)}
    device = torch.device("cuda")
    sums = Accumulators(shapes, dict.fromkeys(shapes, device), where, tmp_path / "sums")
    for turn in range(20):
        for name in shapes:
            squares = sums.open(name, device)
            squares.add_(turn)
            sums.close(name, squares)
            del squares
    sums.settle()
    for name, shape in shapes.items():
        assert torch.equal(sums.tensors[name], torch.full(shape, float(sum(range(20)))))
    sums.drop()
    assert not (tmp_path / "sums").exists()
