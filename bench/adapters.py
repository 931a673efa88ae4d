"""Time `svd` of three adapters of rank 64 on one decoder layer: PEFT's add_weighted_adapter beside merge_adapters.

usage: adapters.py OUT [--repeats 3] [--hidden 2048] [--intermediate 8192] [--rank 64] [--peft full reduced]

Makes the base (random, one layer, a small vocabulary) and the adapters in OUT, then gives each way a process of its
own. `merge` is PEFT's merge alone, its adapters loaded, and the whole of our step, reading and writing included;
`process` holds start-up, loading and saving. PEFT's `full` is its default, `reduced` is svd_full_matrices=False. The
products B·A must agree, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ADAPTERS, WEIGHTS = ["a1", "a2", "a3"], [0.4, 0.3, 0.3]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Cost(NamedTuple):
    merge: float  # s
    process: float  # s
    cpu: float  # s, of the process
    rss: float  # GB


def make(folder: Path, hidden: int, intermediate: int, rank: int) -> None:
    """The base and the adapters, unless they are there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if (folder / "a3" / "adapter_model.safetensors").is_file():
        return
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    for number, name in enumerate(ADAPTERS):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(MODULES)))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder / name)


def by_peft(folder: Path, out: Path, full: bool) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, folder / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    started = time.perf_counter()
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "merged", combination_type="svd", svd_full_matrices=full)
    merged = time.perf_counter() - started
    model.save_pretrained(out, selected_adapters=["merged"])
    return merged


def by_hubforge(folder: Path, out: Path) -> float:
    import torch  # noqa: F401 - PEFT's clock starts with torch loaded.

    from hubforge.op import Artifact, Context
    from hubforge.stages.merge_adapters import MergeAdapters

    op = MergeAdapters(adapters=ADAPTERS, weights=WEIGHTS, combination_type="svd")
    inputs = {name: Artifact(name, "adapter", name, folder / name) for name in ADAPTERS}
    started = time.perf_counter()
    op.run(Context("merged", out, inputs))
    return time.perf_counter() - started


def measure(folder: Path, out: Path, who: str, repeats: int) -> Cost:
    """The median cost over processes of their own; what the last one made is left in `out`."""
    seen = []
    for _ in range(repeats):
        started = time.perf_counter()
        child = [sys.executable, __file__, str(folder), "--child", who, str(out)]
        process = subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        if status:
            sys.exit(f"{' '.join(child)} failed")
        merged = float(said.split()[-1])
        seen.append(Cost(merged, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9))
    return Cost(*(statistics.median(column) for column in zip(*seen, strict=True)))


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of a module's product, in the Frobenius norm."""
    from safetensors.torch import load_file

    ours, theirs = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for key in (key for key in ours if "lora_A" in key):
        found, wanted = (f[key.replace("lora_A", "lora_B")].float() @ f[key].float() for f in (ours, theirs))
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--peft", nargs="+", choices=("full", "reduced"), default=["full", "reduced"])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, out = args.child[0], Path(args.child[1])
        out.mkdir(parents=True, exist_ok=True)
        print(by_hubforge(args.out, out) if who == "hubforge" else by_peft(args.out, out, who == "full"))
        return
    make(args.out, args.hidden, args.intermediate, args.rank)
    ours = measure(args.out, args.out / "hubforge", "hubforge", args.repeats)
    costs = {"hubforge": ours}
    for who in args.peft:
        cost = costs[f"peft {who}"] = measure(args.out, args.out / who, who, args.repeats)
        apart = difference(args.out / "hubforge", args.out / who / "merged")
        print(
            f"peft {who:8} merge {cost.merge:6.2f} s, process {cost.process:6.1f} s, cpu {cost.cpu:6.1f} s, "
            f"rss {cost.rss:4.2f} GB; hubforge takes 1/{cost.merge / ours.merge:.0f} of its merge, "
            f"1/{cost.process / ours.process:.1f} of its process; products differ by {apart:.1e}"
        )
        if apart > 1e-4:
            sys.exit("the products do not agree")
    print(
        f"hubforge      merge {ours.merge:6.2f} s, process {ours.process:6.1f} s, cpu {ours.cpu:6.1f} s, "
        f"rss {ours.rss:4.2f} GB"
    )
    print(json.dumps({who: cost._asdict() for who, cost in costs.items()}))


if __name__ == "__main__":
    main()
