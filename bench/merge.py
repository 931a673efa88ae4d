"""Measure hubforge beside mergekit and PEFT on one family of models, in one run: wall s, CPU s, peak RSS, ratios.

usage: merge.py FAMILY OUT [--mergekit BINARY] [--peft PYTHON] [--repeats 3] [--only ROW ...] [--json FILE]

FAMILY holds base, ft1, ft2, ft3 (models) and a1, a2, a3 (adapters). Each work is done by a process of its own, start-up
included, inputs in the page cache; ours and the peer's take turns, so that a busy machine slows both, and medians are
compared with the row's target. mergekit, and PEFT unless it is installed here, need virtual environments of their own:
BINARY is mergekit-yaml, PYTHON an interpreter. OUT is emptied.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

MODELS, ADAPTERS, WEIGHTS = ["ft1", "ft2", "ft3"], ["a1", "a2", "a3"], [0.4, 0.3, 0.3]


class Row(NamedTuple):
    """One line of the table: our steps, each of which may use "step0", "step1", ... before it, and the peer's work."""

    steps: list[dict[str, Any]]
    peer: Literal["mergekit", "peft", "svd", ""]
    work: Any = None  # a mergekit configuration, or PEFT's combination_type
    wall: float = 0.0  # target: at most this share of the peer's
    rss: float = 0.0  # target: at most so many GB


