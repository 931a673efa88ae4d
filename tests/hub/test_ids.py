"""Identifiers are git's own, and names that could do harm are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hubforge.hub.names import check_name, check_path, check_ref_name
from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.gitids import blob_id, commit_id, folder_ids, pointer
from hubforge.hub.storage.uploadmode import ignored, is_text, upload_mode

FILES = {"a/b/c": "1", "a.txt": "2", "a-b/z": "3", "a/q": "4", "é": "5", "a0": "6", "deep/er/and/deeper": "7"}


def test_a_file_has_the_id_git_gives_it():
    assert blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_folders_and_commits_have_the_ids_git_gives_them(tmp_path: Path):
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    who = {"NAME": "ann", "EMAIL": "ann@users.noreply.invalid", "DATE": "@1700000000 +0000"}
    env = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **env},
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "title", "--cleanup=verbatim")
    ids = folder_ids({path: blob_id(text.encode()) for path, text in FILES.items()})
    assert ids[""] == git("rev-parse", "HEAD^{tree}")
    assert ids["a"] == git("rev-parse", "HEAD:a")
    assert ids["deep/er"] == git("rev-parse", "HEAD:deep/er")
    # `git commit -m` ends the message with a newline; so does whoever wants the very same id.
    assert commit_id(ids[""], [], "ann", 1700000000, "title\n") == git("rev-parse", "HEAD")


def test_an_lfs_pointer_is_the_text_git_lfs_writes():
    assert (
        pointer("a" * 64, 12) == b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12\n"
    )


BAD_PATHS = [
    "", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\0b", "a\nb", ".git/config", "x/.GIT/y",
    "\udc80", "a" * 256, "/".join(["ab"] * 400),
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=[repr(path)[:20] for path in BAD_PATHS])
def test_a_path_that_could_leave_the_repository_is_refused(path: str):
    with pytest.raises(Refusal, match="Invalid path"):
        check_path(path)


@pytest.mark.parametrize("path", ["a", ".gitattributes", "a b/ü.txt", "...", "a/..b", "con", "%2e%2e"])
def test_an_odd_but_harmless_path_is_taken(path: str):
    assert check_path(path) == path


@pytest.mark.parametrize("name", ["", ".", "..", "a--b", "a..b", "-a", "a.", "a/b", "a\n", "x.git", "a" * 97, None, 3])
def test_a_repository_name_the_hub_refuses_is_refused(name: object):
    with pytest.raises(Refusal):
        check_name(name, "name")


@pytest.mark.parametrize("name", ["", "a..b", "/a", "a/", "a.lock", "refs/heads/a", "a b", "a//b", "a/.b", "0" * 40])
def test_a_reference_name_git_refuses_is_refused(name: str):
    with pytest.raises(Refusal):
        check_ref_name(name)


@pytest.mark.parametrize(
    ("path", "size", "sample", "mode"),
    [
        ("a.txt", 3, b"abc", "regular"),
        ("a.txt", 10 << 20, b"abc", "lfs"),
        ("w.safetensors", 3, b"abc", "lfs"),
        ("W.GGUF", 3, b"abc", "lfs"),
        ("x/y.png", 3, b"abc", "lfs"),
        ("a.txt", 3, b"a\0c", "lfs"),
        ("a.txt", 2, b"\xff\xfe", "lfs"),
        ("a.txt", 600, b"a" * 511 + "é".encode()[:1], "regular"),
        ("a.txt", 512, b"a" * 511 + "é".encode()[:1], "lfs"),
        ("config.json", 10, b"{}", "regular"),
        ("safetensors", 3, b"abc", "regular"),
    ],
)
def test_upload_mode(path: str, size: int, sample: bytes, mode: str):
    assert upload_mode(path, size, sample, 10 << 20) == mode


def test_text_is_utf8_without_nul():
    assert is_text("grüß".encode(), whole=True)
    assert not is_text(b"\xe9", whole=True)


@pytest.mark.parametrize(
    ("rules", "path", "left_out"),
    [
        ("*.log", "a/b.log", True),
        ("*.log\n!keep.log", "keep.log", False),
        ("/build", "build/x", True),
        ("/build", "a/build/x", False),
        ("cache/", "a/cache/x", True),
        ("cache/", "cache", False),
        ("a/**/z", "a/b/c/z", True),
        ("# a", "# a", False),
        ("[ab].txt", "b.txt", True),
        ("?.txt", "ab.txt", False),
        ("*a*a*a*a*a*a*a*a*b", "a" * 900, False),
    ],
)
def test_gitignore(rules: str, path: str, left_out: bool):
    assert ignored(path, rules) is left_out
