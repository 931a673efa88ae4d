"""Merges beside the time that their bytes alone take, fused beside unfused, and memory by depth; in one run.

usage: merge_floor.py FAMILY OUT [--repeats 3] [--only NAME ...] [--threads 2]

FAMILY is that of merge.py. Each work is a process of its own, start-up included, inputs in the page cache; a work and
its floors take turns. A floor reads every input of the work and writes its output with no arithmetic, by `--threads`
threads with buffers of their own: `bytes` is that alone; `floor` also imports torch, as whoever merges with it must,
and takes the sha256 of what it writes, as every artifact needs. `two-stage` is an average of three adapters, folded in
with damping by a Fisher mask, and a slerp of that with a fine-tune of another adapter: in one pass, and stage by stage.
`layers` merges models of 4, 16 and 64 layers of one width: their peak RSS should be the same.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import shutil
import statistics
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from merge import Cost, run  # bench/merge.py

MODELS, ADAPTERS = ["ft1", "ft2", "ft3"], ["a1", "a2", "a3"]
VOICES = {"op": "average", "adapters": ADAPTERS}
STYLED = {"op": "apply", "model": "base", "adapters": ["voices"], "scale": 0.3, "importance": "mask"}
TUNED = {"op": "apply", "model": "base", "adapters": ["a2"]}
HEALED = {"op": "slerp", "model": "styled", "to": "tuned", "t": 0.3}
TWO_STAGE = {"voices": VOICES, "styled": STYLED, "tuned": TUNED, "healed": HEALED}


class Work(NamedTuple):
    steps: dict[str, dict[str, Any]]
    reads: list[str]  # the inputs, the one first that the output is as large as
    fused: bool = True


WORKS = {
    "linear": Work({"out": {"op": "linear", "models": MODELS, "weights": [0.4, 0.3, 0.3]}}, MODELS),
    "slerp": Work({"out": {"op": "slerp", "model": "ft1", "to": "ft2", "t": 0.3}}, MODELS[:2]),
    "apply": Work({"out": {"op": "apply", "model": "base", "adapters": ["a1"]}}, ["base", "a1"]),
    "two-stage": Work(TWO_STAGE, ["base", *ADAPTERS, "mask"]),
    "unfused": Work(TWO_STAGE, [], fused=False),
}
DEPTHS = (4, 16, 64)


def merge(family: Path, out: Path, name: str) -> None:
    """Do one work with hubforge, in this process."""
    from hubforge import catalog
    from hubforge.op import Artifact, Context, Fused, TensorOp
    from hubforge.run import execute

    work = WORKS[name]
    kinds = {"a": "adapter", "m": "mask"}
    held = {path.name: Artifact(path.name, kinds.get(path.name[0], "model"), path.name, path)  # type: ignore[arg-type]
            for path in [*family.iterdir(), out.parent / "mask"] if path.is_dir()}  # fmt: skip
    fused: dict[str, Fused] = {}
    for step, fields in work.steps.items():
        op = catalog.find("stages", fields["op"])(**{key: value for key, value in fields.items() if key != "op"})
        ctx = Context(step, out / step, held)
        if isinstance(op, TensorOp) and work.fused:
            ctx = replace(ctx, fused={ref: fused[ref] for ref in fused if ref in fields.values()})
            if step != list(work.steps)[-1]:
                fused[step] = Fused(op, ctx)
                continue
        ctx.out.mkdir(parents=True)
        execute(op, ctx)
        held[step] = Artifact(step, op.makes, step, ctx.out)


def floor(folders: list[Path], out: Path, threads: int, *, whole: bool) -> None:
    """Read every file of the folders, and write those of the first. whole: with torch imported, and digests taken."""
    import hashlib

    if whole:
        import torch  # noqa: F401

        atexit.register(gc.freeze)  # as hubforge ends too
    first, *others = [sorted(folder.glob("*.safetensors")) for folder in folders]
    out.mkdir(parents=True)
    queue = list(range(max(len(files) for files in (first, *others))))
    size = 4 << 20

    def work() -> None:
        buffer = bytearray(size)
        while queue:
            number = queue.pop(0)
            digest = hashlib.sha256()
            open_files = [files[number].open("rb", buffering=0) for files in (first, *others) if number < len(files)]
            with (out / f"{number}").open("wb", buffering=0) as target:
                while open_files:
                    for file in list(open_files):
                        count = file.readinto(buffer)
                        if not count:
                            open_files.remove(file)
                        elif file.name == str(first[number]) if number < len(first) else False:
                            target.write(memoryview(buffer)[:count])
                            if whole:
                                digest.update(memoryview(buffer)[:count])

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def make_mask(family: Path, folder: Path) -> None:
    """A Fisher mask of the base's projections, bfloat16, with the importance of each layer."""
    import torch
    from safetensors.torch import save_file

    from hubforge.tensors.reader import open_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(family / "base") as base:
        infos = [info for info in base.tensors.values() if "proj" in info.name]
        save_file({i.name: torch.rand(i.shape, dtype=torch.bfloat16) for i in infos}, folder / "fisher.safetensors")
    layers = {str(layer): {"sum": 1.0 + layer} for layer in range(64)}
    (folder / "layer_importance.json").write_text(json.dumps({"layers": layers}))


