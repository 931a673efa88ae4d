"""A folder of small tasks, models as artifacts, and a GGUF where the converter is at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubforge.events import Event
from hubforge.op import Artifact, Context, FileDigest, Kind, Settings

SHARED = Path(__file__).parents[3] / "shared" / "data"

SCORER = '''
def documents(**_):
    from datasets import Dataset

    words = ["sea", "lantern", "café", "Mara", "harbour"]
    return {"test": Dataset.from_list([{"word": word, "choices": [" old", " calm", " old man"], "answer": i % 3}
                                       for i, word in enumerate(words)])}


def score(doc, results):
    """all: the reply has a vowel and a space; each: those two."""
    each = [any(letter in "aeiou" for letter in results[0]), " " in results[0]]
    return {"all": all(each), "each": each}


def share(items):
    return sum(map(sum, items)) / sum(map(len, items))
'''
TASKS = {
    "writes": """
task: writes
custom_dataset: !function scorer.documents
output_type: generate_until
test_split: test
doc_to_text: "Tell of the {{word}}."
doc_to_target: ""
process_results: !function scorer.score
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: all, aggregation: mean, higher_is_better: true}
  - {metric: each, aggregation: !function scorer.share, higher_is_better: true}
metadata: {version: 2}
""",
    "chooses": """
task: chooses
custom_dataset: !function scorer.documents
output_type: multiple_choice
test_split: test
doc_to_text: "The {{word}} was"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "all_of_it": """
group: all_of_it
task: [writes, chooses]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
""",
    "reads": """
task: reads
custom_dataset: !function scorer.documents
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "The {{word}} was calm, and the old man walked to the {{word}}."
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on five documents: one answer to write, one to choose, one text to read."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "scorer.py").write_text(SCORER, encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run_on(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]], list[Event]]]:
    """Run an eval op on the named inputs; its metrics, the lines of its samples, and its events."""

    def run(op: Any, **inputs: Path | Artifact) -> tuple[dict[str, Any], list[dict[str, Any]], list[Event]]:
        artifacts = {
            name: given if isinstance(given, Artifact) else artifact(name, given) for name, given in inputs.items()
        }
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        events: list[Event] = []
        settings = Settings(device="cpu", offline=True)
        found = op.run(Context("evals.test", out, artifacts, settings, op.seed, "recipes/x.yaml:7", events.append))
        lines = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        return json.loads(json.dumps(found, allow_nan=False)), lines, events

    return run


def artifact(name: str, path: Path, **more: Any) -> Artifact:
    """An input as the runner hands it over; what it is, by its files."""
    kind: Kind = "dataset"
    if path.suffix == ".gguf":
        kind = "gguf"
    elif (path / "config.json").is_file():
        kind = "model"
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = tuple(
        FileDigest(
            file.name if path.is_file() else file.relative_to(path).as_posix(),
            file.stat().st_size,
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in found
    )
    return Artifact(name, kind, f"key-{name}", path, files, **more)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama_256: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama_256` as an unquantized GGUF; skips where llama.cpp's converter has not been fetched."""
    from hubforge.llama_cpp.tree import find_tree
    from hubforge.quantize.gguf import Gguf

    if find_tree(None) is None:
        pytest.skip("llama.cpp's converter is not in the cache; `make demo` fetches it")
    pytest.importorskip("cyllama")
    out = tmp_path_factory.mktemp("gguf")
    op = Gguf(model="m", types=("F32",))  # type: ignore[arg-type]
    (step,) = op.expand("quants").values()
    step.run(Context("quantize.quants/F32", out, {"m": artifact("m", tiny_llama_256)}, Settings(device="cpu")))
    (path,) = out.glob("*.gguf")
    return path
