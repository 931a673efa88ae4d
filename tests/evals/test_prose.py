"""The four style numbers, on texts short enough to count by hand."""

import pytest

from hubforge.evals._prose import (
    by_first_word,
    dialogue_share,
    measure,
    repeated_trigrams,
    slop_hits,
    slop_list,
    words,
)


def test_words_stand_as_they_are():
    assert words("Don’t go—it's 5 o'clock, Mara's café.") == ["don't", "go", "it's", "5", "o'clock", "mara's", "café"]


def test_repeated_trigrams_count_every_occurrence():
    # "the old man" comes twice, and so does "old man sat"; "man sat the" and "sat the old" once.
    assert repeated_trigrams(["the", "old", "man", "sat", "the", "old", "man", "sat"]) == 4
    assert repeated_trigrams(["a", "a", "a", "a"]) == 2
    assert repeated_trigrams(["to", "be", "or", "not"]) == 0
    assert repeated_trigrams([]) == 0


def test_slop_is_read_from_left_to_right_the_longest_first():
    slop = by_first_word(["deep breath", "took a deep breath", "breath", "tapestry"])
    assert slop_hits(["she", "took", "a", "deep", "breath"], slop) == 1
    assert slop_hits(["a", "deep", "breath", "and", "a", "breath"], slop) == 2
    assert slop_hits(["a", "tapestry", "of", "tapestry"], slop) == 2
    assert slop_hits(["a", "tapestries", "breathless"], slop) == 0


def test_published_lists_are_there():
    text = "Her voice barely above a whisper, in the acrid air, took a deep breath."
    assert slop_hits(words(text), slop_list()) == 3
    assert slop_hits(words("The boat is late."), slop_list()) == 0
    assert slop_hits(words("The boat is late."), slop_list(("boat IS",))) == 1


@pytest.mark.parametrize(
    ("line", "is_speech"),
    [
        ('"Wait!" cried the cook.', True),
        ("The cook said, “Wait.”", True),
        ('"Wait," he told the boy, "and sit."', True),
        ('The sign read "Wait".', False),
        ('"I said no."', False),  # the verb is inside
        ('"Wait." He rose, took his old coat, and left; nobody asked why.', False),  # the verb is ten words away
        ("He asked her to wait.", False),
        ('An open " quote, he said', False),
    ],
)
def test_a_line_of_dialogue(line: str, is_speech: bool) -> None:
    assert dialogue_share(line) == float(is_speech)


def test_blank_lines_do_not_count():
    assert dialogue_share('"Go," she said.\n\n   \nHe went.\n') == 0.5


def test_rates_are_per_thousand_words():
    text = "the old man sat the old man sat"  # 8 words, 4 occurrences of repeated trigrams
    assert measure(text, {}) == {"slop": 0.0, "rep3g": 500.0, "dialogue_frac": 0.0, "word_count": 8.0}
    assert measure("tapestry now", by_first_word(["tapestry"]))["slop"] == 500.0
    assert measure("", slop_list()) == {"slop": 0.0, "rep3g": 0.0, "dialogue_frac": 0.0, "word_count": 0.0}
