"""What the rich release of the card tests is built of. Every number is made up; digests are digests of names."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from hubforge.release import File, MetricRecord, SourceRecord, StepRecord

RECIPE = """\
# yaml-language-server: $schema=schema.json
name: lighthouse
license: gemma
sources:
  pretrained: {model: google/gemma-4-E4B-pt}
  instruct: {model: google/gemma-4-E4B-it}
  prose: {adapter: me/prose-r64, revision: v2}
  dialogue: {adapter: ./out/dialogue-r16}
  chats: {dataset: me/chats, split: train}
  prompts: {dataset: google/IFEval, split: train}
masks:
  importance: {op: fisher, model: instruct, data: prompts, samples: 200, max_length: 256}
  core: {op: subspace, instruct: instruct, pretrained: pretrained, rank: 256}
adapters:
  chat: {op: lora, model: pretrained, data: chats, protect: core, rank: 16, alpha: 32}
stages:
  styled: {op: apply, model: instruct, adapters: [prose, dialogue], scale: 0.3, importance: importance}
  tuned: {op: apply, model: instruct, adapters: [chat]}
  healed: {op: slerp, model: styled, to: tuned, t: 0.3}
"""
MACHINE = {"cpu": "Test CPU", "cores": 2, "memory": 24 * 10**9, "gpus": [], "platform": "Linux x86_64"}
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
GIT = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "remote": "https://github.com/me/recipes.git",
}


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def file(path: str, size: int) -> File:
    return File(path=path, size=size, sha256=digest(path))


def step(name: str, op: str, makes: Any, minute: int, **more: Any) -> StepRecord:
    section, entry = name.split(".", 1)
    values: dict[str, Any] = {
        "key": digest(name),
        "versions": VERSIONS,
        "hardware": MACHINE,
        "started": f"2026-11-20T10:{minute:02d}:00+00:00",
        "seconds": 12.5 * (minute + 1),
        "git": GIT,
    }
    return StepRecord(name=name, section=section, entry=entry, op=op, makes=makes, **(values | more))


def _layers(count: int = 42) -> list[dict[str, float]]:
    sums = [
        1.0 + 4.0 * math.exp(-(((index - 9) / 7) ** 2)) + (2.5 if index >= count - 2 else 0) for index in range(count)
    ]
    return [{"layer": index, "sum": total, "mean": total / 1e6} for index, total in enumerate(sums)]


def _energies(count: int = 42) -> list[dict[str, Any]]:
    means = [0.72 + 0.2 * math.cos(index / count * 1.4) for index in range(count)]
    return [{"layer": i, "energy_captured": {"mean": m, "min": m - 0.08, "max": m + 0.05}} for i, m in enumerate(means)]


def sources() -> tuple[SourceRecord, ...]:
    architecture = {"architecture": "Gemma4ForCausalLM", "parameters": 7_996_156_490, "dtype": "bfloat16"}
    return (
        SourceRecord(
            name="pretrained",
            kind="model",
            repo="google/gemma-4-E4B-pt",
            commit="a" * 40,
            license="gemma",
            files=(file("model-00001-of-00002.safetensors", 9_000_000_000),),
            facts=architecture,
        ),
        SourceRecord(
            name="instruct",
            kind="model",
            repo="google/gemma-4-E4B-it",
            commit="b" * 40,
            license="gemma",
            files=(file("model.safetensors", 15_900_000_000), file("chat_template.jinja", 4000)),
            facts=architecture,
        ),
        SourceRecord(
            name="prose",
            kind="adapter",
            repo="me/prose-r64",
            revision="v2",
            commit="c" * 40,
            license="apache-2.0",
            files=(file("adapter_model.safetensors", 310_000_000),),
            facts={
                "rank": 64,
                "alpha": 128,
                "base_model": "google/gemma-4-E4B-it",
                "training": {
                    "corpus": "Gutenberg | 19th-century novels",
                    "samples": 12500,
                    "tokens": 41_000_000,
                    "recipe": "https://github.com/me/recipes/blob/main/prose.yaml",
                },
            },
        ),
        SourceRecord(
            name="dialogue",
            kind="adapter",
            path="./out/dialogue-r16",
            key=digest("dialogue"),
            files=(file("adapter_model.safetensors", 78_000_000),),
            facts={
                "rank": 16,
                "alpha": 16,
                "base_model": "google/gemma-4-E4B-pt",
                "use_rslora": True,
                "training": {"dataset": "plays", "samples": 3000},
            },
        ),
        SourceRecord(
            name="chats", kind="dataset", repo="me/chats", commit="d" * 40, license="cc-by-4.0", split="train"
        ),
        SourceRecord(
            name="prompts", kind="dataset", repo="google/IFEval", commit="e" * 40, license="apache-2.0", split="train"
        ),
    )


def mask_steps() -> tuple[StepRecord, ...]:
    return (
        step(
            "masks.importance",
            "fisher",
            "mask",
            0,
            summary="The diagonal Fisher information of a model on a set of prompts",
            formula="F = mean over prompts of (∂ loss / ∂ W)²",
            method_source="Kirkpatrick et al. 2017, arXiv:1612.00796",
            fields={"model": "instruct", "data": "prompts", "samples": 200, "max_length": 256, "layers": None},
            meanings={"samples": "How many prompts are taken", "max_length": "Tokens per prompt; longer ones are cut"},
            inputs={"instruct": "sources.instruct", "prompts": "sources.prompts"},
            metrics={"samples": 200, "truncated": 3, "tokens": 18234, "reliability": 0.941, "layers": _layers()},
            files=(file("importance.safetensors", 7_780_000_000), file("layer_importance.json", 5200)),
        ),
        step(
            "masks.core",
            "subspace",
            "mask",
            1,
            summary="The directions in which instruction tuning changed each matrix",
            formula="W_instruct − W_pretrained ≈ U·diag(S)·Vᵀ",
            fields={"instruct": "instruct", "pretrained": "pretrained", "rank": 256},
            meanings={"rank": "Directions kept per matrix"},
            inputs={"instruct": "sources.instruct", "pretrained": "sources.pretrained"},
            metrics={
                "rank": 256,
                "matrices": 258,
                "energy_captured": {"mean": 0.871, "min": 0.712, "max": 0.983},
                "layers": _energies(),
            },
            files=(file("core.safetensors", 2_230_000_000),),
        ),
        step(
            "masks.gate",
            "combine",
            "mask",
            2,
            summary="A gate: the importance in [0, 1] of each weight, made of one or more masks",
            formula="gate = Π Fᵢ",
            fields={"masks": ["importance"], "how": "product", "normalize": "rank", "scope": "tensor"},
            meanings={"how": "product: important in all of them"},
            inputs={"importance": "masks.importance"},
            metrics={
                "tensors": 258,
                "gate": {"mean": 0.5, "open": 0.05, "shut": 0.05},
                "histogram": [5] * 20,
                "layers": [{"layer": layer, "gate": 0.5 + 0.004 * layer} for layer in range(42)],
            },
            files=(file("gate.safetensors", 7_780_000_000), file("gate.json", 4100)),
        ),
    )


def steps() -> tuple[StepRecord, ...]:
    shards = (
        file("model-00001-of-00002.safetensors", 9_990_000_000),
        file("model-00002-of-00002.safetensors", 5_910_000_000),
        file("config.json", 3100),
        file("tokenizer.json", 33_400_000),
        file("chat_template.jinja", 4000),
    )
    apply = {
        "summary": "Folds adapters into a model, damped where it matters most",
        "formula": "W + s·(1 − F)·(1 − F_layer)·Δ",
        "meanings": {
            "scale": "Share of the adapters' delta that is added",
            "importance": "A mask; weights it marks move less",
        },
    }
    stages = (
        step(
            "adapters.chat",
            "lora",
            "adapter",
            2,
            summary="Trains a LoRA adapter under a mask",
            method_source="Hu et al. 2021, arXiv:2106.09685",
            exact=False,
            fields={"model": "pretrained", "data": "chats", "protect": "core", "rank": 16, "alpha": 32},
            inputs={"pretrained": "sources.pretrained", "chats": "sources.chats", "core": "masks.core"},
            metrics={
                "modules": 258,
                "samples": 2000,
                "held_out": 100,
                "tokens": 1_240_000,
                "steps": 250,
                "loss": 1.2345,
                "curve": [[step, 1.2 + 1.3 * 0.97**step + 0.02 * (step % 3)] for step in range(2, 251, 2)],
                "eval_loss": 1.281,
                "eval_curve": [[50, 1.52], [100, 1.33], [150, 1.281], [200, 1.284], [250, 1.287]],
                "best_step": 150,
                "leak": {
                    "projection": "two_sided",
                    "strength": 1.0,
                    "worst": 7.4e-8,
                    "worst_matrix": "model.layers.3.mlp.up_proj",
                    "worst_left": 7.4e-8,
                    "worst_right": 6.2e-8,
                    "mean_left": 4.6e-8,
                    "mean_right": 4.4e-8,
                    "matrices": 258,
                },
            },
            files=(file("adapter_model.safetensors", 40_000_000),),
        ),
        step(
            "stages.styled",
            "apply",
            "model",
            3,
            **apply,
            fields={"model": "instruct", "adapters": ["prose", "dialogue"], "scale": 0.3, "importance": "importance"},
            inputs={
                "instruct": "sources.instruct",
                "prose": "sources.prose",
                "dialogue": "sources.dialogue",
                "importance": "masks.importance",
            },
            metrics={
                "parameters": 7_463_000_000,
                "dtype": "bfloat16",
                "gain": {"tensors": 258, "unchanged": 0, "median": 0.982, "min": 0.914, "max": 1.0},
            },
        ),
        step(
            "stages.tuned",
            "apply",
            "model",
            4,
            **apply,
            fields={"model": "instruct", "adapters": ["chat"], "scale": 1.0, "importance": None},
            inputs={"instruct": "sources.instruct", "chat": "adapters.chat"},
            metrics={"parameters": 7_463_000_000, "tensors": 2130, "changed": 258},
            fused_into=("stages.healed",),  # `styled` is measured, and so has files.
            seconds=0.0,
        ),
        step(
            "stages.healed",
            "slerp",
            "model",
            5,
            summary="Interpolates two models along the arc between them",
            formula="sin((1−t)·Ω)/sin Ω · W₀ + sin(t·Ω)/sin Ω · W₁",
            method_source="Shoemake 1985; mergekit, merge_methods/slerp.py",
            fields={"model": "styled", "to": "tuned", "t": 0.3},
            meanings={"model": "The model at t = 0", "to": "The model at t = 1", "t": "How far to go, from 0 to 1"},
            inputs={"styled": "stages.styled", "tuned": "stages.tuned"},
            metrics={"parameters": 7_463_000_000, "dtype": "bfloat16", "bytes": 15_900_000_000},
            files=shards,
        ),
    )
    quants = tuple(
        step(
            f"quantize.gguf/{name}",
            "gguf",
            "gguf",
            6 + index,
            summary="The model as a GGUF file for llama.cpp",
            fields={"model": "healed", "types": [name]},
            inputs={"healed": "stages.healed"},
            metrics={
                "type": name,
                "bytes": size,
                "bits_per_weight": bits,
                "kl_mean": kl,
                "kl_p99": kl * 9,
                "top1": top,
            },
            files=(file(f"lighthouse-{name}.gguf", size),),
        )
        for index, (name, size, bits, kl, top) in enumerate(
            [
                ("BF16", 14_900_000_000, 16.0, 0.00002, 0.9991),
                ("Q8_0", 7_930_000_000, 8.5, 0.0007, 0.9932),
                ("Q6_K", 6_120_000_000, 6.56, 0.0031, 0.981),
                ("Q4_K_M", 4_540_000_000, 4.87, 0.0263, 0.943),
            ]
        )
    )
    evals = tuple(
        step(
            f"evals.{name}/{on}",
            op,
            "metrics",
            20 + index,
            summary=summary,
            fields={"on": [on], "baseline": "instruct", **fields},
            inputs={on: full, "instruct": "sources.instruct"},
            metrics={
                "conditions": {
                    "weights": {"model.safetensors": digest("weights")},
                    "weights_sha256": digest("all weights"),
                    "chat_template": True,
                    "limit": None,
                    "tasks": {name: {"version": 4, "documents_sha256": digest(name), "num_fewshot": 0}},
                }
            },
        )
        for index, (name, on, full, op, summary, fields) in enumerate(
            [
                (
                    "ifeval",
                    "healed",
                    "stages.healed",
                    "lm_eval",
                    "Any lm-eval task",
                    {"tasks": ["ifeval"], "num_fewshot": 0},
                ),
                (
                    "style",
                    "healed",
                    "stages.healed",
                    "style",
                    "How the prose reads",
                    {"prompts": 10, "samples": 4, "temperature": 1.0},
                ),
            ]
        )
    )
    return mask_steps() + stages + quants + evals


def metrics() -> tuple[MetricRecord, ...]:
    strict = {
        "eval": "ifeval",
        "metric": "prompt_level_strict_acc",
        "n": 541,
        "higher_is_better": True,
        "meaning": "Share of prompts whose instructions were all followed",
        "method": "paired t over prompts",
    }
    loose = strict | {
        "metric": "inst_level_loose_acc",
        "meaning": "Share of single instructions followed, loosely read",
    }
    against = {"baseline": "instruct"}
    style: dict[str, Any] = {"eval": "style", "n": 10, "samples": 4, "method": "paired t over prompts"} | against
    slop = style | {
        "metric": "slop",
        "unit": "per 1000 tokens",
        "higher_is_better": False,
        "meaning": "Stock phrases that language models overuse",
    }
    rep = style | {
        "metric": "rep3g",
        "unit": "per 1000 tokens",
        "higher_is_better": False,
        "meaning": "Repeated 3-grams",
    }
    return (
        MetricRecord(
            on="healed",
            value=0.8133,
            low=0.779,
            high=0.8436,
            **strict,
            **against,
            baseline_value=0.8244,
            difference=-0.0111,
            difference_low=-0.0318,
            difference_high=0.0096,
            significant=False,
        ),
        MetricRecord(
            on="healed",
            value=0.8815,
            low=0.8591,
            high=0.901,
            **loose,
            **against,
            baseline_value=0.8802,
            difference=0.0013,
            difference_low=-0.0141,
            difference_high=0.0167,
            significant=False,
        ),
        MetricRecord(on="instruct", value=0.8244, low=0.7908, high=0.8537, **strict),
        MetricRecord(on="instruct", value=0.8802, low=0.8577, high=0.8998, **loose),
        MetricRecord(
            on="styled",
            value=0.7042,
            low=0.6644,
            high=0.7412,
            **strict,
            **against,
            baseline_value=0.8244,
            difference=-0.1202,
            difference_low=-0.153,
            difference_high=-0.087,
            significant=True,
        ),
        MetricRecord(
            on="gguf/Q6_K",
            value=0.8096,
            low=0.7749,
            high=0.8401,
            **strict,
            **against,
            baseline_value=0.8244,
            difference=-0.0148,
            difference_low=-0.0371,
            difference_high=0.0075,
            significant=False,
        ),
        MetricRecord(
            on="healed",
            value=2.41,
            low=1.6,
            high=3.22,
            **slop,
            baseline_value=6.13,
            difference=-3.72,
            difference_low=-4.9,
            difference_high=-2.54,
            significant=True,
        ),
        MetricRecord(
            on="healed",
            value=11.9,
            low=8.1,
            high=15.7,
            **rep,
            baseline_value=7.4,
            difference=4.5,
            difference_low=0.3,
            difference_high=8.7,
            significant=True,
        ),
        MetricRecord(
            on="healed",
            value=512.0,
            low=455.0,
            high=569.0,
            **style,
            metric="word_count",
            unit="words",
            baseline_value=430.0,
            difference=82.0,
            difference_low=31.0,
            difference_high=133.0,
            significant=True,
            meaning="Length of an answer",
        ),
    )


def pushed(made: str, all_steps: tuple[StepRecord, ...], folder: str = "") -> tuple[File, ...]:
    prefix = f"{folder}/" if folder else ""
    return tuple(
        one.model_copy(update={"path": prefix + one.path})
        for s in all_steps
        if s.name.startswith(made)
        for one in s.files
    )
