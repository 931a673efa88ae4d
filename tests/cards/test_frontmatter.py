"""The YAML at the top is what huggingface_hub reads, writes and finds valid."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hubforge.cards import render
from hubforge.cards.frontmatter import front_matter
from hubforge.cards.lineage import Lineage, find_target
from hubforge.release import CardText, Release, SourceRecord, StepRecord, TargetRecord


def data(release: Release, target: str) -> dict[str, Any]:
    return front_matter(Lineage(release, find_target(release, target)))


def release_of(steps: tuple[StepRecord, ...], sources: tuple[SourceRecord, ...], kind: Any, made: str) -> Release:
    target = TargetRecord(name="out", kind=kind, repo="me/out", entries=(made,))
    return Release(
        hubforge="0", name="x", recipe_file="x.yaml", recipe="", steps=steps, sources=sources, targets=(target,)
    )


BASE = SourceRecord(name="base", kind="model", repo="big/base")
ADAPTER = SourceRecord(name="style", kind="adapter", repo="me/style", facts={"base_model": "big/base"})


@pytest.mark.parametrize("target", ["weights", "quants", "masks", "adapter"])
def test_the_hubs_own_client_reads_it_and_writes_the_same(target: str, rich_release: Release) -> None:
    page = render(rich_release, target)["README.md"].decode()
    card = ModelCard(page, ignore_metadata_errors=False)
    assert isinstance(card.data, ModelCardData)
    expected = data(rich_release, target)
    assert yaml.safe_load(card.data.to_yaml()) == expected


def test_the_model_page(rich_release: Release) -> None:
    found = data(rich_release, "weights")
    assert found["license"] == "gemma"
    assert found["base_model"] == ["google/gemma-4-E4B-it", "me/prose-r64"]
    assert found["base_model_relation"] == "merge"
    assert found["library_name"] == "transformers"
    assert found["datasets"] == ["me/chats", "google/IFEval"]
    assert found["tags"][:2] == ["hubforge", "merge"]


def test_results_survive_the_hubs_round_trip(rich_release: Release) -> None:
    card = ModelCard(render(rich_release, "weights")["README.md"].decode())
    results = card.data.eval_results
    assert results is not None
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in results] == [
        ("ifeval", "prompt_level_strict_acc", 0.8133),
        ("ifeval", "inst_level_loose_acc", 0.8815),
        ("style", "slop", 2.41),
        ("style", "rep3g", 11.9),
        ("style", "word_count", 512.0),
    ]


def test_quants_of_a_published_model_name_its_repository(rich_release: Release) -> None:
    found = data(rich_release, "quants")
    assert (found["base_model"], found["base_model_relation"]) == (["me/lighthouse-e4b"], "quantized")


def test_quants_of_a_source_name_that() -> None:
    quant = StepRecord(
        name="quantize.g/Q8_0",
        section="quantize",
        entry="g/Q8_0",
        op="gguf",
        makes="gguf",
        inputs={"base": "sources.base"},
    )
    found = data(release_of((quant,), (BASE,), "gguf", "quantize.g/Q8_0"), "out")
    assert (found["base_model"], found["base_model_relation"]) == (["big/base"], "quantized")


def test_an_adapter_trained_here_names_its_base(rich_release: Release) -> None:
    found = data(rich_release, "adapter")
    assert (found["base_model"], found["base_model_relation"]) == (["google/gemma-4-E4B-pt"], "adapter")
    assert found["library_name"] == "peft"


def test_a_merged_adapter_names_the_base_of_its_parts() -> None:
    merged = StepRecord(
        name="stages.m", section="stages", entry="m", op="ties", makes="adapter", inputs={"style": "sources.style"}
    )
    found = data(release_of((merged,), (ADAPTER,), "adapter", "stages.m"), "out")
    assert (found["base_model"], found["base_model_relation"]) == (["big/base"], "adapter")


@pytest.mark.parametrize("base", ["out/base", "../base", "/models/base", "a b/c", "https://x.example/y"])
def test_a_local_adapters_base_is_not_taken_for_a_repository(base: str) -> None:
    local = SourceRecord(name="style", kind="adapter", path="./style", facts={"base_model": base})
    merged = StepRecord(
        name="stages.m", section="stages", entry="m", op="ties", makes="adapter", inputs={"style": "sources.style"}
    )
    assert "base_model" not in data(release_of((merged,), (local,), "adapter", "stages.m"), "out")


@pytest.mark.parametrize(
    ("inputs", "sources", "relation"),
    [
        ({"base": "sources.base"}, (BASE,), "finetune"),
        ({"base": "sources.base", "style": "sources.style"}, (BASE, ADAPTER), "merge"),
    ],
    ids=["one-model", "model-and-adapter"],
)
def test_the_relation_of_a_model(inputs: dict[str, str], sources: tuple[SourceRecord, ...], relation: str) -> None:
    step = StepRecord(name="stages.s", section="stages", entry="s", op="apply", makes="model", inputs=inputs)
    found = data(release_of((step,), sources, "model", "stages.s"), "out")
    assert found["base_model_relation"] == relation
    assert found["base_model"] == [source.repo for source in sources]


def test_a_model_folded_from_its_own_training_is_a_finetune() -> None:
    trained = StepRecord(
        name="adapters.t", section="adapters", entry="t", op="lora", makes="adapter", inputs={"base": "sources.base"}
    )
    folded = StepRecord(
        name="stages.s", section="stages", entry="s", op="apply", makes="model",
        inputs={"base": "sources.base", "t": "adapters.t"},
    )  # fmt: skip
    found = data(release_of((trained, folded), (BASE,), "model", "stages.s"), "out")
    assert (found["base_model"], found["base_model_relation"]) == (["big/base"], "finetune")


def test_a_mask_says_nothing_of_a_base(rich_release: Release) -> None:
    found = data(rich_release, "masks")
    assert not {"base_model", "base_model_relation", "pipeline_tag", "library_name"} & set(found)


def test_a_licence_the_hub_does_not_list_becomes_other_with_a_name(rich_release: Release) -> None:
    mine = rich_release.model_copy(update={"license": "Acme Model Licence 1.0", "license_link": "https://acme.example"})
    found = data(mine, "weights")
    assert [found[key] for key in ("license", "license_name", "license_link")] == [
        "other",
        "acme-model-licence-1.0",
        "https://acme.example",
    ]


def test_yaml_that_looks_like_something_else_stays_a_string(rich_release: Release) -> None:
    card = CardText(language=("no",), tags=("on", "1.0", "a: b", "---"))
    page = render(rich_release.model_copy(update={"card": card}), "weights")["README.md"].decode()
    read = ModelCard(page).data
    assert read.language == ["no"]
    assert read.tags is not None
    assert read.tags[-4:] == ["on", "1.0", "a: b", "---"]
