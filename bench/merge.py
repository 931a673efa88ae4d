"""Time hubforge beside mergekit and PEFT on one family of models, in one run: wall s, CPU s, peak RSS, ratios.

usage: merge.py FAMILY OUT [--mergekit BINARY --configs DIR] [--repeats 3] [--only NAME ...]

FAMILY holds base, ft1, ft2, ft3 (models) and a1, a2, a3 (adapters). Each work is done by a process of its own, start-up
included, inputs in the page cache. `copy` is the floor: it reads the base and writes it, with no arithmetic. mergekit
needs a virtual environment of its own; DIR holds its NAME.yml with FAMILY in place of the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

MODELS, ADAPTERS, WEIGHTS = ["ft1", "ft2", "ft3"], ["a1", "a2", "a3"], [0.4, 0.3, 0.3]
WORKS: dict[str, list[dict[str, Any]]] = {  # each step may use "step0", the step before it
    "copy": [{"op": "apply", "model": "base", "adapters": ["a1"], "scale": 0}],
    "linear": [{"op": "linear", "models": MODELS, "weights": WEIGHTS}],
    "task_arithmetic": [{"op": "task_arithmetic", "model": "base", "models": MODELS, "weights": WEIGHTS}],
    "slerp": [{"op": "slerp", "model": "ft1", "to": "ft2", "t": 0.3}],
    "apply": [{"op": "apply", "model": "base", "adapters": ["a1"]}],
    "peft_ties": [
        {"op": "ties", "adapters": ADAPTERS, "weights": WEIGHTS, "density": 0.2},
        {"op": "apply", "model": "base", "adapters": ["step0"]},
    ],
    "peft_cat": [
        {"op": "average", "adapters": ADAPTERS, "weights": WEIGHTS},
        {"op": "apply", "model": "base", "adapters": ["step0"]},
    ],
}

PEFT = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
family, out, combination = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, family / "a1", adapter_name="a1")
for name in ("a2", "a3"):
    model.load_adapter(family / name, adapter_name=name)
options = {"density": 0.2} if combination == "ties" else {}
model.add_weighted_adapter(["a1", "a2", "a3"], [0.4, 0.3, 0.3], "merged", combination_type=combination, **options)
model.save_pretrained(out / "adapter", selected_adapters=["merged"])
model.set_adapter("merged")
model.merge_and_unload().save_pretrained(out / "model", max_shard_size="500MB")
"""


class Cost(NamedTuple):
    wall: float
    cpu: float
    rss: float  # GB


def work(family: Path, out: Path, name: str) -> None:
    """Do one work with hubforge, in this process."""
    from hubforge import catalog
    from hubforge.op import Artifact, Context
    from hubforge.run import execute

    held = {path.name: path for path in family.iterdir() if path.is_dir()}
    artifacts = {n: Artifact(n, "adapter" if n in ADAPTERS else "model", n, path) for n, path in held.items()}
    for number, fields in enumerate(WORKS[name]):
        op = catalog.find("stages", fields["op"])(**{key: value for key, value in fields.items() if key != "op"})
        folder = out / f"step{number}"
        folder.mkdir(parents=True)
        execute(op, Context(f"step{number}", folder, artifacts))
        artifacts[f"step{number}"] = Artifact(f"step{number}", op.makes, f"step{number}", folder)


def measure(command: list[str], out: Path, repeats: int) -> Cost:
    """The median cost of running a command; stops the benchmark when it fails."""
    seen = []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        noise = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{noise.decode(errors='replace')[-2000:]}")
        seen.append(Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9))
    shutil.rmtree(out, ignore_errors=True)
    return Cost(*(statistics.median(column) for column in zip(*seen, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mergekit", help="the mergekit-yaml binary")
    parser.add_argument("--configs", type=Path, help="folder of mergekit configurations, NAME.yml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=WORKS, help="these works alone")
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.family, args.out, args.work)
    for path in sorted(args.family.rglob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    results: dict[str, dict[str, Cost]] = {}
    for name in args.only or WORKS:
        ours = [sys.executable, __file__, str(args.family), str(args.out), "--work", name]
        results[name] = {"hubforge": measure(ours, args.out, args.repeats)}
        if name.startswith("peft_"):
            script = [sys.executable, "-c", PEFT, str(args.family), str(args.out), name.removeprefix("peft_")]
            results[name]["peft"] = measure(script, args.out, args.repeats)
        config = args.configs / f"{name}.yml" if args.configs else None
        if args.mergekit and config and config.is_file():
            filled = args.out.with_suffix(f".{name}.yml")
            filled.write_text(config.read_text().replace("FAMILY", str(args.family)))
            results[name]["mergekit"] = measure(
                [args.mergekit, str(filled), str(args.out), "--quiet"], args.out, args.repeats
            )
            filled.unlink()
        for who, cost in results[name].items():
            ratio = results[name]["hubforge"].wall / cost.wall
            cells = f"wall {cost.wall:6.1f} s, cpu {cost.cpu:6.1f} s, rss {cost.rss:4.2f} GB, x{ratio:.2f}"
            print(f"{name:15} {who:8} {cells}")
    print(json.dumps({name: {who: cost._asdict() for who, cost in found.items()} for name, found in results.items()}))


if __name__ == "__main__":
    main()