def make_deep(folder: Path, layers: int) -> None:
    """Two models of so many layers, 3.1 million parameters each, bfloat16."""
    import torch
    from safetensors.torch import save_file

    for seed, name in enumerate(("one", "two")):
        path = folder / name
        path.mkdir(parents=True)
        torch.manual_seed(seed)
        shapes = {"gate": (2048, 512), "up": (2048, 512), "down": (512, 2048)}
        tensors = {
            f"model.layers.{i}.mlp.{n}_proj.weight": torch.randn(s).bfloat16()
            for i in range(layers)
            for n, s in shapes.items()
        }
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "llama"}')
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).write_text("{}")


def merge_deep(folder: Path, out: Path) -> None:
    from hubforge.op import Artifact, Context
    from hubforge.run import execute
    from hubforge.stages.slerp import Slerp

    held = {name: Artifact(name, "model", name, folder / name) for name in ("one", "two")}
    out.mkdir(parents=True)
    execute(Slerp.model_validate({"model": "one", "to": "two", "t": 0.3}), Context("deep", out, held))


def measure(command: list[str], out: Path) -> Cost:
    """What one run of a command takes; its output is removed."""
    cost = run(command, out)
    shutil.rmtree(out, ignore_errors=True)
    return cost


def make(family: Path, folder: Path, what: str) -> None:
    """In a process of its own: a child's peak RSS starts from its parent's."""
    subprocess.run([sys.executable, __file__, str(family), str(folder), "--do", what], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=[*WORKS, "layers"], default=[*WORKS, "layers"])
    parser.add_argument("--do", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        kind, _, name = args.do.partition(" ")
        if kind == "make-mask":
            make_mask(args.family, args.out)
        elif kind == "make-deep":
            make_deep(args.out, int(name))
        elif kind == "merge":
            merge(args.family, args.out, name)
        elif kind == "deep":
            merge_deep(args.family, args.out)
        else:
            folders = [args.out.parent / "mask" if each == "mask" else args.family / each for each in WORKS[name].reads]
            floor(folders, args.out, args.threads, whole=kind == "floor")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if {"two-stage", "unfused"} & set(args.only):
        make(args.family, args.out / "mask", "make-mask")
    for path in [*args.family.rglob("*.safetensors"), *args.out.rglob("*.safetensors")]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(bytearray(1 << 24)):
                pass

    def command(family: Path, what: str) -> list[str]:
        return [
            sys.executable,
            __file__,
            str(family),
            str(args.out / "work"),
            "--threads",
            str(args.threads),
            "--do",
            what,
        ]

    seen: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(args.repeats):
        for name in args.only:
            for kind in ("merge", "floor", "bytes") if name in WORKS and WORKS[name].reads else ("merge",):
                if name in WORKS:
                    seen.setdefault((name, kind), []).append(
                        measure(command(args.family, f"{kind} {name}"), args.out / "work")
                    )
    median = {
        key: Cost(*(statistics.median(column) for column in zip(*costs, strict=True))) for key, costs in seen.items()
    }
    for (name, kind), cost in median.items():
        ratio = median[name, "merge"].wall / cost.wall
        against = (
            ""
            if kind == "merge"
            else f"   merge / {kind} = {ratio:.2f}" + (" (target 1.30)" if kind == "floor" else "")
        )
        print(f"{name:10} {kind:6} wall {cost.wall:6.2f} s, cpu {cost.cpu:6.2f} s, rss {cost.rss:4.2f} GB{against}")
    if ("two-stage", "merge") in median and ("unfused", "merge") in median:
        ratio = median["two-stage", "merge"].wall / median["unfused", "merge"].wall
        print(f"two-stage  fused / unfused = {ratio:.2f} (target 0.50)")
    if "layers" in args.only:
        for layers in DEPTHS:
            make(args.family, args.out / "deep", f"make-deep {layers}")
            cost = measure(command(args.out / "deep", "deep"), args.out / "work")
            print(f"layers {layers:3} wall {cost.wall:6.2f} s, rss {cost.rss:5.3f} GB")
            shutil.rmtree(args.out / "deep")
    shutil.rmtree(args.out)


if __name__ == "__main__":
    main()
