"""The good input that attacks start from: two tiny models, an adapter, masks, datasets, a GGUF, a recipe, a release."""

from __future__ import annotations

import json
from pathlib import Path

RECIPE = """\
name: toy
license: mit
sources:
  base:  {model: ./base, license: mit}
  tuned: {model: ./tuned}
  style: {adapter: ./style}
  importance: {mask: ./importance}
  core: {mask: ./core}
stages:
  blend:  {op: linear, models: [base, tuned], weights: [0.5, 0.5]}
  styled:
    op: apply
    model: blend
    adapters: [style]
    scale: 0.3
    importance: importance   # damped
  kept:   {op: apply, model: base, adapters: [style], protect: core}
  healed: {op: slerp, model: styled, to: kept, t: 0.3}
card:
  title: Toy
  summary: >-
    A model of nothing.
  limitations: ["It does nothing."]
publish:
  weights: {op: hub, repo: me/toy, model: healed}
"""

MERGEKIT = """\
models:
  - model: ./base
  - model: ./tuned
    parameters:
      density: [0.2, 0.5]
      weight:
        - filter: mlp
          value: 0.5
        - value: 1.0
merge_method: dare_ties
base_model: ./base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer_source: union
"""

CARD = """\
---
license: mit
base_model: [me/base]
tags: [merge, "a b"]
model-index:
- name: toy
  results:
  - task: {type: text-generation}
    metrics: [{type: acc, value: 0.5}]
---
# Toy

Some *text* with a [link](https://example.com), `code`, and ![a picture](assets/x.svg).

| a | b |
|---|---|
| 1 | <b>2</b> |

```python
print("x")
```

<details><summary>More</summary>

> quoted

</details>
"""

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{f"model.layers.{n}.mlp.up_proj.weight": (12, 8) for n in range(2)},
    **{f"model.layers.{n}.mlp.down_proj.weight": (8, 12) for n in range(2)},
    "model.norm.weight": (8,),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16,
    "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 10000.0},
}  # fmt: skip


def build(root: Path) -> Path:
    """Write it all below a folder, which is returned. A few kB."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)

    def model(name: str) -> None:
        folder = root / name
        folder.mkdir(parents=True)
        tensors = {key: torch.randn(shape, generator=random).bfloat16() for key, shape in SHAPES.items()}
        if name == "tuned":
            names = list(tensors)
            files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
            for file, held in files.items():
                save_file({key: tensors[key] for key in held}, folder / file, {"format": "pt"})
            index = {"metadata": {"total_size": 1}, "weight_map": {key: f for f, held in files.items() for key in held}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
        vocab = {f"t{n}": n for n in range(16)}
        tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab}}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    model("base")
    model("tuned")
    modules = {name.removesuffix(".weight"): shape for name, shape in SHAPES.items() if "_proj" in name}
    factors = {}
    for name, (out, into) in modules.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, into, generator=random)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 2, generator=random)
    (root / "style").mkdir()
    save_file(factors, root / "style" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["up_proj", "down_proj"],
               "base_model_name_or_path": "me/base", "rank_pattern": {}, "use_rslora": False}  # fmt: skip
    (root / "style" / "adapter_config.json").write_text(json.dumps(adapter))

    (root / "importance").mkdir()
    fisher = {name + ".weight": torch.rand(shape, generator=random).bfloat16() for name, shape in modules.items()}
    save_file(fisher, root / "importance" / "fisher.safetensors")
    layers = {str(n): {"sum": 1.0 + n, "mean": 0.5, "count": 192} for n in range(2)}
    (root / "importance" / "layer_importance.json").write_text(json.dumps({"layers": layers}))

    (root / "core").mkdir()
    spanned = {}
    for name, (out, into) in modules.items():
        u, s, v = torch.linalg.svd(torch.randn(out, into, generator=random), full_matrices=False)
        for part, value in (("U", u[:, :2]), ("S", s[:2]), ("V", v[:2].T)):
            spanned[f"{name}.weight.{part}"] = value.contiguous()
    save_file(spanned, root / "core" / "subspace.safetensors")
    (root / "core" / "subspace.json").write_text(json.dumps({"unchanged": []}))
    (root / "recipe.yaml").write_text(RECIPE)
    return root
