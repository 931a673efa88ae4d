"""Names and paths: what the Hub and git take, and nothing that leaves the repository."""

from __future__ import annotations

import subprocess

import pytest
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._validators import HFValidationError
from hypothesis import given
from hypothesis import strategies as st

from hubforge.errors import shown
from hubforge.publish._paths import path_fault, repo_fault, tag_fault


@given(st.text("aB1-_./é", max_size=10))
def test_repository_names_are_those_of_huggingface_hub_with_a_namespace(repo: str) -> None:
    try:
        validate_repo_id(repo)
        taken = "/" in repo
    except HFValidationError:
        taken = False
    assert (repo_fault(repo) is None) == taken


@pytest.mark.parametrize(
    ("repo", "fault"),
    [
        ("model", "must be written namespace/name"),
        ("datasets/me/model", "must be written namespace/name"),
        ("me/a--b", "may not hold '--'"),
        ("me/a..b", "may not hold '--' or '..'"),
        ("me/-a", "may hold only letters"),
        ("me/é", "may hold only letters"),
        ("me/" + "a" * 97, "97 characters"),
        ("me/a.git", "may not end in .git"),
    ],
)
def test_a_refused_repository_name_says_why(repo: str, fault: str) -> None:
    assert fault in (repo_fault(repo) or "")


@given(st.text("a.-/~^:?*[@{\\ \tlock", max_size=8))
def test_every_tag_taken_is_one_git_takes(tag: str) -> None:
    if tag_fault(tag) is None:
        assert subprocess.run(["git", "check-ref-format", f"refs/tags/{tag}"]).returncode == 0


@pytest.mark.parametrize("tag", ["v1.0", "release/2026-01", "1.0+cpu", "_x"])
def test_usual_tags_are_taken(tag: str) -> None:
    assert tag_fault(tag) is None


@pytest.mark.parametrize("tag", ["main", "HEAD", "refs/tags/v1", "0" * 40, "", "a b", "-v", "v1..2", "v1.lock", "a/"])
def test_what_is_no_tag_is_refused(tag: str) -> None:
    assert tag_fault(tag)


@pytest.mark.parametrize("path", ["config.json", "a/b/c.safetensors", "Größe.txt", "with space.md", ".gitattributes"])
def test_usual_paths_are_taken(path: str) -> None:
    assert path_fault(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a//b",
        "../a",
        "a/../b",
        "a/.",
        "a\\b",
        "C:/a",
        "a\nb",
        "a\x00",
        "\x1b[31m",
        "a/.GIT/x",
        "a/",
        "x" * 2000,
    ],
)
def test_paths_that_leave_or_deceive_are_refused(path: str) -> None:
    assert path_fault(path)


def test_what_is_shown_cannot_move_the_cursor() -> None:
    assert "\x1b" not in shown("\x1b[2J") and len(shown("x" * 1000)) < 210
