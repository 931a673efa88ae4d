"""What a mask saves, over several families of models: `python bench/protection.py WORK [--seeds 5 --jobs 2]`.

For each seed it trains a family (`hubforge lab`) in WORK/seed-N and runs recipes/lab/protection.yaml there, with
`hubforge run`; what is made already is not made again, so a run that was stopped goes on. What came out is kept as
WORK/results/seed-N.json, and the table over all results there is printed: `--table` prints it alone.

The drop is prompt_level_strict_acc of the instruct model less that of the model with the adapter. What a mask recovers
of the unmasked adapter's drop is a ratio of two means over the seeds: its interval is Fieller's (1954), that of the
points saved is Student's t, both at 95 %. A seed is one family with its own 200 prompts, so what varies between seeds
holds the spread over prompts too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hubforge import recipe as recipes
from hubforge.evals._compare import read_samples, t_quantile
from hubforge.lab.checkers import follows
from hubforge.machine import hardware
from hubforge.places import default_store
from hubforge.plan import make
from hubforge.store import LocalStore

RECIPE = Path("recipes/lab/protection.yaml")
STYLES = ("prose", "dialogue", "terse")
METRIC = "prompt_level_strict_acc"
PLANNING = threading.Lock()  # Planning writes down the digests it took, under a name of this process.
# Steps that a process makes in one go, those that matter most first: what a stopped run has is then worth a look.
BATCHES = (
    ("none", "two-sided-64", "random-64", "published-64"),
    ("two-sided-16", "random-16", "published-16", "projected-16"),
    ("core-64", "left-64", "right-64", "scale-64"),
    ("core-16", "left-16", "right-16", "scale-16"),
    ("projected-64",),
)


def hubforge(folder: Path, *arguments: str) -> str:
    """One command on one thread, in its own process, logged beside the family; "" or what it said at last."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "hubforge", "--offline", "--device", "cpu", *arguments]
    log_file = folder / "logs" / f"{arguments[-1].replace('/', '-') if arguments[0] == 'run' else arguments[0]}.txt"
    log_file.parent.mkdir(exist_ok=True)
    with log_file.open("a") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    tail = log_file.read_text().splitlines()[-6:]
    return "\n".join([f"hubforge {' '.join(arguments)}: exit {done.returncode}", *tail]) if done.returncode else ""


def run(work: Path, seeds: Sequence[int], jobs: int, only: Sequence[str]) -> None:
    """Make every family, then every step, batch by batch: all seeds come to the same point at the same time."""
    folders = {seed: work / f"seed-{seed}" for seed in seeds}

    def begin(seed: int) -> None:
        folder = folders[seed]
        (folder / RECIPE).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pyproject.toml").touch()  # marks the folder as a project: its store lies in it
        shutil.copyfile(RECIPE, folder / RECIPE)
        need(hubforge(folder, "lab", str(folder / ".lab"), "--seed", str(seed)))
        # What all jobs of the seed need is made once, so that none waits for another.
        masks = [f"masks.{kind}-{k}" for kind in ("core", "random") for k in (16, 64)]
        need(hubforge(folder, "run", str(folder / RECIPE), *masks, "evals.follows/instruct"))

    def work_on(part: tuple[int, list[str]]) -> None:
        seed, names = part
        while names:
            problem = hubforge(folders[seed], "run", str(folders[seed] / RECIPE), *names)
            left = [name for name in names if make_plan(folders[seed]).steps[name].status != "cached"]
            collect(work, seed)
            if not problem or not left:
                return
            # One that cannot be made, such as one that does not reach the gain, must not hold up the others.
            failed = re.search(r"stages\.(\S+): failed: the adapters gain at most (\S+) nats", problem)
            name = f"evals.follows/{failed[1]}" if failed else left[0]
            if failed:
                (folders[seed] / f"unreached-{failed[1]}.txt").write_text(failed[2])
            else:
                sys.stderr.write(f"seed {seed}, {name}: {problem}\n")
            names = [other for other in left if other != name]

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(begin, seeds))
        parts = [
            (seed, [f"evals.follows/{style}-with-{variant}" for variant in batch if not only or variant in only])
            for batch in BATCHES
            for seed in seeds
            for style in STYLES
        ]
        list(pool.map(work_on, [part for part in parts if part[1]]))


def need(problem: str) -> None:
    if problem:
        raise SystemExit(problem)


def make_plan(folder: Path) -> Any:
    path = folder / RECIPE
    with PLANNING:
        return make(recipes.load(path), LocalStore(default_store(path)))


