"""Requests and their replies: every reply passes, held-out ones stay out, prompts say what is asked."""

from __future__ import annotations

from random import Random

import pytest

from hubforge.lab.checkers import follows, words
from hubforge.lab.corpora import Budget, draw_corpora
from hubforge.lab.grammar import PLACES, WHO, Scene
from hubforge.lab.instructions import (
    KINDS,
    LENGTHS,
    Example,
    Instruction,
    fit_together,
    is_held_out,
    is_unseen,
    request,
    story_request,
)

SMALL = Budget(documents=5, requests=600, stories=20, styled=5, held_out=100, prompts=50)


def drawn(held_out: bool, count: int = 400) -> list[Example]:
    random = Random(11)
    return [request(random, held_out=held_out) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_every_reply_follows_its_own_instructions(held_out: bool) -> None:
    for example in drawn(held_out):
        assert example.instructions
        assert all(follows(example.reply, one.kind, one.arguments) for one in example.instructions), example


def test_requests_cover_every_kind_and_ask_for_nothing_impossible() -> None:
    examples = drawn(False)
    assert {one.kind for example in examples for one in example.instructions} == set(KINDS)
    assert all(fit_together({one.kind for one in example.instructions}) for example in examples)


def test_a_prompt_names_its_arguments() -> None:
    asked = Instruction("words", {"n": 7}).text(Random(0))
    assert asked in ("Use exactly seven words.", "Answer in exactly seven words.")
    assert Instruction("ends", {"phrase": "Good night."}).text(Random(0)).endswith('with "Good night."')


@pytest.mark.parametrize("n", sorted(LENGTHS))
def test_forms_of_a_length_have_that_length(n: int) -> None:
    assert len(words(LENGTHS[n].replace("{who}", "fox").replace("<", "").replace(">", ""))) == n


def test_held_out_scenes_are_a_fixed_share() -> None:
    share = sum(is_held_out(Scene(who, place, "")) for who in WHO for place in PLACES) / (len(WHO) * len(PLACES))
    assert 0.1 < share < 0.2


def test_training_never_sees_a_held_out_scene_pair_or_prompt() -> None:
    corpora = draw_corpora(0, SMALL)
    trained = {example.prompt for example in corpora.requests}
    assert not trained & {example.prompt for example in corpora.held_out + corpora.prompts + corpora.style_prompts}
    assert not any(is_unseen({one.kind for one in example.instructions}) for example in corpora.requests)
    held_out = [(who, place) for who in WHO for place in PLACES if is_held_out(Scene(who, place, ""))]
    assert not any(f" {who} " in prompt and f"the {place}." in prompt for prompt in trained for who, place in held_out)
    assert any(is_unseen({one.kind for one in example.instructions}) for example in corpora.held_out)


def test_the_budget_of_one_corpus_leaves_the_others_alone() -> None:
    other = Budget(documents=9, requests=600, stories=20, styled=7, held_out=100, prompts=50)
    assert draw_corpora(0, SMALL).held_out == draw_corpora(0, other).held_out
    assert draw_corpora(0, SMALL).held_out != draw_corpora(1, SMALL).held_out


def test_a_story_request_is_answered_in_its_style() -> None:
    example = story_request(Random(0), style="dialogue")
    assert "story about a" in example.prompt
    assert example.reply.count('"') >= 6
