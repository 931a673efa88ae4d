"""How fast a Fisher is, and what it holds: `python bench/fisher.py`, and on a machine with a GPU `--gpu`.

Without a GPU: a Llama with random weights, float32. Prints the time of the engines, as ratios to forward + backward of
the same batches with all weight gradients (made, and dropped at once), and their peak memory over that of such a pass.

With `--gpu`: Gemma 4 text models of the shapes of E4B and 31B (and 26B-A4B, a mixture of experts, when named), random
bfloat16 weights built on the device, 200 x 256 random tokens. Prints the measured matmul rate, the memory plan, the
time, its share of the floor of 6 N T operations at that rate (N: weights that multiply), and peak memory. The means are
brought to the host in bfloat16, as the op would to write them; nothing is written to disk. Then the sums of a few
weights over a few examples are compared with a loop of one example at a time. `--small` does the same with tiny shapes,
on a CPU too.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubforge.lab.gemma4 import PUBLISHED
from hubforge.masks import _memory, _targets
from hubforge.masks._engine import Run
from hubforge.masks._fused import add_squares
from hubforge.masks._importance import OnHost, summary
from hubforge.masks._layers import cuts
from hubforge.masks._losses import Example, Losses, batches
from hubforge.masks._memory import Plan

# What is covered: the seven linears, and of a mixture its experts too.
TARGETS = {"26B-A4B": _targets.LINEARS + r"|\.experts\.(?:gate_up|down)_proj$"}
SMALL = {
    "vocab_size": 300,
    "vocab_size_per_layer_input": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
}
TINY: dict[str, dict[str, Any]] = {
    name: {**fields, **SMALL, "layer_types": fields["layer_types"][:12]} for name, fields in PUBLISHED.items()
}
TINY["E4B"].update(num_kv_shared_layers=6, hidden_size_per_layer_input=8)
TINY["31B"].update(num_global_key_value_heads=1)
TINY["26B-A4B"].update(num_global_key_value_heads=1, num_experts=8, top_k_experts=2, moe_intermediate_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a test of this script itself")
    parser.add_argument("--models", nargs="*", default=["E4B", "31B"])
    parser.add_argument("--engines", nargs="*", default=["auto"], help="several are run one after the other")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)  # measured in a process of its own
    given = parser.parse_args()
    if given.gpu:
        on_gpu(given)
    else:
        on_cpu(given)


# --- Gemma 4 shapes on one GPU


def on_gpu(given: argparse.Namespace) -> None:
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.small:
        raise SystemExit("there is no GPU; --small tests this script on a CPU")
    what = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    import transformers

    print(f"{what}; torch {torch.__version__}, transformers {transformers.__version__}", platform.python_version())
    rate = matmul_rate(device, 256 if given.small else 8192)
    print(f"bfloat16 matmul: {rate / 1e12:.3g} TFLOP/s", flush=True)
    squares(device, given.small)
    exactness(device)
    for name in given.models:
        one_model(name, given, device, rate)
    wide(device, given.small)
    print(f"all of it took {time.monotonic() - began:.1f} s")


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str, least: float = 0.3) -> float:
    """Of one call, the mean over at least that many seconds, after a first one."""
    call()
    sync(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < least:
        for _ in range(5):
            call()
        count += 5
        sync(device)
    return (time.perf_counter() - began) / count


def matmul_rate(device: str, side: int) -> float:
    """FLOP/s of square bfloat16 matrices, sustained over a second."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * side**3 / seconds(lambda: a @ b, device, 1.0)


def squares(device: str, small: bool) -> None:
    """Ways to add the squares of one example's gradient at 31B's up_proj: G (256, 21504), X (256, 5376)."""
    rows, columns = (96, 64) if small else (21504, 5376)
    g, x = (torch.randn(256, n, device=device, dtype=torch.bfloat16) for n in (rows, columns))
    sums = torch.zeros(rows, columns, device=device)

    def rounded() -> None:
        one = g.T @ x
        sums.addcmul_(one, one)

    def exact() -> None:
        one = torch.mm(g.T, x, out_dtype=torch.float32)
        sums.addcmul_(one, one)

    def fused() -> None:
        if not add_squares(sums, g[None], x[None]):
            raise TypeError("there is no kernel for it here")

    ways: dict[str, Callable[[], Any]] = {"matmul alone": lambda: g.T @ x}
    ways |= {"bf16": rounded, "fp32": exact, "fused": fused}
    if device == "cuda":
        many = g.expand(8, *g.shape).contiguous(), x.expand(8, *x.shape).contiguous()
        ways["fused, eight at a time"] = lambda: add_squares(sums, *many)
    for text, way in ways.items():
        try:
            print(f"  one gradient and its squares, {text}: {1e3 * seconds(way, device):.3f} ms", flush=True)
        except (RuntimeError, TypeError) as error:
            print(f"  {text}: {str(error).splitlines()[0][:100]}", flush=True)
    if device == "cuda":
        check_kernel(rows, columns)


