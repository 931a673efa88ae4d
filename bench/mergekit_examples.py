"""Merge small models by mergekit and by `hubforge import`, configuration by configuration, and compare every element.

usage: mergekit_examples.py OUT --mergekit PYTHON [--only NAME ...]

PYTHON is the interpreter of an environment with mergekit 0.1.5. Makes a family of small Llamas in OUT: a base, three
fine-tunes, one with another vocabulary, an adapter. The configurations, in mergekit_examples.yaml, ask what mergekit's
example files ask (linear, ties by module and layer, slerp by gradients, stacked layers, a model cut short, two
documents, ...), and what its other methods and tokenizer settings do.

Two runs of each. *float32*: the family in float32, `dtype: float32` and `out_dtype: bfloat16`, so that both compute in
float32 and round once. A unit is one rounding: the distance of neighbouring bfloat16 numbers at the result, or, where
terms cancel, 2^-21 of the tensor's largest element, which is what float32 leaves of them. *As written*: the family in
bfloat16, and `dtype: bfloat16`, in which mergekit computes task vectors and sums; ours still computes in float32.
`theirs` is how many elements mergekit's own two ways to compute that differ in. Exit code 1 when a configuration
without a stated reason is off by more than one unit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

DRIVER = """
import sys, traceback, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for file in sorted(Path(sys.argv[1]).glob("*.yml")):
    out = file.with_suffix("")
    documents = list(yaml.safe_load_all(file.read_text()))
    try:
        for number, document in enumerate(documents):
            where = out if number == len(documents) - 1 else Path(document.pop("name"))
            options = MergeOptions(quiet=True, write_model_card=False, lora_merge_cache=sys.argv[1] + "/loras")
            run_merge(MergeConfiguration.model_validate(document), str(where), options)
    except Exception as error:
        traceback.print_exc()
        file.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
"""
CASES = Path(__file__).with_suffix(".yaml")
REASONS = {
    "random": "which elements are kept is drawn otherwise",
    "between": "last places of the model between decide which elements at the threshold are trimmed",
    "head": "they merge the last slice's norm and head from as many models as the first slice has",
}
FAMILIES = {
    "float32": {"dtype": "float32", "out_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 in float32": {"dtype": "float32", "out_dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Difference:
    """Between two outputs: the largest in units of rounding, the share of elements that differ, tensors in one only."""

    units: float
    share: float
    only_in_one: int


def make_family(folder: Path, dtype: str) -> dict[str, Path]:
    """M, the base; A, B, C, fine-tuned from it; G, with more tokens, in another order; L, an adapter of M."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hubforge.lab.tiny import tiny_llama, tiny_lora

    models = {name: folder / name for name in "MABCGL"}
    if (models["L"] / "adapter_config.json").is_file():
        return models
    shutil.rmtree(folder, ignore_errors=True)
    for seed, name in enumerate("MABCG"):
        tiny_llama(models[name], num_hidden_layers=4, max_shard_size="5GB")
        file = models[name] / "model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        tuned = {}
        for key, tensor in load_file(file).items():
            tensor = tensor.float() + 0.01 * seed * torch.randn(tensor.shape, generator=generator)
            if dtype == "float32":  # The base too: bits that bfloat16 does not have.
                tensor += 1e-4 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 + seed))
            tuned[key] = tensor.to(getattr(torch, dtype))
        save_file(tuned, file, metadata={"format": "pt"})
        config = json.loads((models[name] / "config.json").read_text())
        (models[name] / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))
    tokenizer = AutoTokenizer.from_pretrained(models["G"])
    tokenizer.add_tokens(["<|think|>"], special_tokens=True)
    tokenizer.add_tokens(["zebra"])
    model = AutoModelForCausalLM.from_pretrained(models["G"], dtype=dtype)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(models["G"])
    tokenizer.save_pretrained(models["G"])
    swap_tokens(models["G"], 300, 310)
    tiny_lora(models["L"], models["M"], rank=4, seed=9)
    return models


def swap_tokens(folder: Path, one: int, other: int) -> None:
    """Give two tokens each other's id, and their rows each other's place."""
    from safetensors.torch import load_file, save_file

    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    names = {number: token for token, number in vocab.items()}
    vocab[names[one]], vocab[names[other]] = other, one
    path.write_text(json.dumps(data))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = tensors[name].clone()
        rows[[one, other]] = tensors[name][[other, one]]
        tensors[name] = rows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def written(value: Any, models: dict[str, Path], work: Path) -> Any:
    """A configuration over these models: a letter stands for one of them, `half-way` for a folder of its own."""
    if isinstance(value, dict):
        return {key: written(child, models, work) for key, child in value.items()}
    if isinstance(value, list):
        return [written(child, models, work) for child in value]
    if isinstance(value, str) and all(part in models for part in value.split("+")):
        return "+".join(str(models[part]) for part in value.split("+"))
    return str(work / "half-way") if value == "half-way" else value


