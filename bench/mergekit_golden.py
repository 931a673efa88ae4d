"""Write what mergekit 0.1.5 makes of small models by every method that draws nothing: tests/stages/mergekit.json.

usage: mergekit_golden.py JSON    (in a virtual environment of its own that has mergekit==0.1.5)

Models of one layer, float32 throughout; of their tensors one matrix and one vector are written down, of the inputs and
of every result, so that the test beside it needs no mergekit. The same for `chat_template`: what models with templates
in the files of today and of yesterday get by it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

KEPT = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
DRAWING = {"dare_linear", "dare_ties", "della", "della_linear"}
WEIGHTS = [1.0, 0.6, -0.3]
THREE = {"weight": WEIGHTS}
CASES = {
    "linear": {"per": {"weight": [0.5, 0.3, 0.4]}},
    "linear sum": {"per": {"weight": [0.5, 0.3, 0.4]}, "all": {"normalize": False}},
    "slerp": {"models": 2, "base": "a", "all": {"t": 0.3}},
    "nuslerp": {"models": 2, "per": {"weight": [0.7, 0.2]}},
    "nuslerp from base": {"models": 2, "base": "base", "per": {"weight": [0.7, 0.2]}},
    "nuslerp rows": {"models": 2, "per": {"weight": [0.7, 0.2]}, "all": {"nuslerp_flatten": False}},
    "nuslerp columns": {
        "models": 2,
        "per": {"weight": [0.7, 0.2]},
        "all": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"per": {"weight": [0.5, 0.3, 0.4]}},
    "multislerp from base": {"base": "base", "per": {"weight": [0.5, 0.3, 0.4]}},
    "karcher": {},
    "task_arithmetic": {"base": "base", "per": THREE, "all": {"lambda": 0.8}},
    "ties": {"base": "base", "per": THREE | {"density": [0.3, 0.5, 0.7]}},
    "ties sum": {
        "base": "base",
        "per": THREE | {"density": [0.3, 0.5, 0.7]},
        "all": {"normalize": False, "lambda": 0.7},
    },
    "ties rescaled": {
        "base": "base",
        "per": THREE | {"density": [0.3, 0.5, 1.0]},
        "all": {"normalize": True, "rescale": True},
    },
    "breadcrumbs rescaled": {
        "base": "base",
        "per": THREE | {"density": [0.5] * 3, "gamma": [0.1] * 3},
        "all": {"rescale": True},
    },
    "breadcrumbs": {"base": "base", "per": THREE | {"density": [0.5] * 3, "gamma": [0.1] * 3}},
    "breadcrumbs_ties": {"base": "base", "per": THREE | {"density": [0.5] * 3, "gamma": [0.1] * 3}},
    "model_stock": {"base": "base"},
    "model_stock rows": {"base": "base", "all": {"filter_wise": True}},
    "sce": {"base": "base", "all": {"select_topk": 0.4}},
    "nearswap": {"models": 1, "base": "base", "all": {"t": 0.05}},
    "arcee_fusion": {"models": 1, "base": "base"},
    "ram": {"base": "base"},
    "ramplus_tl": {"base": "base", "all": {"r": 0.3, "alpha": 0.5}},
    "passthrough": {"models": 1, "all": {"scale": 0.5}},
}

TEXT = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
OLD = [{"name": "default", "template": f"  {TEXT}\n"}, {"name": "tool_use", "template": "{{ tools }}"}]
# By model, the files that hold its template: of its own; the same text twice, with other space around it; none.
TEMPLATES = {
    "base": {"chat_template.jinja": "{{ messages[0]['content'] }}"},
    "a": {"chat_template.jinja": f"{TEXT}\n\n"},
    "b": {"tokenizer_config.json": OLD},
    "c": {},
}
ASKED = {
    "auto": {"models": ["base", "a", "b", "c"], "chat_template": "auto"},
    "auto of one": {"models": ["c", "a"], "chat_template": "auto"},
    "auto of none": {"models": ["c", "d"], "chat_template": "auto"},
    "text": {"models": ["b", "a"], "chat_template": "{{ bos_token }}{{ messages[-1]['content'] }}\n\n"},
}


def make(folder: Path) -> None:
    """A base and fine-tunes a, b, c of growing changes, each of which leaves part of the base as it was."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    base = load_file(folder / "base" / "model.safetensors")
    base = {name: torch.randn(tensor.shape, generator=generator) / 4 for name, tensor in base.items()}
    save_file(base, folder / "base" / "model.safetensors", {"format": "pt"})
    for name, size in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        LlamaForCausalLM(config).save_pretrained(folder / name)
        changed = {}
        for key, tensor in base.items():
            change = size * torch.randn(tensor.shape, generator=generator)
            changed[key] = tensor + change * (torch.rand(tensor.shape, generator=generator) < 0.7)
        save_file(changed, folder / name / "model.safetensors", {"format": "pt"})


def merged(folder: Path, method: str, case: dict[str, object]) -> dict[str, torch.Tensor]:
    names = ["a", "b", "c"][: case.get("models", 3)]
    per = case.get("per", {})
    models = [
        {"model": str(folder / name), "parameters": {key: values[i] for key, values in per.items()}}
        for i, name in enumerate(names)
    ]
    config = {"merge_method": method, "models": models, "dtype": "float32", "parameters": case.get("all", {})}
    if "base" in case:
        config["base_model"] = str(folder / case["base"])
    out = folder / "out"
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=False, quiet=True))
    return load_file(out / "model.safetensors")


def add_tokenizers(folder: Path) -> None:
    """A word of a vocabulary for each model, and its template where TEMPLATES has it. d is c once more."""
    shutil.copytree(folder / "c", folder / "d")
    for name in ("base", "a", "b", "c", "d"):
        Tokenizer(WordLevel({"<unk>": 0, "word": 1}, "<unk>")).save(str(folder / name / "tokenizer.json"))
        files = dict(TEMPLATES.get(name, {}))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<unk>"}
        config |= {"chat_template": held} if (held := files.pop("tokenizer_config.json", None)) else {}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
        for file, text in files.items():
            (folder / name / file).write_text(text)


def templated(folder: Path, case: dict[str, object]) -> str | None:
    """The template that Transformers finds in what mergekit wrote."""
    config = {
        "merge_method": "linear",
        "models": [{"model": str(folder / name), "parameters": {"weight": 1}} for name in case["models"]],
        "chat_template": case["chat_template"],
    }
    out = folder / "templated"
    shutil.rmtree(out, ignore_errors=True)
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return AutoTokenizer.from_pretrained(out).chat_template


def main() -> None:
    methods = {method.spec.name for method in registered_methods()}
    covered = {name.split()[0] for name in CASES} | DRAWING
    assert covered == methods, f"the registry has {sorted(methods)}, the cases {sorted(covered)}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder)

        def numbers(tensors: dict[str, torch.Tensor]) -> list[object]:
            return [tensors[name].tolist() for name in KEPT]

        inputs = {name: numbers(load_file(folder / name / "model.safetensors")) for name in ("base", "a", "b", "c")}
        found = {name: numbers(merged(folder, name.split()[0], case)) for name, case in CASES.items()}
        add_tokenizers(folder)
        templates = {name: case | {"found": templated(folder, case)} for name, case in ASKED.items()}
    written = {"mergekit": "0.1.5", "methods": sorted(methods), "tensors": KEPT, "inputs": inputs, "merged": found}
    written |= {"template_files": TEMPLATES, "templates": templates}
    Path(sys.argv[1]).write_text(json.dumps(written, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
