"""A card that people edited, merged with that of a new release: their text stays, ours is replaced."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubforge.publish._merge import Base, Merged, merge_cards
from hubforge.sections import sections, split, wrap

FRONT = "---\nlicense: mit\ntags:\n- hubforge\n- merge\n---\n"
NAMES = ("title", "use", "results", "files")


def card(front: str = FRONT, **texts: str) -> str:
    return front + "\n" + "\n".join(wrap(name, text) for name, text in texts.items())


OLD = {name: f"## {name}\n\nold {name}" for name in NAMES}
NEW = {name: f"## {name}\n\nnew {name}" for name in NAMES}
KNOWN = Base(True, ({"license": "mit", "tags": ["hubforge", "merge"]},), frozenset(NAMES))


def merge(theirs: str, ours: str, take: str | None = None, base: Base = KNOWN) -> Merged:
    return merge_cards(theirs, ours, base, take)  # type: ignore[arg-type]


def settled(theirs: str, ours: str, take: str | None = None, base: Base = KNOWN) -> str:
    """The merged card, which comes out the same when it is merged again and asks nothing then."""
    found = merge(theirs, ours, take, base)
    assert take or found.conflicts == []
    again = merge(found.text, ours, None, base)
    assert (again.text, again.conflicts) == (found.text, [])
    return found.text


def test_a_card_that_nobody_touched_comes_out_as_the_release_has_it() -> None:
    assert settled(card(**OLD), card(**NEW)) == card(**NEW)
    fewer = {name: NEW[name] for name in ("title", "files")}
    assert settled(card(**OLD), card(**fewer)) == card(**fewer)
    assert settled(card(**fewer), card(**NEW), base=Base(True, KNOWN.fronts, frozenset(fewer))) == card(**NEW)


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
sane = words.filter(lambda text: not re.search(r"hubforge|^---", text) and "\r" not in text)


@settings(deadline=None)
@given(st.lists(sane, min_size=5, max_size=5), st.sets(st.sampled_from(NAMES[1:])), st.booleans())
def test_what_people_write_between_the_sections_survives_every_release(
    texts: list[str], dropped: set[str], reordered: bool
) -> None:
    _, pieces = split(card(**OLD))
    marked = [piece.raw for piece in pieces if piece.name]
    if reordered:
        marked.reverse()
    theirs = FRONT + "".join(f"\n{text}\n{raw}" for text, raw in zip(texts, [*marked, ""], strict=True))
    ours = card(**{name: text for name, text in NEW.items() if name not in dropped})
    merged = settled(theirs, ours)
    there = [piece for piece in split(merged)[1] if piece.name]
    order = [name for name in (reversed(NAMES) if reordered else NAMES) if name not in dropped]
    assert [piece.name for piece in there] == order
    assert sections(merged) == sections(ours)
    at = 0
    for text in texts:  # each of them is there, in the order in which they were written
        assert text.strip() in merged[at:], text
        at = merged.index(text.strip(), at) + len(text.strip())


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 30), sane.filter(lambda text: bool(text.strip())))
def test_an_edit_inside_a_section_is_a_conflict_that_both_sides_settle(name: str, at: int, text: str) -> None:
    body = OLD[name]
    edited = body[:at] + text + body[at:]
    theirs = card(**OLD).replace(body, edited, 1)
    for release in (OLD, NEW):  # also when the release says what it said before
        ours = card(**release)
        found = merge(theirs, ours)
        if not found.conflicts:
            assert sections(theirs)[name] in (sections(card(**OLD))[name], sections(ours)[name])  # only white space
            continue
        (conflict,) = found.conflicts
        assert conflict.what == f"the section {name}" and conflict.how == "was edited by hand"
        assert conflict.diff.startswith(f"--- {name} (on the Hub)\n+++ {name} (this release)\n")
        assert settled(theirs, ours, "ours") == ours
        kept = settled(theirs, ours, "theirs")
        assert edited.strip() in kept and f"<!-- hubforge:{name} by hand -->" in kept
        assert settled(kept, card(**NEW)) == kept.replace("old", "new") or release is OLD or edited.count("old")


def test_a_section_that_was_taken_out_comes_back_only_when_asked() -> None:
    theirs = card(**{name: OLD[name] for name in ("title", "results", "files")})
    (conflict,) = merge(theirs, card(**NEW)).conflicts
    assert (conflict.what, conflict.how) == ("the section use", "was taken out by hand")
    assert settled(theirs, card(**NEW), "ours") == card(**NEW)
    kept = settled(theirs, card(**NEW), "theirs")
    assert "<!-- hubforge:use by hand -->\n<!-- /hubforge:use -->\n" in kept and "new use" not in kept
    assert merge(theirs, card(**NEW), base=Base()).conflicts == []  # nobody knows that it was ever there


def test_a_section_without_its_end_is_a_conflict_and_swallows_nothing_else() -> None:
    theirs = card(**OLD).replace("<!-- /hubforge:use -->\n", "")
    (conflict,) = merge(theirs, card(**NEW)).conflicts
    assert (conflict.what, conflict.how) == ("the section use", "lost its end mark")
    assert sections(settled(theirs, card(**NEW), "ours")) == sections(card(**NEW))


def test_a_card_of_other_people_is_left_alone_until_somebody_says_which_to_take() -> None:
    theirs = "---\nlicense: mit\n---\n# My model\n\nWritten in an hour.\n"
    (conflict,) = merge(theirs, card(**NEW), base=Base()).conflicts
    assert (conflict.what, conflict.how) == ("the whole card", "was not written by hubforge")
    assert "-Written in an hour." in conflict.diff
    assert settled(theirs, card(**NEW), "ours", Base()) == card(**NEW)
    kept = settled(theirs, card(**NEW), "theirs", Base())
    assert kept == theirs + "\n<!-- hubforge by hand -->\n"


def test_a_card_that_has_only_front_matter_takes_the_sections() -> None:
    merged = settled("---\nlicense: mit\nthumbnail: x.png\n---\n", card(**NEW), base=Base())
    assert sections(merged) == sections(card(**NEW)) and "thumbnail: x.png\n" in merged


def test_line_endings_and_spaces_at_line_ends_are_no_edits() -> None:
    theirs = card(**OLD).replace("\n", "\r\n").replace("old use", "old use  ")
    assert merge(theirs, card(**OLD)).text == theirs  # nothing to push
    assert merge(theirs, card(**NEW)).conflicts == []


def test_text_that_looks_like_a_mark_ends_no_section() -> None:
    inside = "a\n<!-- /hubforge:use -->\n<!-- hubforge:files 000000000000 -->\nb"
    made = card(use=inside)
    assert list(sections(made)) == ["use"]
    assert settled(made, card(use="short")) == card(use="short")


FRONTS = {
    "a key of people": ("license: mit\ntags:\n- hubforge\n- merge\nwidget: [x] # mine\n", "widget: [x] # mine\n"),
    "a tag of people": ("license: mit\ntags: [hubforge, poems, merge]\n", "- poems\n"),
    "another order": ("tags:\n- merge\n- hubforge\nlicense: mit\n", "license: mit\n"),
}


@pytest.mark.parametrize(("front", "stays"), FRONTS.values(), ids=FRONTS)
def test_front_matter_keeps_what_people_added_and_follows_the_release(front: str, stays: str) -> None:
    theirs = card(f"---\n{front}---\n", **OLD)
    assert settled(theirs, card(**OLD)) == theirs
    ours = card("---\nlicense: apache-2.0\ntags:\n- hubforge\n- slerp\n---\n", **NEW)
    merged = settled(theirs, ours)
    assert "license: apache-2.0\n" in merged and "- slerp\n" in merged and "merge" not in merged
    assert stays.replace("mit", "apache-2.0") in merged


@pytest.mark.parametrize(
    ("front", "what", "how"),
    [
        ("license: gpl-3.0\ntags: [hubforge, merge]", "license", "was edited by hand"),
        ("tags: [hubforge, merge]", "license", "was taken out by hand"),
        ("license: mit\ntags: [hubforge]", "tags", "lost merge, which hubforge wrote"),
    ],
)
def test_front_matter_of_ours_that_was_edited_is_a_conflict(front: str, what: str, how: str) -> None:
    theirs = card(f"---\n{front}\n---\n", **OLD)
    (conflict,) = merge(theirs, card(**NEW)).conflicts
    assert (conflict.what, conflict.how) == (f"{what} in the front matter", how)
    assert settled(theirs, card(**NEW), "ours") == card(**NEW)
    kept = settled(theirs, card(**NEW), "theirs")
    assert f"<!-- hubforge:front-matter by hand: {what} -->\n" in kept and sections(kept) == sections(card(**NEW))


def test_front_matter_that_cannot_be_read_is_a_conflict() -> None:
    theirs = card("---\nlicense: [mit\n---\n", **OLD)
    (conflict,) = merge(theirs, card(**NEW)).conflicts
    assert conflict.what == "the front matter" and "cannot be read" in conflict.how
    assert settled(theirs, card(**NEW), "ours") == card(**NEW)


def test_a_diff_of_what_strangers_wrote_cannot_move_the_cursor() -> None:
    theirs = card(**OLD).replace("old use", "\x1b[2Jold\u202e use")
    (conflict,) = merge(theirs, card(**NEW)).conflicts
    assert "\x1b" not in conflict.diff and "\u202e" not in conflict.diff