def collect(work: Path, seed: int) -> None:
    """WORK/results/seed-N.json: every model that is evaluated, with the strict score of each prompt as 0 or 1."""
    plan = make_plan(work / f"seed-{seed}")

    def manifest(name: str) -> Any:
        step = plan.steps[name]
        return plan.store.manifest(step.key) if step.status == "cached" else None

    def answers(name: str) -> str:
        lines = read_samples(plan.store.folder(plan.steps[name].key))
        by_prompt = {line["doc_id"]: line["metrics"][METRIC] for line in lines}
        return "".join(str(int(by_prompt[number])) for number in sorted(by_prompt))

    held_out = (work / f"seed-{seed}" / ".lab" / "tasks" / "held_out.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in held_out]

    def kinds(name: str) -> dict[str, list[int]]:
        """Of each kind of instruction, how many were followed, and how many there were."""
        found: dict[str, list[int]] = {}
        for line in read_samples(plan.store.folder(plan.steps[name].key)):
            document = documents[line["doc_id"]]
            for kind, arguments in zip(document["instructions"], document["arguments"], strict=True):
                count = found.setdefault(kind, [0, 0])
                count[0] += follows(line["response"], kind, json.loads(arguments))
                count[1] += 1
        return found

    rows = []
    for name in plan.steps:
        style, _, variant = name.removeprefix("evals.follows/").partition("-with-")
        if not variant or not name.startswith("evals.") or manifest(name) is None:
            continue
        folded = manifest(f"stages.{style}-with-{variant}")
        adapter = manifest(f"adapters.{style}-{'none' if variant.startswith('projected') else variant}")
        leak = folded.metrics.get("leak") or adapter.metrics.get("leak")
        rows.append(
            {"style": style, "variant": variant, "answers": answers(name), "training_loss": adapter.metrics["loss"]}
            | {
                "kinds": kinds(name),
                "scale": folded.metrics["scale"],
                "gain": folded.metrics["loss_gain"],
                "leak": leak,
            }
        )
    base = manifest("evals.follows/instruct")
    if base is None:
        return
    found = {
        "seed": seed,
        "machine": hardware(),
        "versions": base.versions | (manifest("adapters.prose-none").versions if rows else {}),
        "instruct": answers("evals.follows/instruct"),
        "kinds": kinds("evals.follows/instruct"),
        "unreached": {
            path.stem.removeprefix("unreached-"): float(path.read_text())
            for path in (work / f"seed-{seed}").glob("unreached-*.txt")
        },
        "rows": rows,
    }
    target = work / "results" / f"seed-{seed}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{time.monotonic_ns()}")  # Threads may collect one seed at the same time.
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(target)


