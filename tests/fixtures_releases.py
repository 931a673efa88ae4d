"""Releases to render cards of: one as rich as the demo's, a neighbour's masks, one that says almost nothing.

Every number here is made up for the tests; digests are digests of names.
"""

from __future__ import annotations

import pytest

from hubforge.release import CardText, GateRecord, Release, SourceRecord, StepRecord, TargetRecord
from tests.cards.lighthouse import RECIPE, digest, file, mask_steps, metrics, pushed, sources, steps


@pytest.fixture(scope="session")
def rich_release() -> Release:
    """As much as a release can say: two stages, a trained and two read adapters, two masks, four quants, two evals."""
    ran = steps()
    quants = tuple(s.name for s in ran if s.makes == "gguf")
    return Release(
        hubforge="0.1.0",
        name="lighthouse",
        license="gemma",
        license_link="https://ai.google.dev/gemma/terms",
        recipe_file="lighthouse.yaml",
        recipe=RECIPE,
        sources=sources(),
        steps=ran,
        metrics=metrics(),
        gates=(
            GateRecord(
                text="ifeval.prompt_level_strict_acc >= baseline - 0.02",
                holds=True,
                on="healed",
                value=0.8133,
                threshold=0.8044,
                margin=0.0089,
            ),
        ),
        targets=(
            TargetRecord(
                name="weights",
                kind="model",
                repo="me/lighthouse-e4b",
                tag="v1.0",
                entries=("stages.healed",),
                files=pushed("stages.healed", ran),
            ),
            TargetRecord(
                name="quants",
                kind="gguf",
                repo="me/lighthouse-e4b-GGUF",
                tag="v1.0",
                entries=quants,
                files=pushed("quantize.", ran),
            ),
            TargetRecord(
                name="masks",
                kind="mask",
                repo="me/gemma-4-masks",
                folder="g4-e4b-it",
                entries=("masks.importance", "masks.core", "masks.gate"),
                files=pushed("masks.", ran, "g4-e4b-it"),
            ),
            TargetRecord(
                name="adapter",
                kind="adapter",
                repo="me/chat-r16",
                entries=("adapters.chat",),
                files=pushed("adapters.chat", ran),
            ),
        ),
        lock={"version": 1, "sources": {"instruct": {"commit": "b" * 40}}},
        card=CardText(
            title="Lighthouse E4B",
            summary="A storyteller made from Gemma 4 E4B that still does as it is told.",
            description="Two **style adapters** are folded into the instruct model, then healed by a masked fine-tune.",
            authors=("Ada Example", "Ben Example"),
            intended_use="Short fiction in English.",
            limitations=(
                "Long stories lose their thread after about 1500 words.",
                "It knows *nothing* of lighthouses built after 1900.",
            ),
            citation=(
                "@misc{lighthouse,\n  title = {Lighthouse E4B},\n  author = {Example, Ada},\n  year = {2026}\n}",
            ),
            tags=("creative-writing",),
            language=("en",),
            prompt='Describe "the lamp" in two sentences.',
        ),
    )


@pytest.fixture(scope="session")
def sibling_release() -> Release:
    """What another folder of the mask repository holds."""
    big = mask_steps()[0].model_copy(update={"key": digest("big")})
    return Release(
        hubforge="0.1.0",
        name="masks-31b",
        license="gemma",
        recipe_file="masks.yaml",
        recipe="name: masks-31b\n",
        sources=(
            SourceRecord(name="instruct", kind="model", repo="google/gemma-4-31B-it", commit="f" * 40, license="gemma"),
            SourceRecord(name="prompts", kind="dataset", repo="google/IFEval", commit="e" * 40),
        ),
        steps=(big,),
        targets=(
            TargetRecord(
                name="masks",
                kind="mask",
                repo="me/gemma-4-masks",
                folder="g4-31b-it",
                entries=("masks.importance",),
                files=(
                    *pushed("masks.importance", (big,), "g4-31b-it"),
                    file("g4-31b-it/assets/importance-layers.svg", 9000),
                ),
            ),
        ),
        target="masks",
    )


@pytest.fixture(scope="session")
def sparse_release() -> Release:
    """Says almost nothing: a local model with a local adapter folded in, no licence, no text, nothing measured."""
    folded = StepRecord(
        name="stages.out",
        section="stages",
        entry="out",
        op="apply",
        makes="model",
        fields={"model": "base", "adapters": ["style"], "importance": None},
        inputs={"base": "sources.base", "style": "sources.style"},
    )
    mask = StepRecord(
        name="masks.m", section="masks", entry="m", op="fisher", makes="mask", inputs={"base": "sources.base"}
    )
    quant = StepRecord(
        name="quantize.g/Q8_0",
        section="quantize",
        entry="g/Q8_0",
        op="gguf",
        makes="gguf",
        inputs={"out": "stages.out"},
    )
    merged = StepRecord(
        name="stages.both",
        section="stages",
        entry="both",
        op="ties",
        makes="adapter",
        inputs={"style": "sources.style"},
    )
    return Release(
        hubforge="0.1.0",
        name="sparse",
        recipe_file="sparse.yaml",
        recipe="",
        sources=(SourceRecord(name="base", kind="model"), SourceRecord(name="style", kind="adapter")),
        steps=(mask, folded, merged, quant),
        targets=(
            TargetRecord(name="weights", kind="model", repo="me/sparse", entries=("stages.out",)),
            TargetRecord(name="quants", kind="gguf", repo="me/sparse-GGUF", entries=("quantize.g/Q8_0",)),
            TargetRecord(name="masks", kind="mask", repo="me/masks", entries=("masks.m",)),
            TargetRecord(name="adapter", kind="adapter", repo="me/both", entries=("stages.both",)),
        ),
    )