def tensors_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def by_token(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings and heads in the order of the tokens' text, without padding."""
    from transformers import AutoTokenizer

    vocab = AutoTokenizer.from_pretrained(folder).get_vocab()
    order = [vocab[token] for token in sorted(vocab)]
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: tensor[order] if name in tables else tensor for name, tensor in tensors.items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> Difference:
    import torch

    largest, differing, total = 0.0, 0, 0
    for name in sorted(set(one) & set(other)):
        if one[name].shape != other[name].shape:
            return Difference(float("inf"), 1.0, 1)
        x, y = one[name].double(), other[name].double()
        larger = torch.maximum(x.abs(), y.abs())
        exponent = torch.frexp(larger.clamp(min=2.0**-126)).exponent - 1
        units = (x - y).abs() / torch.ldexp(torch.ones_like(x), exponent - 7).clamp(min=float(larger.max()) * 2**-21)
        largest = max(largest, float(units.max()))
        differing += int((units > 0).sum())
        total += units.numel()
    return Difference(largest, differing / total, len(set(one) ^ set(other)))


def changed(tensors: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """The share of elements that are not the base's."""
    return sum(int((tensors[n] != base[n]).sum()) for n in base) / sum(tensor.numel() for tensor in base.values())


def run_ours(config: Path, store: Path) -> Path:
    """The folder of the merge, by the command that users run."""
    from typer.testing import CliRunner

    from hubforge.cli import app

    command = ["--offline", "--quiet", "--store", str(store)]
    command += ["import", str(config), str(config.with_suffix(".yaml")), "--run", "--force"]
    done = CliRunner().invoke(app, command)
    if done.exit_code:
        raise SystemExit(f"{config}: {done.output} {done.exception!r}")
    return Path(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mergekit", required=True, help="Python of an environment with mergekit 0.1.5.")
    parser.add_argument("--only", nargs="*", help="Names of configurations.")
    given = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    out = given.out.resolve()
    cases = yaml.safe_load(CASES.read_text())
    cases = {name: case for name, case in cases.items() if not given.only or name in given.only}
    shutil.rmtree(out / "work", ignore_errors=True)
    for family, dtype in FAMILIES.items():
        models = make_family(out / family.split()[0], family.split()[0])
        work = out / "work" / slug(family)
        work.mkdir(parents=True)
        for name, case in cases.items():
            documents = case["configuration"]
            documents = [documents] if isinstance(documents, dict) else documents
            # What lies between is not rounded: ours computes it in the pass of what reads it.
            types = [dict(dtype) if document is documents[-1] else {"dtype": dtype["dtype"]} for document in documents]
            found = [written(each, models, work) | kind for each, kind in zip(documents, types, strict=True)]
            (work / f"{slug(name)}.yml").write_text(yaml.safe_dump_all(found, sort_keys=False))
        (work / "driver.py").write_text(DRIVER)
        with (work / "log").open("w") as log:
            subprocess.run([given.mergekit, work / "driver.py", work], stdout=log, stderr=log, check=True)
    print(f"{'':38}float32, rounded once   as written       theirs")
    print(f"{'configuration':38}{'units':>10}   {'differ':>8}   {'differ':>10}   {'differ':>10}   verdict")
    failed = False
    for name, case in cases.items():
        verdict, ok = compare(name, case, out)
        failed |= not ok
        print(f"{name:38}{verdict}", flush=True)
    raise SystemExit(failed)


def compare(name: str, case: dict[str, Any], out: Path) -> tuple[str, bool]:
    """One line of the table, and whether it is as it should be."""
    work = {family: out / "work" / slug(family) for family in FAMILIES}
    theirs = {family: folder / slug(name) for family, folder in work.items()}
    for folder in theirs.values():
        if (error := folder.with_suffix(".error")).exists():
            return f"mergekit fails: {error.read_text()[:90]}", True
    read = by_token if "token" in name else lambda folder, tensors: tensors
    ours = {
        family: run_ours(work[family] / f"{slug(name)}.yml", out / "work" / "store")
        for family in ("float32", "bfloat16")
    }
    mine = {family: read(folder, tensors_of(folder)) for family, folder in ours.items()}
    their = {family: read(folder, tensors_of(folder)) for family, folder in theirs.items()}
    once = difference(mine["float32"], their["float32"])
    as_written = difference(mine["bfloat16"], their["bfloat16"])
    own = difference(their["bfloat16"], their["bfloat16 in float32"])
    why = case.get("why")
    verdict = "the same bits" if once.share == 0 else "within one rounding"
    ok = once.units <= 1 and not once.only_in_one
    if not ok:
        verdict, ok = REASONS.get(why, "DIFFERS"), why is not None
    if why == "random":
        base = {name: tensor.bfloat16() for name, tensor in tensors_of(out / "float32" / "M").items()}
        verdict += f": {changed(mine['float32'], base):.3f} and {changed(their['float32'], base):.3f} of all changed"
    line = f"{once.units:10.3g}   {once.share:8.4%}   {as_written.share:10.2%}   {own.share:10.2%}   {verdict}"
    return line, ok


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name)


if __name__ == "__main__":
    main()
