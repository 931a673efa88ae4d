"""What others wrote shows as exactly its characters, wherever it stands."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hubforge.cards import markdown
from hubforge.cards.render import render, tidy
from hubforge.release import File, Release

HOSTILE = (
    "a|b", "a\nb", "`code`", "``", "`", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "[x](javascript:x)", "![x](http://evil/x.png)", "**bold**", "_it_", "# h", "- item", "> quote", "1. one", "--- ",
    "| a | b |", "\\", "a\\|b",
    "&lt;b&gt;", "$$x$$", "~~gone~~", "<!-- hide", "```", "x" * 300, "\u202etxt", "\x00\x1b[31m", "<https://evil>",
    "prompt_level_strict_acc", "{{ 7*7 }}", "</details>", "=",
)  # fmt: skip
PARSER = MarkdownIt("gfm-like", {"linkify": False, "html": True})


def shown(source: str) -> str:
    """The characters a reader sees."""
    return html.unescape(re.sub(r"<[^>]*>", "", PARSER.render(source))).strip()


@pytest.mark.parametrize("words", HOSTILE)
def test_text_shows_its_characters_and_nothing_else(words: str) -> None:
    expected = markdown.one_line(words)
    assert shown(f"x {markdown.text(words)} x") == f"x {expected} x".replace("\x00", "")
    assert not re.search(r"<(?!/?p>)[a-z!]", PARSER.render("x " + markdown.text(words)))


@pytest.mark.parametrize("words", HOSTILE)
def test_text_at_the_start_of_a_line_opens_no_block(words: str) -> None:
    assert re.fullmatch(r"<p>[^<]*</p>\n", PARSER.render(markdown.text(words))) or words == "1. one"


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("how", [markdown.text, markdown.code, markdown.prose])
def test_a_cell_stays_one_cell(words: str, how: object) -> None:
    source = markdown.table([{"A": how(words), "B": "end"}])  # type: ignore[operator]
    rendered = PARSER.render(source)
    cells = re.findall(r"<td>(.*?)</td>", rendered, flags=re.S)
    assert len(cells) == 2
    assert cells[1] == "end"
    seen, wanted = html.unescape(re.sub(r"</?code>", "", cells[0])), markdown.one_line(words)
    if how is markdown.prose:
        seen, wanted = seen.replace("`", ""), wanted.replace("`", "")
    assert seen.split() == wanted.split()


def test_prose_keeps_code_between_backticks() -> None:
    assert markdown.prose("a share `t` of the_way, *to* `a|b`.") == (
        "a share `t` of the_way, \\*to\\* <code>a&#124;b</code>."
    )
    assert markdown.prose("one ` alone") == "one \\` alone"


@given(st.text(alphabet="a `|*\\_<", max_size=30))
def test_prose_shows_its_characters_but_for_backticks_in_pairs(words: str) -> None:
    shown_words = shown("x " + markdown.prose(words) + " x")
    assert re.sub("[` ]", "", shown_words) == re.sub("[` ]", "", f"x{words}x")


@given(st.text(max_size=40))
def test_code_shows_its_characters(words: str) -> None:
    expected = markdown.one_line(words)
    assert shown("x " + markdown.code(words) + " x").split() == f"x {expected} x".split()


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "data:text/html,x", "//evil.example/x", "file:///etc/passwd", "vbscript:x", "JAVASCRIPT:x"],
)
def test_links_go_only_to_the_web_or_the_repository(address: str) -> None:
    assert markdown.link("label", address) == "label"


def test_a_link_cannot_be_ended_by_its_address() -> None:
    rendered = PARSER.render(markdown.link("a]b", "https://x.example/a)b c<d>"))
    assert rendered == '<p><a href="https://x.example/a%29b%20c%3Cd%3E">a]b</a></p>\n'


def test_a_remote_with_a_token_loses_it() -> None:
    assert markdown.url("https://user:secret@github.com/me/x") == "https://github.com/me/x"


@pytest.mark.parametrize("name", ["../etc", "me/..", "me/x/y", "me x/y", "me/<x>", "", "x", None, "-me/x", "me/a--b"])
def test_what_is_no_repository_is_not_linked(name: str | None) -> None:
    assert not markdown.is_repo(name)
    assert "](" not in markdown.repo_link(name)


def test_a_fence_is_longer_than_those_inside() -> None:
    (token,) = PARSER.parse(markdown.fence("a\n```\nb\n`````\nc", "yaml"))
    assert (token.type, token.info) == ("fence", "yaml")
    assert token.content == "a\n```\nb\n`````\nc\n"


def test_columns_that_are_blank_everywhere_are_left_out() -> None:
    table = markdown.table([{"A": "1", "B": "", "C": ""}, {"A": "", "B": None, "C": "2"}], right=["C"])
    assert table == "| A | C |\n| --- | ---: |\n| 1 |  |\n|  | 2 |"
    assert markdown.table([]) == ""


def test_arxiv_and_addresses_become_links() -> None:
    assert markdown.linkify("Yadav et al. 2023, arXiv:2306.01708, section 3; https://x.example/a.") == (
        "Yadav et al. 2023, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708), section 3; "
        "[https://x.example/a](https://x.example/a)."
    )


def test_tidy_keeps_blank_lines_inside_fences() -> None:
    assert tidy("a\n\n\n\nb  \n```\nx\n\n\n\ny  \n```\n\n\nc") == "a\n\nb\n```\nx\n\n\n\ny  \n```\n\nc\n"


@pytest.mark.parametrize("target", ["weights", "quants", "masks", "adapter"])
def test_hostile_facts_change_no_page(target: str, rich_release: Release, sibling_release: Release) -> None:
    """The same hostile words in every place that others fill: no new block, tag or link on the page."""
    expected = _structure(rich_release, sibling_release, target, "calm")
    for words in HOSTILE:
        assert _structure(rich_release, sibling_release, target, words) == expected, words


def _structure(release: Release, sibling: Release, target: str, words: str) -> list[str]:
    """The blocks of the page, and in each the tags, links and pictures that are not plain text or code."""
    found = []
    siblings = [_spoil(sibling, words)] if target == "masks" else []
    page = render(_spoil(release, words), target, siblings=siblings)["README.md"].decode()
    for token in PARSER.parse(page.split("---\n", 2)[2]):
        if token.type == "html_block":
            marks = r"(<!-- /?hubforge[^<>]* -->\s*)+"
            assert re.fullmatch(rf"{marks}|</?details>\s*(<summary>[^<]*</summary>\s*)?", token.content)
        found.append(token.type)
        # Inline code that holds a pipe or a backtick is HTML; both count as code.
        kinds = [child.type for child in token.children or () if child.type in ("link_open", "image", "strong_open")]
        found += kinds
        inline = [child.content for child in token.children or () if child.type == "html_inline"]
        assert set(inline) <= {"<code>", "</code>"}
    return found


def _spoil(release: Release, words: str) -> Release:
    """The release with those words in what adapters, evals, machines and remotes say."""
    facts = {"rank": words, "alpha": words, "base_model": words, "architecture": words, "dtype": words}
    facts |= {"training": {"corpus": words, "samples": words, "tokens": words, "recipe": words}}
    sources = tuple(
        source.model_copy(update={"facts": facts, "license": words, "split": words, "revision": words})
        for source in release.sources
    )
    steps = tuple(
        step.model_copy(
            update={
                "summary": words,
                "formula": words,
                "fields": {**step.fields, "note": words},
                "meanings": {"note": words},
                "versions": {"torch": words},
                "hardware": {"cpu": words},
                "files": tuple(File(path=file.path, size=1, sha256=words) for file in step.files),
            }
        )
        for step in release.steps
    )
    metrics = tuple(metric.model_copy(update={"meaning": words, "method": words}) for metric in release.metrics)
    targets = tuple(target.model_copy(update={"tag": words, "files": ()}) for target in release.targets)
    gates = tuple(gate.model_copy(update={"text": words}) for gate in release.gates)
    changed = {
        "sources": sources,
        "steps": steps,
        "metrics": metrics,
        "gates": gates,
        "recipe": words,
        "license": words,
    }
    return release.model_copy(update=changed | {"targets": targets, "recipe_file": f"{words}.yaml"})