def _mergekit(method: str, base: str | None, models: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
    named = [{"model": each["model"], "parameters": {k: v for k, v in each.items() if k != "model"}} for each in models]
    config = {"merge_method": method, "models": named, "dtype": "bfloat16"}
    return config | ({"base_model": base} if base else {}) | ({"parameters": parameters} if parameters else {})


def _weighted(**more: Any) -> list[dict[str, Any]]:
    return [{"model": model, "weight": weight} | more for model, weight in zip(MODELS, WEIGHTS, strict=True)]


FROM_BASE = {"base_model": "base", "models": MODELS, "weights": WEIGHTS}
MERGED = {"adapters": ADAPTERS, "weights": WEIGHTS}
FOLDED = {"op": "apply", "model": "base", "adapters": ["step0"]}
ROWS = {
    "copy": Row([{"op": "apply", "model": "base", "adapters": ["a1"], "scale": 0}], ""),
    "linear": Row(
        [{"op": "linear", "models": MODELS, "weights": WEIGHTS}],
        "mergekit",
        _mergekit("linear", None, _weighted()),
        1 / 4,
        0.6,
    ),
    "task_arithmetic": Row(
        [{"op": "task_arithmetic", "model": "base", "models": MODELS, "weights": WEIGHTS}],
        "mergekit",
        _mergekit("task_arithmetic", "base", _weighted()),
        1 / 4,
        0.6,
    ),
    "slerp": Row(
        [{"op": "slerp", "model": "ft1", "to": "ft2", "t": 0.5}],
        "mergekit",
        _mergekit("slerp", "ft1", [{"model": "ft1"}, {"model": "ft2"}], t=0.5),
        1 / 6,
        0.6,
    ),
    "ties": Row(
        [{"op": "ties_models", "density": 0.2} | FROM_BASE],
        "mergekit",
        _mergekit("ties", "base", _weighted(density=0.2)),
        1 / 12,
        0.8,
    ),
    "dare_ties": Row(
        [{"op": "dare_ties", "density": 0.2} | FROM_BASE],
        "mergekit",
        _mergekit("dare_ties", "base", _weighted(density=0.2)),
        1 / 6,
        0.8,
    ),
    "peft_ties": Row([{"op": "ties", "density": 0.2} | MERGED, FOLDED], "peft", "ties", 1 / 4, 0.6),
    "peft_cat": Row([{"op": "merge_adapters", "combination_type": "cat"} | MERGED, FOLDED], "peft", "cat"),
    "peft_svd": Row([], "svd", None, 1 / 50),
    "apply": Row([{"op": "apply", "model": "base", "adapters": ["a1"]}], ""),
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
    wall: float  # s
    cpu: float  # s
    rss: float  # GB


def work(family: Path, out: Path, name: str) -> None:
    """Do one row's work with hubforge, in this process."""
    from hubforge import catalog
    from hubforge.op import Artifact, Context
    from hubforge.run import execute

    held = {path.name: path for path in family.iterdir() if path.is_dir()}
    artifacts = {n: Artifact(n, "adapter" if n in ADAPTERS else "model", n, path) for n, path in held.items()}
    for number, fields in enumerate(ROWS[name].steps):
        op = catalog.find("stages", fields["op"])(**{key: value for key, value in fields.items() if key != "op"})
        folder = out / f"step{number}"
        folder.mkdir(parents=True)
        execute(op, Context(f"step{number}", folder, artifacts))
        artifacts[f"step{number}"] = Artifact(f"step{number}", op.makes, f"step{number}", folder)


def commands(name: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """Who does a row's work, and how: a process each, which writes into OUT/<who>."""
    row = ROWS[name]
    found = {"hubforge": [sys.executable, __file__, str(args.family), str(args.out / "hubforge"), "--work", name]}
    if row.peer == "peft":
        found["peft"] = [args.peft, "-c", PEFT, str(args.family), str(args.out / "peft"), row.work]
    if row.peer == "mergekit" and args.mergekit:
        config = json.dumps(row.work)
        for model in ("base", *MODELS):
            config = config.replace(f'"{model}"', json.dumps(str(args.family / model)))
        (args.out / "mergekit.yml").write_text(config)
        found["mergekit"] = [args.mergekit, str(args.out / "mergekit.yml"), str(args.out / "mergekit"), "--quiet"]
    return found


def run(command: list[str], out: Path) -> Cost:
    """What a command costs; stops the benchmark when it fails."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # What the one before wrote must not be on its way to the disk meanwhile.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    noise = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{noise.decode(errors='replace')[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The median costs of everybody who does a row's work, and what is said of their outputs."""
    if ROWS[name].peer == "svd":
        return _svd(args)
    seen: dict[str, list[Cost]] = {}
    for _ in range(args.repeats):
        for who, command in commands(name, args).items():
            seen.setdefault(who, []).append(run(command, args.out / who))
    costs = {who: Cost(*map(statistics.median, zip(*each, strict=True))) for who, each in seen.items()}
    said = ""
    if "peft" in costs:
        different = sum(differing(args.out / "hubforge" / "step1", args.out / "peft" / "model"))
        said = "equal bits" if not different else f"{different:,} elements differ"
    return {"costs": costs, "said": said}


def _svd(args: argparse.Namespace) -> dict[str, Any]:
    """PEFT's svd of one layer: the merge alone, its adapters loaded, beside our step, reading and writing included."""
    import adapters  # bench/adapters.py

    folder = args.out / "one-layer"
    adapters.make(folder, 2048, 8192, 64)
    costs = {}
    for who, name in (("hubforge", "hubforge"), ("peft", "full")):
        cost = adapters.measure(folder, args.out / who, name, args.repeats)
        costs[who] = Cost(cost.merge, cost.cpu, cost.rss)
    apart = adapters.difference(args.out / "hubforge", args.out / "peft" / "merged")
    return {"costs": costs, "said": f"the merge alone; products differ by {apart:.0e}"}


def differing(one: Path, other: Path) -> Iterator[int]:
    """For runs of rows of two checkpoints, how many bytes differ.

    Little is held: Linux counts the memory that this process had among that of the processes it starts afterwards.
    """
    import numpy as np

    from hubforge.tensors.reader import open_checkpoint

    with open_checkpoint(one) as ours, open_checkpoint(other) as theirs:
        assert set(ours) == set(theirs), set(ours) ^ set(theirs)
        for name in ours:
            rows, row = ours.info(name).rows, ours.row_bytes(name)
            assert theirs.info(name).nbytes == rows * row, name
            step = max(1, (16 << 20) // max(row, 1))
            for first in range(0, rows, step):
                last = min(first + step, rows)
                held = np.empty((2, (last - first) * row), np.uint8)
                for checkpoint, data in zip((ours, theirs), held, strict=True):
                    checkpoint.read_into(name, first, last, data.data)
                yield int(np.count_nonzero(held[0] != held[1]))


def show(name: str, found: dict[str, Any]) -> None:
    row, costs = ROWS[name], found["costs"]
    for who, cost in costs.items():
        line = f"{name:16} {who:9} wall {cost.wall:7.2f} s  cpu {cost.cpu:7.1f} s  rss {cost.rss:5.2f} GB"
        if who == "hubforge":
            if row.rss:
                line += f" (target {row.rss}: {'met' if cost.rss <= row.rss else 'MISSED'})"
        else:
            share = costs["hubforge"].wall / cost.wall
            line += f"  hubforge takes 1/{1 / share:.1f} of it"
            if row.wall:
                line += f" (target 1/{1 / row.wall:.0f}: {'met' if share <= row.wall else 'MISSED'})"
            line += f"; {found['said']}" if found["said"] else ""
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mergekit", help="the mergekit-yaml binary; without it only hubforge's side is measured")
    parser.add_argument("--peft", default=sys.executable, help="an interpreter that has PEFT and Transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=ROWS, help="these rows alone")
    parser.add_argument("--json", type=Path, help="write the costs here too")
    parser.add_argument("--work", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.family, args.out, args.work)
    for path in sorted(args.family.rglob("*.safetensors")):  # into the page cache
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors, medians of {args.repeats}")
    results = {}
    for name in args.only or ROWS:
        found = measure(name, args)
        show(name, found)
        results[name] = {who: cost._asdict() for who, cost in found["costs"].items()} | {"said": found["said"]}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(args.out)


if __name__ == "__main__":
    main()
