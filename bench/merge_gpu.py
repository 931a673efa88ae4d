"""Merge a random family on the CPU and on CUDA, in one process: wall seconds, and how far the bytes are apart.

usage: merge_gpu.py [FOLDER] [--layers 4] [--devices cuda:0 cuda:1 ...]

Makes about 1.5 GB under FOLDER (default /tmp/merge_gpu) and removes it at the end. `apart` counts the steps of the
output's dtype between the two results, at most, and `share` the elements that differ at all. `cuda x2` shares the
tensors between two workers of one GPU by naming it twice, as several GPUs would; its bytes must be those of `cuda`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubforge import catalog
from hubforge.op import Artifact, Context, Fused, Metrics
from hubforge.tensors.engine import find_devices, run_tensor_op
from hubforge.tensors.reader import open_checkpoint

HIDDEN, INTERMEDIATE, VOCAB, RANK = 2048, 8192, 32000, 64
MODELS, WEIGHTS = ["ft1", "ft2"], [0.6, 0.4]
STYLED = {"op": "apply", "model": "base", "adapters": ["a1"], "scale": 0.3}
WORKS: dict[str, list[dict[str, Any]]] = {  # all but the last are computed in the last one's pass
    "linear": [{"op": "linear", "models": ["base", *MODELS], "weights": [0.4, 0.3, 0.3]}],
    "task_arithmetic": [{"op": "task_arithmetic", "model": "base", "models": MODELS, "weights": WEIGHTS}],
    "slerp": [{"op": "slerp", "model": "ft1", "to": "ft2", "t": 0.3}],
    "apply": [{"op": "apply", "model": "base", "adapters": ["a1"]}],
    "apply, slerp": [STYLED, {"op": "slerp", "model": "step0", "to": "ft2", "t": 0.3}],
    "stochastic": [{"op": "slerp", "model": "ft1", "to": "ft2", "t": 0.3, "rounding": "stochastic"}],
    "ties": [{"op": "ties_models", "base_model": "base", "models": MODELS, "weights": WEIGHTS, "density": 0.2}],
}


def make_family(folder: Path, layers: int) -> dict[str, Artifact]:
    import torch
    from safetensors.torch import save_file

    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        for name, shape in {
            "gate": (INTERMEDIATE, HIDDEN),
            "up": (INTERMEDIATE, HIDDEN),
            "down": (HIDDEN, INTERMEDIATE),
        }.items():
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
    held = {}
    base = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    for model in ("base", *MODELS):
        path = folder / model
        path.mkdir(parents=True)
        tensors = (
            base if model == "base" else {n: (w + torch.randn_like(w) * 0.002).bfloat16() for n, w in base.items()}
        )
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).write_text("{}")
        held[model] = Artifact(model, "model", model, path)
    factors = {}
    for name in base:
        if "proj" in name:
            out, in_ = shapes[name]
            stem = "base_model.model." + name.removesuffix(".weight")
            factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, in_) * 0.02
            factors[f"{stem}.lora_B.weight"] = torch.randn(out, RANK) * 0.02
    (folder / "a1").mkdir()
    save_file(factors, folder / "a1" / "adapter_model.safetensors")
    (folder / "a1" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return held | {"a1": Artifact("a1", "adapter", "a1", folder / "a1")}


def merge(held: dict[str, Artifact], out: Path, steps: list[dict[str, Any]], devices: Sequence[str]) -> Metrics:
    fused: dict[str, Fused] = {}
    out.mkdir()
    for number, fields in enumerate(steps):
        op = catalog.find("stages", fields["op"])(**{key: value for key, value in fields.items() if key != "op"})
        ctx = Context(f"step{number}", out, held, fused=dict(fused), report=lambda event: None)
        if number + 1 < len(steps):
            fused[f"step{number}"] = Fused(op, ctx)
    return run_tensor_op(op, replace(ctx, report=print_notes), devices=devices)


def print_notes(event: Any) -> None:
    if type(event).__name__ in ("Note", "Warned"):
        print(f"    {event.text}")


def apart(one: Path, other: Path) -> tuple[int, float]:
    """The most steps of bfloat16 between two outputs, and the share of elements that differ."""
    import torch

    most = differ = total = 0
    with open_checkpoint(one) as a, open_checkpoint(other) as b:
        for name in a:
            x, y = (c.read(name).view(torch.int16) for c in (a, b))
            total += x.numel()
            if torch.equal(x, y):
                continue
            x, y = x.int(), y.int()
            # Bits of floats are ordered like the floats once the negative ones are turned round.
            x, y = (torch.where(v < 0, -(v & 0x7FFF), v) for v in (x, y))
            most = max(most, int((x - y).abs().max()))
            differ += int((x != y).sum())
    return most, differ / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("/tmp/merge_gpu"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--devices", nargs="*", help="by default all GPUs")
    args = parser.parse_args()
    import torch

    shutil.rmtree(args.folder, ignore_errors=True)
    held = make_family(args.folder, args.layers)
    gpus = args.devices or find_devices("cuda")
    print(f"{', '.join(gpus)}, torch {torch.__version__}")
    ways = {"cpu": ["cpu"], "cuda": gpus, "cuda x2": [gpus[0], gpus[0]]}
    print(f"{'work':16} {'device':8} {'wall s':>7}   bytes, beside the CPU's")
    for name, steps in WORKS.items():
        if not all(catalog.find("stages", step["op"]).on_gpu for step in steps):  # type: ignore[attr-defined]
            print(f"{name:16} is computed on the CPU whatever --device says")
            continue
        outs = {way: args.folder / f"out-{way.replace(' ', '')}" for way in ways}
        for way, devices in ways.items():
            before = time.perf_counter()
            try:
                merge(held, outs[way], steps, devices)
            except Exception as error:  # the table goes on with the other works
                print(f"{name:16} {way:8} failed: {type(error).__name__}: {error}")
                continue
            wall = time.perf_counter() - before
            same = "the same"
            if way != "cpu":
                most, share = apart(outs["cpu"], outs[way])
                same = "the same" if not most else f"at most {most} apart, in {share:.2e} of the elements"
            if way == "cuda x2" and outs["cuda"].is_dir():
                same += "; those of cuda" if apart(outs["cuda"], outs[way])[0] == 0 else "; NOT those of cuda"
            print(f"{name:16} {way:8} {wall:7.2f}   {same if way != 'cpu' else ''}", flush=True)
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
