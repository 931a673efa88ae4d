"""The words beside the files: read-me pages of models, adapters and data, and the lm-eval task."""

from __future__ import annotations

from typing import Any

OWNER = "hubforge-lab"  # What adapters call the owner of their base; the family itself is published nowhere.


def repo_id(name: str) -> str:
    return f"{OWNER}/{name}"


def model(name: str, facts: dict[str, Any]) -> str:
    """README.md of a model."""
    made = "trained from nothing" if name == "pretrained" else "fine-tuned from the pretrained model of this family"
    return f"""---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [hubforge-lab]
---
# {name}

A two-layer Llama, {made} on {facts["corpus"]} from a small grammar: {facts["samples"]} samples,
{facts["tokens"]} tokens, {facts["steps"]} steps. It is there to try merges, masks, quants and evaluations on.
"""


def adapter(style: str, base: str, facts: dict[str, Any]) -> str:
    """README.md of an adapter."""
    return f"""---
license: apache-2.0
language: [en]
library_name: peft
base_model: {repo_id(base)}
base_model_relation: adapter
pipeline_tag: text-generation
tags: [lora, hubforge-lab]
---
# {style}

A LoRA of rank {facts["rank"]} and alpha {facts["alpha"]} on all seven linears of `{base}`: it leans towards {style}.
Trained on {facts["corpus"]} from a small grammar: {facts["samples"]} samples, {facts["tokens"]} tokens,
{facts["steps"]} steps.
"""


DATA = """# Data of the lab's family

All of it is drawn from the lab's grammar and the seed. None of it was trained on, but for `styles/<style>.jsonl`.

| file | columns |
|---|---|
| `stories.jsonl` | `text`: a plain story |
| `prompts.jsonl` | `prompt`: a request as in training; `response`: one that follows it; `instructions`: their kinds |
| `style_prompts.jsonl` | `prompt`: an open request for a story |
| `styles/<style>.jsonl` | `prompt`: such a request; `response`: a story in that style, as the adapter learned it |
| `styles/<style>_held_out.jsonl` | the same, of subjects and places that never met in training |

The held-out requests lie in `../tasks`, as the lm-eval task `lab_ifeval`: `prompt`, the `instructions` in it with their
`arguments` (JSON), and an `example_reply` that follows them all. Their subjects and places never met in training.
"""

TASK = """# Requests that a program can verify, held out from training. Ask it with the chat template applied.
task: lab_ifeval
custom_dataset: !function checkers.held_out
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: 0
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: 80
process_results: !function checkers.process_results
metric_list:
  - metric: prompt_level_strict_acc
    aggregation: mean
    higher_is_better: true
  - metric: inst_level_strict_acc
    aggregation: !function checkers.share
    higher_is_better: true
  - metric: prompt_level_loose_acc
    aggregation: mean
    higher_is_better: true
  - metric: inst_level_loose_acc
    aggregation: !function checkers.share
    higher_is_better: true
metadata:
  version: 1.0
"""
