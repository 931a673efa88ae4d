"""The checkers, case by case."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hubforge.lab.checkers import CHECKS, follows, forgiving, process_results, share

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("capitals", {}, "THE FOX, AT LAST!", True),
    ("capitals", {}, "THE FOx.", False),
    ("capitals", {}, "123.", False),  # No letter at all is no capital letter.
    ("lowercase", {}, "the fox.", True),
    ("lowercase", {}, "The fox.", False),
    ("words", {"n": 4}, "The fox didn't run.", True),
    ("words", {"n": 4}, "The fox ran.", False),
    ("words", {"n": 3}, "* The fox ran.", True),  # A bullet is no word.
    ("sentences", {"n": 2}, "It rained. The fox ran!", True),
    ("sentences", {"n": 2}, '"It rained. The fox ran!"', True),
    ("sentences", {"n": 1}, "Really?!", True),
    ("sentences", {"n": 2}, "It rained, and the fox ran.", False),
    ("bullets", {"n": 2}, "* one\n* two", True),
    ("bullets", {"n": 2}, "* one\n* two\n* three", False),
    ("bullets", {"n": 1}, "*one", False),  # A bullet is an asterisk and a space.
    ("include", {"word": "fox"}, "The FOX ran.", True),
    ("include", {"word": "fox"}, "The foxes ran.", False),
    ("avoid", {"word": "fox"}, "The foxes ran.", True),
    ("avoid", {"word": "fox"}, "A fox, then.", False),
    ("starts", {"phrase": "Long ago"}, '"LONG AGO the fox ran."', True),
    ("starts", {"phrase": "Long ago"}, "It was long ago.", False),
    ("ends", {"phrase": "The end."}, "The fox ran. the end.", True),
    ("ends", {"phrase": "The end."}, "The end. Or not.", False),
    ("quoted", {}, '"The fox ran."', True),
    ("quoted", {}, '"The fox ran.', False),
    ("quoted", {}, '""', False),
    ("title", {}, "<<The fox>>\nIt ran.", True),
    ("title", {}, "It ran.\n<<The fox>>", False),
]


@pytest.mark.parametrize(("kind", "arguments", "reply", "expected"), CASES)
def test_cases_worked_by_hand(kind: str, arguments: dict[str, Any], reply: str, expected: bool) -> None:
    assert follows(reply, kind, arguments) is expected


def test_every_checker_has_a_reply_that_passes_and_one_that_fails() -> None:
    assert {(kind, expected) for kind, _, _, expected in CASES} == {
        (kind, end) for kind in CHECKS for end in (True, False)
    }


@pytest.mark.parametrize("reply", ["", "  \n"])
def test_silence_follows_nothing(reply: str) -> None:
    assert not follows(reply, "avoid", {"word": "fox"})


def test_the_loose_score_forgives_a_first_line_the_strict_one_does_not() -> None:
    doc = {"instructions": ["lowercase", "include"], "arguments": [json.dumps({}), json.dumps({"word": "fox"})]}
    scores = process_results(doc, ["Sure:\nthe fox ran."])
    assert scores["inst_level_strict_acc"] == [False, True]
    assert scores["inst_level_loose_acc"] == [True, True]
    assert (scores["prompt_level_strict_acc"], scores["prompt_level_loose_acc"]) == (False, True)


def test_forgiving_has_ifevals_eight_variants() -> None:
    assert forgiving("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_share_counts_instructions_not_prompts() -> None:
    assert share([[True, True, False], [False]]) == 0.5
