"""Merge small models by mergekit and by `hubforge import`, configuration by configuration, and compare every element.

usage: mergekit_examples.py OUT --mergekit PYTHON [--only NAME ...]

PYTHON is the interpreter of an environment with mergekit 0.1.5. Makes a family of small Llamas in OUT: a base, three
fine-tunes, one of them also with another vocabulary, an adapter. The configurations ask what mergekit's example files
ask (linear, ties by module and layer, slerp by gradients, stacked layers, a model cut short, two documents, ...), and
what its other methods and tokenizer settings do.

mergekit runs each twice: as written, where it computes in the models' bfloat16, and in float32 with `out_dtype`
bfloat16. Ours always computes in float32 and rounds once. A unit is one rounding: the distance of neighbouring bfloat16
numbers at the larger of the two. Exit code 1 when a configuration without a stated reason is off by more than one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
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
    "slerp": "they go straight where the cosine exceeds 0.9995, ours along the arc",
    "between": "the model between is rounded, and a last place there is more where it is trimmed",
    "adapter": "they add the adapter in bfloat16, ours in float32",
}


@dataclass(frozen=True)
class Difference:
    """Between two outputs: the largest in units of rounding, the share of elements that differ, tensors in one only."""

    units: float
    share: float
    only_in_one: int


def make_family(folder: Path) -> dict[str, Path]:
    """M, the base; A, B, C, fine-tuned from it; G, with more tokens, in another order; L, an adapter of M."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hubforge.lab.tiny import tiny_llama, tiny_lora

    models = {name: folder / name for name in "MABCGL"}
    if (models["L"] / "adapter_config.json").is_file():
        return models
    shutil.rmtree(folder, ignore_errors=True)
    for name in "MABCG":
        tiny_llama(models[name], num_hidden_layers=4, max_shard_size="5GB")
    for seed, name in enumerate("ABCG", 1):
        file = models[name] / "model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        tuned = {
            key: (tensor.float() + 0.01 * seed * torch.randn(tensor.shape, generator=generator)).bfloat16()
            for key, tensor in load_file(file).items()
        }
        save_file(tuned, file, metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(models["G"])
    tokenizer.add_tokens(["<|think|>"], special_tokens=True)
    tokenizer.add_tokens(["zebra"])
    model = AutoModelForCausalLM.from_pretrained(models["G"], dtype=torch.bfloat16)
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
        exponent = torch.frexp(torch.maximum(x.abs(), y.abs()).clamp(min=2.0**-126)).exponent - 1
        units = (x - y).abs() / torch.ldexp(torch.ones_like(x), exponent - 7)
        largest = max(largest, float(units.max()))
        differing += int((units > 0).sum())
        total += units.numel()
    return Difference(largest, differing / total, len(set(one) ^ set(other)))


def changed(tensors: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """The share of elements that are not the base's."""
    return sum(int((tensors[n] != base[n]).sum()) for n in base) / sum(tensor.numel() for tensor in base.values())


def run_ours(config: Path, store: Path) -> Path:
    """The folder of the merge, by the command that users run."""
    command = [str(Path(sys.executable).with_name("hubforge")), "--offline", "--quiet", "--store", str(store)]
    command += ["import", str(config), str(config.with_suffix(".yaml")), "--run", "--force"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{config}: {done.stderr}")
    return Path(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mergekit", required=True, help="Python of an environment with mergekit 0.1.5.")
    parser.add_argument("--only", nargs="*", help="Names of configurations.")
    given = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    out = given.out.resolve()
    models = make_family(out / "models")
    cases = yaml.safe_load(CASES.read_text())
    cases = {name: case for name, case in cases.items() if not given.only or name in given.only}
    dtypes = {"plain": {"dtype": "bfloat16"}, "float32": {"dtype": "float32", "out_dtype": "bfloat16"}}
    shutil.rmtree(out / "work", ignore_errors=True)
    for variant, dtype in dtypes.items():
        work = out / "work" / variant
        work.mkdir(parents=True)
        for name, case in cases.items():
            documents = case["configuration"]
            documents = [documents] if isinstance(documents, dict) else documents
            found = [written(document, models, work) | dtype for document in documents]
            (work / f"{slug(name)}.yml").write_text(yaml.safe_dump_all(found, sort_keys=False))
        (work / "driver.py").write_text(DRIVER)
        with (work / "log").open("w") as log:
            subprocess.run([given.mergekit, work / "driver.py", work], stdout=log, stderr=log, check=True)
    print(f"{'':38}float32, rounded once    as written   theirs twice")
    print(f"{'configuration':34}  {'units':>10} {'differ':>9}   {'differ':>10}   {'differ':>10}   verdict")
    base = tensors_of(models["M"])
    failed = False
    for name, case in cases.items():
        ours = run_ours(out / "work" / "plain" / f"{slug(name)}.yml", out / "work" / "store")
        theirs = {variant: out / "work" / variant / slug(name) for variant in dtypes}
        if (error := theirs["float32"].with_suffix(".error")).exists():
            print(f"{name:34}  mergekit fails: {error.read_text()[:90]}")
            continue
        read = by_token if "token" in name else lambda folder, tensors: tensors
        mine, exact, plain = (read(path, tensors_of(path)) for path in (ours, theirs["float32"], theirs["plain"]))
        once, twice, own = difference(mine, exact), difference(mine, plain), difference(plain, exact)
        verdict = "the same bits" if once.units == 0 else "within one rounding"
        if once.units > 1 or once.only_in_one:
            failed |= "why" not in case
            verdict = REASONS.get(case.get("why"), "DIFFERS")
        if case.get("why") == "random":
            verdict += f": {changed(mine, base):.3f} and {changed(exact, base):.3f} of all elements changed"
        print(f"{name:34}  {once.units:10.3g} {once.share:9.4%}   {twice.share:10.2%}   {own.share:10.2%}   {verdict}")
    raise SystemExit(failed)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name)


if __name__ == "__main__":
    main()