def check_kernel(rows: int, columns: int) -> None:
    """The kernel at these shapes against float64, on some rows: eight examples, the last half filled up."""
    g, x = (torch.randn(8, 256, n, device="cuda", dtype=torch.bfloat16) for n in (rows, columns))
    g[-1, 128:] = 0
    sums = torch.zeros(rows, columns, device="cuda")
    if not add_squares(sums, g, x):
        print("  no fused kernel here")
        return
    some = torch.arange(0, rows, rows // 61, device="cuda")
    truth = torch.einsum("bto,bti->boi", g[:, :, some].double(), x.double()).square().sum(0)
    print(f"  fused, against float64: largest error {((sums[some] - truth).abs() / truth.max()).max():.1e}", flush=True)


def exactness(device: str) -> None:
    """Every engine on a tiny Gemma 4, against one example at a time in the same precision, summed in float64.

    In float32 the model's own gradients depend on how many examples go through together; in float64 what is left is
    the rounding of the float32 sums.
    """
    draw = torch.Generator().manual_seed(2)
    examples = [Example(torch.randint(5, 300, (n,), generator=draw).tolist()) for n in (9, 21, 14, 30, 5)]
    print("largest error, of the largest value of its tensor, on a tiny Gemma 4 in float32 and in float64")
    models = [build(TINY["31B"], device, dtype) for dtype in (torch.float32, torch.float64)]
    for engine in ("device", "host", "disk", "groups"):
        for batch in (1, 3):
            groups = ((6, 12), (2, 6), (0, 2)) if engine == "groups" else ()
            plan, worst = Plan(engine, batch, 0, 0, 0, groups), []
            for model in models:
                shapes = {own: tuple(weight.shape) for own, weight in model.named_parameters()}
                covered = _targets.select(shapes, model.config.to_dict()).names
                worst.append(max(line[1] for line in differences(model, covered, plan, examples, device)))
            print(f"  {engine}, {batch} at a time: {worst[0]:.1e} {worst[1]:.1e}", flush=True)


def build(fields: dict[str, Any], device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**fields)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Gemma4ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            # Gemma 4 scales attention by its trained norms alone. At their initial 1 the scores of random weights
            # spread by 16, and rounding decides which token is looked at: no two ways would agree on any gradient.
            layer.self_attn.q_norm.weight.fill_(layer.self_attn.head_dim**-0.5)
    return model.requires_grad_(False)


def one_model(name: str, given: argparse.Namespace, device: str, rate: float) -> None:
    began = time.monotonic()
    fields = (TINY if given.small else PUBLISHED)[name]
    model = build(fields, device)
    sync(device)
    parameters = dict(model.named_parameters())
    total = sum(weight.numel() for weight in parameters.values())
    # Of the experts those count that a token goes through.
    active = fields.get("top_k_experts", 0) / fields.get("num_experts", 1)
    multiply = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    multiply += active * sum(weight.numel() for weight in parameters.values() if weight.dim() == 3)
    print(f"\n{name}: {total / 1e9:.3f} G parameters, of which {multiply / 1e9:.3f} G multiply; text only, bfloat16")
    print(f"  built in {time.monotonic() - began:.1f} s", flush=True)
    samples, length = given.samples or (6 if given.small else 200), given.length or (24 if given.small else 256)
    vocabulary, draw = model.config.vocab_size, torch.Generator().manual_seed(1)
    examples = [Example(torch.randint(5, vocabulary, (length,), generator=draw).tolist()) for _ in range(samples)]
    shapes = {own: tuple(weight.shape) for own, weight in parameters.items()}
    config = model.config.to_dict()
    covered = _targets.select(shapes, config, TARGETS.get(name)).names
    room = free(device, model)
    apart = name not in TARGETS
    work = _memory.work_of(shapes, covered, config, [length] * samples, 2, cuts(config), apart=apart)
    for engine in given.engines:
        plan = _memory.choose(work, room, engine, given.batch)
        print("  " + _memory.said(work, room, plan, device), flush=True)
        with tempfile.TemporaryDirectory(prefix="bench-fisher-") as folder:
            spent = timed(model, {own: parameters[own] for own in covered}, plan, examples, device, Path(folder))
        floor = 6 * multiply * samples * length / rate
        print(f"  {spent:.2f} s; the floor of 6 N T is {floor:.2f} s, its share {floor / spent:.3f}", flush=True)
        compare(model, covered, plan, examples[: 2 if given.small else 4], device)
    del model, parameters
    if device == "cuda":
        torch.cuda.empty_cache()


def wide(device: str, small: bool) -> None:
    """Six layers of 31B's widths in float32, where rounding cannot hide a mistake: two groups against the loop."""
    fields = (TINY if small else PUBLISHED)["31B"]
    six = {"num_hidden_layers": 6, "layer_types": fields["layer_types"][:6]}
    model = build({**fields, **six, "vocab_size": 300, "vocab_size_per_layer_input": 300}, device, torch.float32)
    draw = torch.Generator().manual_seed(3)
    examples = [Example(torch.randint(5, 300, (n,), generator=draw).tolist()) for n in (256, 200, 256, 90)]
    covered = _targets.select({n: tuple(w.shape) for n, w in model.named_parameters()}, model.config.to_dict()).names
    print("\nsix layers of 31B's widths in float32, against one example at a time, summed in float64")
    for plan in (Plan("device", 4, 0, 0, 0), Plan("groups", 4, 0, 0, 0, ((3, 6), (0, 3)))):
        print(f"  {plan.engine}, 4 at a time:")
        compare(model, covered, plan, examples, device)


def free(device: str, model: Any) -> _memory.Room:
    room = _memory.free(device, Path(tempfile.gettempdir()))
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return _memory.Room(room.device + held, room.host, room.disk)  # As before it was built.


def timed(
    model: Any, weights: dict[str, nn.Parameter], plan: Plan, examples: list[Example], device: str, folder: Path
) -> float:
    """Seconds of one whole run, with the statistics of each weight and its mean on the host in bfloat16."""
    on_host = OnHost(max(weight.numel() for weight in weights.values()))
    handed = {"seconds": 0.0, "bytes": 0, "sum": 0.0}

    def take(name: str, sums: torch.Tensor, even: torch.Tensor, whole: torch.Tensor) -> None:
        sync(device)
        start = time.monotonic()
        mean = sums / len(examples)
        handed["sum"] += summary(mean)["sum"]
        handed["bytes"] += on_host(mean.to(torch.bfloat16)).nbytes
        handed["seconds"] += time.monotonic() - start

    marks: list[tuple[float, str]] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(model, weights, plan, examples, Losses(), device=device, folder=folder)
    run.progress = lambda done, total, what: marks.append((time.monotonic(), what.split(" ")[0]))
    sync(device)
    began = time.monotonic()
    run.run(take)
    sync(device)
    spent = time.monotonic() - began
    if marks[0][1] == "forward":
        upwards = max(at for at, what in marks if what == "forward") - began
        print(f"  forward and head: {upwards:.2f} s of the time below")
    print(
        f"  means and statistics: {handed['seconds']:.2f} s of it, {handed['bytes'] / 1e9:.2f} GB brought to the host"
    )
    print(f"  sum of the Fisher {handed['sum']:.6g}, mean loss {run.loss / len(examples):.4f}")
    if device == "cuda":
        print(f"  peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB allocated, planned {plan.device / 1e9:.2f} GB")
    return spent


def compare(model: Any, covered: tuple[str, ...], plan: Plan, examples: list[Example], device: str) -> None:
    """The same engine on a few weights and examples against one example at a time, summed in float64."""
    if device == "cuda":
        torch.cuda.empty_cache()
    some = (covered[0], covered[len(covered) // 2], covered[-1])
    try:
        for own, worst, mean, whole in differences(model, some, plan, examples, device):
            print(f"  {own}: largest error {worst:.1e} of the largest value, mean {mean:.1e}, of the sum {whole:+.1e}")
    except torch.OutOfMemoryError:
        print("  not compared: one example with all layers' activations does not fit beside the weights")


def differences(
    model: Any, names: tuple[str, ...], plan: Plan, examples: list[Example], device: str
) -> list[tuple[str, float, float, float]]:
    weights = {own: weight for own, weight in model.named_parameters() if own in names}
    found: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="bench-fisher-") as folder:
        run = Run(model, weights, plan, examples, Losses(), device=device, folder=Path(folder))
        run.run(lambda own, sums, even, whole: found.update({own: sums.to("cpu", torch.float64)}))
    expected = {own: torch.zeros(weight.shape, dtype=torch.float64) for own, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches(examples, 1):
        Losses().of(model, batch, device).sum().backward()
        for own, weight in weights.items():
            assert weight.grad is not None
            expected[own] += weight.grad.to("cpu", torch.float64) ** 2
            weight.grad = None
    model.requires_grad_(False)
    lines = []
    for own, truth in expected.items():
        apart = (found[own] - truth).abs()
        errors = (apart.max() / truth.max(), apart.mean() / truth.mean(), found[own].sum() / truth.sum() - 1)
        lines.append((own, *(error.item() for error in errors)))
    return lines


# --- ratios on a CPU


def llama(given: argparse.Namespace) -> tuple[Any, dict[str, nn.Parameter], list[Example], dict[str, Any]]:
    """The model, what is covered of it, the examples, and the ways: how many at a time, and the plan."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (64, 2) if given.small else (768, 8)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    length, samples = given.length or 96, given.samples or 8
    examples = [Example(torch.randint(5, 2000, (length,)).tolist()) for _ in range(samples)]
    names = _targets.select({n: tuple(w.shape) for n, w in model.named_parameters()}, config.to_dict()).names
    weights = {own: weight for own, weight in model.named_parameters() if own in names}
    half = layers // 2
    groups = ((half, layers), (0, half))
    ways: dict[str, tuple[int, Plan | None]] = {
        "forward + backward": (1, None),
        "device": (1, Plan("device", 1, 0, 0, 0)),
        "disk": (1, Plan("disk", 1, 0, 0, 0)),
        "two groups": (1, Plan("groups", 1, 0, 0, 0, groups)),
        "forward + backward of 4": (4, None),
        "device, 4 at a time": (4, Plan("device", 4, 0, 0, 0)),
        "disk, 4 at a time": (4, Plan("disk", 4, 0, 0, 0)),
        "two groups, 4 at a time": (4, Plan("groups", 4, 0, 0, 0, groups)),
    }
    return model, weights, examples, ways


def on_cpu(given: argparse.Namespace) -> None:
    model, weights, examples, ways = llama(given)
    if given.peak is not None:
        with tempfile.TemporaryDirectory(prefix="bench-fisher-") as folder:
            go(model, weights, ways[given.peak][1], examples[:2], 1, Path(folder))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        return
    samples, length = len(examples), len(examples[0].ids)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="bench-fisher-") as folder:
        for _ in range(given.turns + 1):  # The first warms up.
            for name, (size, plan) in ways.items():
                began = time.process_time()  # Of the processor, which other work on the machine disturbs least.
                go(model, weights, plan, examples, size, Path(folder))
                spent[name].append(time.process_time() - began)
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; {samples} x {length} tokens")
    print(f"{sum(w.numel() for w in weights.values()) / 1e6:.1f} M weights covered; medians of {given.turns} turns")
    print(f"{'':>26} s per sample   ratio")
    for name, (size, _) in ways.items():
        floor = statistics.median(spent["forward + backward" + ("" if size == 1 else " of 4")][1:])
        middle = statistics.median(spent[name][1:])
        print(f"{name:>26} {middle / samples:12.4f} {middle / floor:7.3f}")
    sums = 4 * sum(w.numel() for w in weights.values()) / 1e6
    largest = 4 * max(w.numel() for w in weights.values()) / 1e6
    print(
        f"peak memory over a pass that drops every gradient (MB); sums {sums:.1f}, the largest gradient {largest:.1f}"
    )
    base = peak("forward + backward", given)
    for name in ("device", "two groups", "disk"):
        print(f"{name:>26} {peak(name, given) - base:12.1f}", flush=True)
    print("pages of the files that disk maps into memory count, as long as nothing else needs theirs")


def go(
    model: Any, weights: dict[str, nn.Parameter], plan: Plan | None, examples: list[Example], size: int, folder: Path
) -> None:
    if plan is not None:
        Run(model, weights, plan, examples, Losses(), folder=folder).run(lambda *_: None)
        return
    hooks = []
    for weight in weights.values():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(drop))
    for batch in batches(examples, size):
        Losses().of(model, batch, "cpu").sum().backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)


def drop(weight: torch.Tensor) -> None:
    weight.grad = None


def peak(name: str, given: argparse.Namespace) -> float:
    """Most memory held by a process of its own, MB."""
    call = [sys.executable, __file__, "--peak", name, *(["--small"] if given.small else [])]
    return float(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