def share(answers: str) -> float:
    return answers.count("1") / len(answers)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def fieller(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of two paired means and its 95 % interval; nan bounds where the lower mean may be zero.

    Source: Fieller 1954, J. R. Stat. Soc. B 16:175. The bounds are the R at which mean(above − R · below) just differs
    from zero by Student's t.
    """
    n = len(above)
    x, y = statistics.fmean(below), statistics.fmean(above)
    ratio = y / x if x else math.nan
    if n < 2 or not x:
        return ratio, math.nan, math.nan
    t2 = t_quantile(n - 1) ** 2 / n
    xx, yy, xy = statistics.variance(below), statistics.variance(above), statistics.covariance(below, above)
    a, b, c = x * x - t2 * xx, x * y - t2 * xy, y * y - t2 * yy
    root = b * b - a * c
    if a <= 0 or root < 0:
        return ratio, math.nan, math.nan
    return ratio, (b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each way of protecting, over all styles and each; the families that have all of a row's models."""
    lines = []
    for style in ("", *STYLES):
        styles = [style] if style else list(STYLES)
        lines += [f"\n**{style.capitalize() or 'All three styles'}**\n"]
        lines += ["| adapter | scale | gain, nats | leak, U and V | accuracy | drop, points | saved, points | "
                  "recovered | families |",
                  "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        variants = {row["variant"] for result in results for row in result["rows"]}
        variants |= {name.partition("-with-")[2] for result in results for name in result.get("unreached", {})}
        for variant in sorted(variants, key=order):
            lines += row_of(results, styles, variant)
    return "\n".join(lines)


def order(variant: str) -> tuple[int, str]:
    """Unmasked first, then as the recipe has them."""
    kinds = ("none", "published", "two-sided", "core", "left", "right", "scale", "projected", "random")
    kind = variant.rpartition("-")[0] or variant
    return kinds.index(kind), variant.rpartition("-")[2].rjust(4, "0")


def lost(results: Sequence[dict[str, Any]], variants: Sequence[str]) -> str:
    """Markdown: for each style, which kinds of instruction are followed less often than by the instruct model."""
    lines = [
        "| style | adapter | instructions followed, as a share of what the instruct model follows |",
        "| --- | --- | --- |",
    ]
    for style in STYLES:
        for variant in variants:
            pairs = [
                (result["kinds"], row["kinds"])
                for result in results
                for row in result["rows"]
                if (row["style"], row["variant"]) == (style, variant)
            ]
            if not pairs:
                continue
            before, after = (
                {
                    kind: sum(pair[i].get(kind, [0])[0] for pair in pairs)
                    for kind in sorted(set().union(*(pair[0] for pair in pairs)))
                }
                for i in (0, 1)
            )
            worst = sorted(before, key=lambda kind: after[kind] / max(before[kind], 1))[:4]
            cells = [f"{kind} {100 * after[kind] / max(before[kind], 1):.0f} %" for kind in worst]
            lines.append(f"| {style} | {variant.replace('none', 'no mask')} | {', '.join(cells)} |")
    return "\n".join(lines)


def versus(results: Sequence[dict[str, Any]], one: str, others: Sequence[str]) -> str:
    """Markdown: by how many points one way is better than others, family by family."""
    lines = ["| style | compared | points better | families |", "| --- | --- | ---: | ---: |"]
    for style in ("", *STYLES):
        styles = [style] if style else list(STYLES)
        for other in others:
            better = []
            for result in results:
                accuracy = {(row["style"], row["variant"]): share(row["answers"]) for row in result["rows"]}
                if all((style, name) in accuracy for style in styles for name in (one, other)):
                    better.append(statistics.fmean(accuracy[style, one] - accuracy[style, other] for style in styles))
            if better:
                shown = points(t_interval(better))
                lines.append(f"| {style or 'all three'} | {one}, {other} | {shown} | {len(better)} |")
    return "\n".join(lines)


def row_of(results: Sequence[dict[str, Any]], styles: Sequence[str], variant: str) -> list[str]:
    drops, plain, saved, rows, accuracies = [], [], [], [], []
    for result in results:
        by_name = {(row["style"], row["variant"]): row for row in result["rows"]}
        if not all((style, name) in by_name for style in styles for name in (variant, "none")):
            continue
        own = [by_name[style, variant] for style in styles]
        base = share(result["instruct"])
        accuracies.append(statistics.fmean(share(row["answers"]) for row in own))
        drops.append(base - accuracies[-1])
        plain.append(base - statistics.fmean(share(by_name[style, "none"]["answers"]) for style in styles))
        saved.append(plain[-1] - drops[-1])
        rows += own
    short_of = [result.get("unreached", {}).get(f"{style}-with-{variant}") for result in results for style in styles]
    short_of = [most for most in short_of if most is not None]
    if not drops:
        said = f"gain not reached: at most {max(short_of):.2f}" if short_of else ""
        return [f"| {variant} | | {said} | | | | | | 0 |"] if said else []
    leaks = [row["leak"] for row in rows if row["leak"] and "mean_left" in row["leak"]]
    leak = [f"{statistics.fmean(one[f'mean_{side}'] for one in leaks):.1e}" for side in ("left", "right") if leaks]
    gain, scale = statistics.fmean(row["gain"] for row in rows), statistics.fmean(row["scale"] for row in rows)
    cells = [
        variant.replace("none", "no mask"),
        f"{scale:.2f}",
        f"{gain:.2f}",
        " ".join(leak),
        f"{statistics.fmean(accuracies):.3f}",
        points(t_interval(drops)),
        points(t_interval(saved)) if variant != "none" else "",
        percent(fieller(saved, plain)) if variant != "none" else "",
        str(len(drops)) + (f" ({len(short_of)} did not reach the gain)" if short_of else ""),
    ]
    return ["| " + " | ".join(cells) + " |"]


def points(found: tuple[float, float, float]) -> str:
    value, low, high = (100 * one for one in found)
    return f"{value:.1f}" if math.isnan(low) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def percent(found: tuple[float, float, float]) -> str:
    value, low, high = (100 * one for one in found)
    return f"{value:.0f} %" if math.isnan(low) else f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="families 0 to N-1")
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds to run")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, a thread each")
    parser.add_argument("--only", nargs="*", default=[], help="only these ways, such as none two-sided-64")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of what is made")
    given = parser.parse_args()
    work = given.work.absolute()
    if not given.table:
        run(work, range(given.first, given.seeds), given.jobs, given.only)
    for folder in work.glob("seed-*/.hubforge"):
        collect(work, int(folder.parent.name.removeprefix("seed-")))
    results = [json.loads(path.read_text()) for path in sorted((work / "results").glob("*seed-*.json"))]
    if not results:
        raise SystemExit(f"nothing in {work / 'results'} yet")
    base = t_interval([share(result["instruct"]) for result in results])
    # Training differs in its last bits from one kind of processor to another: results that were made elsewhere, copied
    # here as NAME-seed-N.json, are families of their own.
    machines = sorted({f"{one['machine'].get('cpu', '')}, {one['machine']['platform']}" for one in results})
    versions = {name: version for result in results for name, version in result["versions"].items()}
    print(f"{len(results)} families (seeds {', '.join(str(one['seed']) for one in results)}), "
          f"{len(results[0]['instruct'])} prompts each; {METRIC} of instruct {points(base)}; {'; '.join(machines)}; "
          f"{', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}")  # fmt: skip
    print(table(results))
    print("\n**Two ways compared**\n")
    print(versus(results, "two-sided-64", ("random-64", "published-64", "two-sided-16")))
    print("\n**What is lost**: the four kinds of instruction that suffer most\n")
    print(lost(results, ("none", "two-sided-64", "random-64")))


if __name__ == "__main__":
    main()
