"""YAML with lines: YAML 1.2 scalars, duplicate keys, syntax errors with their line, and no bombs."""

import pytest

from hubforge import marks
from hubforge.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", "on"), ("no", "no"), ("1e-4", 1e-4), ("0x10", 16), ("2026-11-21", "2026-11-21"), ("~", None),
     ("true", True), (".5", 0.5), ("-3", -3), ("'1'", "1"), ("1_000", "1_000"), (".inf", float("inf"))],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert marks.parse(f"x: {text}", "r.yaml").data == {"x": value}


def test_on_is_a_key():
    assert marks.parse("on: [a]", "r.yaml").data == {"on": ["a"]}


def test_lines_of_keys_and_items():
    marked = marks.parse("a:\n  b: 1\n  c:\n    - x\n    - y\n", "r.yaml")
    assert marked.where(("a", "b")) == "r.yaml:2"
    assert marked.where(("a", "c", 1)) == "r.yaml:5"
    assert marked.where(("a", "b", "not", "there")) == "r.yaml:2"


def test_duplicate_key_is_named_with_both_lines():
    (error,) = marks.parse("a: 1\nb: 2\na: 3\n", "r.yaml").errors
    assert str(error).startswith("r.yaml:3: a is written twice (first on line 1)")


@pytest.mark.parametrize(
    ("text", "line"), [("a: [1, 2\nb: 3\n", 2), ("a: 1\n\tb: 2\n", 2), ("a: b: c\n", 1), ("a: *nowhere\n", 1)]
)
def test_syntax_errors_carry_their_line(text, line):
    (error,) = marks.parse(text, "r.yaml").errors
    assert error.where == f"r.yaml:{line}"
    assert "not valid YAML" in error.what


def test_billion_laughs_stays_small():
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        text += f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    (error,) = marks.parse(text, "bomb.yaml").errors
    assert "once aliases are followed" in error.what


def test_an_alias_of_itself_is_refused():
    (error,) = marks.parse("a: &a [*a]\n", "r.yaml").errors
    assert error.where == "r.yaml:1"


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system [ls]", "!!binary aGk=", "a: !!set {x}"])
def test_tags_are_not_plain_data(text):
    (error,) = marks.parse(text, "r.yaml").errors
    assert "is not plain data" in error.what


@pytest.mark.parametrize(
    ("text", "said"),
    [('!!int ""', "'' is no int"), ("!!bool perhaps", "'perhaps' is no bool"), ("!!null 3", "'3' is no null")],
)
def test_a_tag_that_does_not_fit_its_value_is_an_error_with_its_line(text, said):
    (error,) = marks.parse(f"a: 1\nb: {text}\n", "r.yaml").errors
    assert str(error) == f"r.yaml:2: is not valid YAML: {said}"


def test_deep_nesting_is_refused():
    assert marks.parse("[" * 5000, "r.yaml").errors


def test_not_utf8_names_the_line(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"name: ok\ntitle: \xff\n")
    with pytest.raises(RecipeError, match=r":2: is not UTF-8"):
        marks.read(tmp_path / "r.yaml")


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(RecipeError, match="there is no such file"):
        marks.read(tmp_path / "none.yaml")
