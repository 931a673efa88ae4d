"""From what lm-eval returns to what is kept: metrics, a line per document, and results without this machine in them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hubforge.evals._compare import weighted_mean

# metric -> (unit, what it means). By lm-eval's names.
_BARE = "forgiving a first or last line and Markdown asterisks around the answer."
MEANINGS: dict[str, tuple[str, str]] = {
    "prompt_level_strict_acc": (
        "share",
        "Share of prompts whose reply follows every instruction in it, as a program checks.",
    ),
    "inst_level_strict_acc": ("share", "Share of all instructions that were followed, as a program checks."),
    "prompt_level_loose_acc": ("share", f"As prompt_level_strict_acc, {_BARE}"),
    "inst_level_loose_acc": ("share", f"As inst_level_strict_acc, {_BARE}"),
    "acc": ("share", "Share of questions for which the right answer is the likeliest of those offered."),
    "acc_norm": ("share", "As acc, with each answer's log-likelihood divided by its length in bytes."),
    "exact_match": ("share", "Share of answers that equal the reference."),
    "f1": ("share", "F1 of the answers against the references."),
    "word_perplexity": ("", "Perplexity per word: how surprised the model is by the text."),
    "byte_perplexity": ("", "Perplexity per byte: how surprised the model is by the text."),
    "bits_per_byte": ("bits per byte", "Bits the model needs for a byte of the text."),
    "perplexity": ("", "Perplexity: how surprised the model is by the right continuation."),
}
IFEVAL = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")


def metric_name(task: str, metric: str, filter_: str, several: bool) -> str:
    """ "prompt_level_strict_acc"; "gsm8k/exact_match,strict-match" with several tasks and a filter of a name."""
    name = metric if filter_ in ("none", "") else f"{metric},{filter_}"
    return f"{task}/{name}" if several else name


def sample_lines(results: Mapping[str, Any], several: bool) -> list[dict[str, Any]]:
    """One line per document: what was asked, what came, and the value (and weight) of each metric on it."""
    lines = []
    for task, samples in sorted(results["samples"].items()):
        is_text = results["configs"][task].get("output_type") == "generate_until"
        by_document: dict[Any, dict[str, Any]] = {}
        for sample in samples:
            line = by_document.setdefault(sample["doc_id"], _line(task, sample, is_text))
            for metric in sample["metrics"]:
                if (point := _point(metric, sample[metric])) is None:
                    continue
                name = metric_name(task, metric, sample["filter"], several)
                line["metrics"][name], weight = point
                if weight != 1:
                    line.setdefault("weights", {})[name] = weight
        lines += [by_document[number] for number in sorted(by_document)]
    return lines


def _line(task: str, sample: Mapping[str, Any], is_text: bool) -> dict[str, Any]:
    line = {"task": task, "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"]}
    if is_text:
        prompt = sample["arguments"][0][0]
        return line | {"prompt": prompt, "response": sample["resps"][0][0], "metrics": {}}
    return line | {"prompt_hash": sample["prompt_hash"], "response": _plain(sample["resps"]), "metrics": {}}


def _point(metric: str, value: Any) -> tuple[float, float] | None:
    """A document's value and weight, such that the metric may be their weighted mean; None where it is no number."""
    if hasattr(value, "item"):  # a number of NumPy's
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return (float(value), 1.0) if math.isfinite(value) else None
    if isinstance(value, list) and value and all(isinstance(item, bool) for item in value):
        return sum(value) / len(value), float(len(value))  # IFEval's instructions
    if metric == "bits_per_byte" and isinstance(value, tuple) and len(value) == 2 and value[1]:
        return -value[0] / (value[1] * math.log(2)), float(value[1])
    return None


def metric_table(results: Mapping[str, Any], lines: list[dict[str, Any]], several: bool) -> dict[str, dict[str, Any]]:
    """The metrics by name, in the shape of the manifest. A metric that is no mean over documents has no error.

    Values in `lines` that do not add up to lm-eval's own number are taken out of them: nothing may be compared by
    what does not make up the metric.
    """
    table: dict[str, dict[str, Any]] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            name = metric_name(task, metric, filter_, several)
            points = [
                (line["metrics"][name], line.get("weights", {}).get(name, 1.0))
                for line in lines
                if name in line["metrics"]
            ]
            stderr = None
            if points:
                mean, stderr = weighted_mean([point for point, _ in points], [weight for _, weight in points])
                if not math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
                    stderr = None
                    for line in lines:
                        line["metrics"].pop(name, None)
                        line.get("weights", {}).pop(name, None)
            unit, meaning = MEANINGS.get(metric, ("", ""))
            table[name] = {
                "value": float(value),
                "stderr": stderr,
                "n": len(points) or int(values.get("sample_len", 0)),
                "samples": int(results["configs"].get(task, {}).get("repeats", 1)),
                "unit": unit,
                "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                "meaning": meaning or f"{metric} of lm-eval's task {task}.",
                "task": task,
            }
    return table


def task_conditions(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of each task: version, digest of its definition, digest of the documents asked, and how they were asked."""
    conditions = {}
    for task, config in sorted(results["configs"].items()):
        cleaned = clean_config(config)
        hashes = [sample["doc_hash"] for sample in results["samples"][task]]
        conditions[task] = {
            "version": results["versions"].get(task),
            "config_sha256": _sha256(json.dumps(cleaned, sort_keys=True)),
            "documents_sha256": _sha256("\n".join(dict.fromkeys(hashes))),
            "documents": results["n-samples"][task]["effective"],
            "of": results["n-samples"][task]["original"],
            "num_fewshot": results["n-shot"].get(task),
            "generation_kwargs": cleaned.get("generation_kwargs"),
        }
    return conditions


def clean_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results for these tasks, without samples, dates and the paths of this machine."""
    kept = {
        key: _plain(results[key])
        for key in ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
        if results.get(key)
    }
    return kept | {"configs": {task: clean_config(config) for task, config in sorted(results["configs"].items())}}


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A task's definition, the code of its functions included, without where it lay."""
    left_out = ("metadata", "custom_dataset", "dataset_kwargs")
    cleaned = {key: _plain(value) for key, value in config.items() if key not in left_out}
    version = (config.get("metadata") or {}).get("version")
    return cleaned | ({} if version is None else {"version": version})


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)


def _plain(value: Any) -> Any:
    """The value in JSON; a function by its name, never by its address."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, set):
        return sorted(map(str, value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):  # a number of NumPy's
        return _plain(value.item())
    return getattr(value, "__qualname__", type(value).__qualname__)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
