"""Front matter that strangers wrote, and what of it is taken for a source's licence."""

import pytest

from hubforge.front_matter import front_matter_in
from hubforge.sources import HashCache, SourceSpec, resolve_local


def test_the_front_matter_of_a_readme_is_plain_data(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# Title\n", encoding="utf-8")
    assert front_matter_in(tmp_path) == {"license": "mit", "tags": ["a", "b"]}


@pytest.mark.parametrize(
    "front",
    [
        "a: " + "[" * 9999,
        "date: 2026-13-45",
        "a: !!bool perhaps",
        "a: &a [1]\nb: *a",
        "a: " + "y" * 200_000,
        "- a",
        "a: [",
    ],
    ids=["deep", "no date", "no bool", "alias", "long", "no mapping", "cut off"],
)
def test_front_matter_that_cannot_be_taken_is_none(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    assert front_matter_in(tmp_path) == {}


def test_without_a_readme_there_is_none(tmp_path):
    assert front_matter_in(tmp_path) == {}


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: 'apache-2.0'  # as the base\n---\n", "apache-2.0"),
        ("---\ntags: [a]\n---\nThe base's card says:\nlicense: mit\n", None),
        ("---\nlicense: [mit]\n---\n", None),
    ],
    ids=["plain", "quoted", "in the text", "a list"],
)
def test_the_licence_of_a_local_source_is_what_its_front_matter_says(tmp_path, readme, license):
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    source = resolve_local("base", SourceSpec(model=str(tmp_path)), tmp_path, HashCache(tmp_path / "hashes"))
    assert source.license == license
