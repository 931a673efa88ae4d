"""Cards as files: as the golden ones, the same every time, valid Markdown, nothing invented, overridable, sandboxed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hubforge.cards import render, templates_folder
from hubforge.errors import HubforgeError
from hubforge.release import File, Release

TARGETS = ("weights", "quants", "masks", "adapter")
Golden = Callable[[str, bytes], None]


def readme(release: Release, target: str, **more: object) -> str:
    return render(release, target, **more)["README.md"].decode()  # type: ignore[arg-type]


def body(page: str) -> str:
    return page.split("---\n", 2)[2]


def tokens(page: str) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(body(page))


def fences(page: str, language: str) -> Iterator[str]:
    return (token.content for token in tokens(page) if token.type == "fence" and token.info == language)


@pytest.mark.parametrize("target", TARGETS)
def test_cards_are_the_golden_ones(
    target: str, rich_release: Release, sibling_release: Release, golden: Golden
) -> None:
    siblings = [sibling_release] if target == "masks" else []
    for path, content in render(rich_release, target, siblings=siblings).items():
        golden(f"cards/{target}/{path}", content)


@pytest.mark.parametrize("target", TARGETS)
def test_sparse_cards_are_the_golden_ones(target: str, sparse_release: Release, golden: Golden) -> None:
    files = render(sparse_release, target)
    golden(f"cards/sparse-{target}/README.md", files["README.md"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_published_release_renders_to_the_same_bytes(target: str, rich_release: Release) -> None:
    first = render(rich_release, target)
    # As read back from the Hub: through JSON, naming its target, with the card among its files.
    cards = tuple(File(path=path, size=len(content), sha256="0" * 64) for path, content in first.items())
    targets = [
        one.model_copy(update={"files": (*one.files, *cards)}) if one.name == target else one
        for one in rich_release.targets
    ]
    published = rich_release.model_copy(update={"targets": tuple(targets), "target": target})
    assert render(Release.model_validate_json(published.model_dump_json(exclude_none=True)), target) == first


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("which", ["rich_release", "sparse_release"])
def test_nothing_is_said_of_the_unknown(which: str, target: str, request: pytest.FixtureRequest) -> None:
    page = readme(request.getfixturevalue(which), target)
    for word in (
        "None",
        "N/A",
        "nan",
        "unknown",
        "Unknown",
        "TODO",
        "More information needed",
        "undefined",
        "()",
        "[]",
    ):
        shown = re.sub(r"```.*?```", "", page, flags=re.S)
        assert not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", shown), word


def test_what_was_computed_in_one_pass_says_so(rich_release: Release) -> None:
    files = render(rich_release, "weights")
    page = files["README.md"].decode()
    made = page.split("## How it was made")[1]
    within, end = made.split("`tuned` (`apply`)")[1].split("`healed` (`slerp`)")[:2]
    assert "Computed in one pass over the weights with `healed`, in float32 and unrounded: it has no files" in within
    assert "Computed in one pass over the weights with `tuned`." in end
    assert page.count("in one pass") == 2  # `styled` has files, so nothing is said of it.
    assert "| in `stages.healed` |" in page
    picture = files["assets/pipeline.svg"].decode()
    assert picture.count("stroke-dasharray") == 1 and "tuned: apply, no files" in picture


def test_passes_of_other_repositories_are_named_only_where_there_are_no_others(rich_release: Release) -> None:
    def page(*fused_into: str) -> str:
        steps = [
            step.model_copy(update={"fused_into": fused_into}) if step.name == "stages.tuned" else step
            for step in rich_release.steps
        ]
        return readme(rich_release.model_copy(update={"steps": tuple(steps)}), "weights")

    assert "with `healed`, in" in page("stages.other", "stages.healed")
    assert "with `other` and `third`, in" in page("stages.other", "stages.third")


def test_the_sparse_page_has_only_the_sections_it_can_fill(sparse_release: Release) -> None:
    headings = re.findall(r"^## (.*)$", readme(sparse_release, "weights"), flags=re.M)
    assert headings == ["How to use it", "What it is made of", "How it was made", "Where it comes from"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("which", ["rich_release", "sparse_release"])
def test_tables_have_as_many_cells_in_each_row(which: str, target: str, request: pytest.FixtureRequest) -> None:
    page = readme(request.getfixturevalue(which), target)
    lines = body(page).split("\n")
    tables = [token.map for token in tokens(page) if token.type == "table_open" and token.map]
    for first, last in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[first:last]}
        assert len(cells) == 1, lines[first:last]
    # Every line that looks like a row is in a table.
    in_tables = {number for first, last in tables for number in range(first, last)}
    rows = {number for number, line in enumerate(lines) if line.startswith("| ")}
    assert rows <= in_tables


@pytest.mark.parametrize("target", TARGETS)
def test_fences_are_closed_and_details_too(target: str, rich_release: Release) -> None:
    page = body(readme(rich_release, target))
    assert len(re.findall(r"^```", page, flags=re.M)) % 2 == 0
    assert page.count("<details>") == page.count("</details>") > 0


@pytest.mark.parametrize("target", TARGETS)
def test_snippets_compile(target: str, rich_release: Release) -> None:
    snippets = list(fences(readme(rich_release, target), "python"))
    assert snippets
    for snippet in snippets:
        names = {node.id for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Name)}
        compile(snippet, "README.md", "exec")
        assert names


def test_the_snippet_names_repository_and_tag_and_uses_the_chat_template(rich_release: Release) -> None:
    (snippet,) = fences(readme(rich_release, "weights"), "python")
    assert 'repo = "me/lighthouse-e4b"' in snippet
    assert 'revision = "v1.0"' in snippet
    assert "apply_chat_template" in snippet
    assert """'Describe "the lamp" in two sentences.'""" in snippet


def test_without_chat_template_the_snippet_uses_plain_text(sparse_release: Release) -> None:
    (snippet,) = fences(readme(sparse_release, "weights"), "python")
    assert "apply_chat_template" not in snippet
    assert "revision" not in snippet


def test_pictures_on_the_page_are_those_returned(rich_release: Release, sibling_release: Release) -> None:
    for target in TARGETS:
        files = render(rich_release, target, siblings=[sibling_release])
        shown = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", files["README.md"].decode()))
        theirs = {path for path in shown if path.startswith("g4-31b-it/")}
        assert shown - theirs == set(files) - {"README.md"}
        assert theirs <= {file.path for file in sibling_release.targets[0].files}


def test_a_mask_page_has_a_row_per_folder_in_order(rich_release: Release, sibling_release: Release) -> None:
    page = readme(rich_release, "masks", siblings=[sibling_release])
    assert re.findall(r"^\| \[(\S+)/\]", page, flags=re.M) == ["g4-31b-it", "g4-e4b-it"]
    again = readme(rich_release, "masks", siblings=[sibling_release, rich_release])
    assert again == page


def test_the_page_says_how_to_verify_and_to_make_it_again(rich_release: Release, sparse_release: Release) -> None:
    (weights,) = (block for block in fences(readme(rich_release, "weights"), "sh") if "verify" in block)
    assert weights.split("\n")[:2] == [
        "hubforge verify me/lighthouse-e4b@v1.0",
        # Every local source of the recipe has to be told, those of other targets too.
        "hubforge reproduce me/lighthouse-e4b@v1.0 --into again --source dialogue=PATH",
    ]
    (masks,) = (block for block in fences(readme(rich_release, "masks"), "sh") if "verify" in block)
    assert masks.startswith("hubforge verify me/gemma-4-masks --folder g4-e4b-it\n")
    assert "--source dialogue=PATH" in masks
    (sparse,) = fences(readme(sparse_release, "weights"), "sh")
    assert sparse == "hubforge verify me/sparse\n"


def test_quants_that_were_not_asked_for_do_not_appear(rich_release: Release) -> None:
    target = rich_release.targets[1].model_copy(update={"entries": ("quantize.gguf/Q6_K",), "files": ()})
    page = readme(rich_release.model_copy(update={"targets": (target,)}), "quants")
    assert "lighthouse-Q6_K.gguf" in page
    assert "lighthouse-BF16.gguf" not in page
    assert ":Q6_K" in page


def test_an_unknown_target_names_those_there_are(rich_release: Release) -> None:
    with pytest.raises(HubforgeError, match=r"no target 'weight'\n.*weights, quants, masks, adapter"):
        render(rich_release, "weight")


def test_a_folder_overrides_adds_and_removes_sections(rich_release: Release, tmp_path: Path) -> None:
    sections = tmp_path / "sections"
    sections.mkdir()
    (sections / "60-limitations.md.j2").write_text("## Mind the rocks\n{{ card.limitations | length }} of them")
    (sections / "65-thanks.model.md.j2").write_text("## Thanks")
    (sections / "70-files.md.j2").write_text("")
    page = readme(rich_release, "weights", templates=tmp_path)
    headings = re.findall(r"^## (.*)$", page, flags=re.M)
    assert headings[headings.index("Mind the rocks") :][:3] == ["Mind the rocks", "Thanks", "Where it comes from"]
    assert "2 of them" in page
    assert "## Thanks" not in readme(rich_release, "adapter", templates=tmp_path)


def test_a_page_template_may_leave_sections_out(rich_release: Release, tmp_path: Path) -> None:
    (tmp_path / "model.md.j2").write_text('{{ front_matter }}\n# Mine\n{{ sections(leave_out=["files", "made"]) }}')
    headings = re.findall(r"^## (.*)$", readme(rich_release, "weights", templates=tmp_path), flags=re.M)
    assert "Files" not in headings
    assert "How it was made" not in headings
    assert "Results" in headings


@pytest.mark.parametrize(
    ("template", "line", "says"),
    [
        ("a\n\n{{ nothing_here }}", 3, "nothing_here"),
        ("a\n{% if %}", 2, "Expected an expression"),
        ("{{ card.summary | shout }}", 1, "shout"),
        ("\n{{ 1 / 0 }}", 2, "division by zero"),
        ("\n\n\n{{ ''.__class__.__mro__[1].__subclasses__() }}", 4, "unsafe"),
        ("{{ release.model_construct.__globals__ }}", 1, "unsafe"),
    ],
    ids=["undefined", "syntax", "filter", "python", "sandbox", "sandbox-globals"],
)
def test_a_wrong_template_is_named_with_its_line(
    template: str, line: int, says: str, rich_release: Release, tmp_path: Path
) -> None:
    path = tmp_path / "sections" / "60-limitations.md.j2"
    path.parent.mkdir()
    path.write_text(template)
    with pytest.raises(HubforgeError) as caught:
        render(rich_release, "weights", templates=tmp_path)
    assert caught.value.where == f"{path}:{line}"
    assert says in caught.value.what


def test_a_missing_folder_of_templates_is_an_error(rich_release: Release, tmp_path: Path) -> None:
    with pytest.raises(HubforgeError, match="does not exist"):
        render(rich_release, "weights", templates=tmp_path / "no")


def test_the_templates_are_found_in_a_checkout() -> None:
    assert {path.name for path in templates_folder().glob("*.j2")} == {
        f"{kind}.md.j2" for kind in ("model", "adapter", "mask", "gguf")
    }


def test_nothing_heavy_is_loaded() -> None:
    script = (
        "import sys; from hubforge.cards import render; from hubforge.release import Release, TargetRecord;"
        "t = TargetRecord(name='w', kind='model', repo='me/x');"
        "render(Release(hubforge='0', name='x', recipe_file='x.yaml', recipe='', targets=(t,)), 'w');"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("target", ["weights", "adapter"])
def test_snippets_run_as_printed(
    target: str,
    rich_release: Release,
    tiny_llama: Path,
    tiny_loras: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a folder in place of each repository, and fewer tokens, for which there is no network to wait."""
    (snippet,) = fences(readme(rich_release, target), "python")
    snippet = snippet.replace('"me/lighthouse-e4b"', repr(str(tiny_llama)))
    snippet = snippet.replace('"google/gemma-4-E4B-pt"', repr(str(tiny_llama)))
    snippet = snippet.replace('"me/chat-r16"', repr(str(tiny_loras["one"])))
    snippet = snippet.replace("max_new_tokens=200", "max_new_tokens=3")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_mask_snippet_runs_as_printed(
    rich_release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    import torch
    from safetensors.torch import save_file

    (snippet,) = fences(readme(rich_release, "masks"), "python")
    path = tmp_path / "fisher.safetensors"
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 2)}, path)
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str, **more: str) -> str:
        asked.append((repo, name))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    exec(compile(snippet, "README.md", "exec"), {})
    assert asked == [("me/gemma-4-masks", "g4-e4b-it/importance.safetensors")]
    assert capsys.readouterr().out == "model.layers.0.mlp.up_proj.weight [4, 2]\n"


def test_the_leak_of_core_is_told_where_core_holds():
    from hubforge.cards.training import leak

    value = {
        "mean_left": 0.3,
        "mean_right": 0.2,
        "worst": 0.5,
        "worst_matrix": "q",
        "mean_core": 3e-8,
        "worst_core": 4e-8,
    }
    said = leak({**value, "projection": "two_sided"})
    assert said == "0.3 into U and 0.2 into V on average, at worst 0.5, in `q`"
    assert leak({**value, "projection": "core"}) == (
        f"{said}; what `core` holds out, Uᵀ·ΔW·V, is 3e−8 of it, at worst 4e−8"
    )


def test_a_meaning_begins_with_a_capital_unless_it_begins_with_a_symbol():
    from hubforge.cards.making import sentence

    assert sentence("which rows are taken") == "Which rows are taken."
    assert sentence("k, directions kept per matrix.") == "k, directions kept per matrix."
