"""The grammar: the same from the same seed, whole, and each style what its name says."""

from __future__ import annotations

import re
from random import Random

import pytest

from hubforge.lab.grammar import GRAMMAR, STYLES, Scene, document, draw_scene, expand, fill_in


def texts(symbol: str, count: int = 200) -> list[str]:
    random = Random(7)
    return [expand(symbol, draw_scene(random), random) for _ in range(count)]


def test_the_same_seed_tells_the_same_stories() -> None:
    one, two, other = (Random(seed) for seed in (3, 3, 4))
    told = [document(one) for _ in range(50)]
    assert told == [document(two) for _ in range(50)]
    assert told != [document(other) for _ in range(50)]


def test_a_scene_binds_its_symbols() -> None:
    scene = Scene("queen", "island", "owl")
    assert fill_in("<He> saw the <who> <at> with a <thing>; <he> ran to <him>.", scene, Random(0)) == (
        "She saw the queen on the island with an owl; she ran to her."
    )


@pytest.mark.parametrize("symbol", sorted(GRAMMAR))
def test_no_symbol_is_left_undrawn(symbol: str) -> None:
    assert not any(re.search(r"<\w+>", text) for text in texts(symbol, 60))


def test_a_verse_is_the_same_both_times() -> None:
    lines = fill_in("<verse>\n<verse>", draw_scene(Random(1)), Random(1)).split("\n")
    assert lines[0] == lines[1]
    assert len(lines[0]) > 20


def sentence_length(text: str) -> float:
    return len(text.split()) / len(re.findall(r"[.!?]+", text))


def test_prose_has_long_sentences_and_terse_short_ones() -> None:
    assert min(map(sentence_length, texts("prose"))) > 20
    assert max(map(sentence_length, texts("terse"))) < 5


def test_every_line_of_dialogue_is_spoken() -> None:
    assert all(line.count('"') in (2, 4) for text in texts("dialogue") for line in text.split("\n"))


@pytest.mark.parametrize("style", STYLES)
def test_styles_vary(style: str) -> None:
    assert len(set(texts(style))) == 200
