"""What every error does with words that come from strangers."""

from hubforge.errors import RecipeError


def test_nothing_in_an_error_moves_the_cursor_or_turns_the_text_round():
    error = RecipeError("tensor '\x1b[2Jw\u202e' is\x00 odd", where="a\r.yaml:3", mend="Look\u200b twice.\nThen again.")
    assert str(error) == "a\\r.yaml:3: tensor '\\x1b[2Jw\\u202e' is\\x00 odd\n  Look\\u200b twice.\nThen again."
