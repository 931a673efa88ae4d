"""SHA256SUMS: coreutils checks what we write, and we read nothing else."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubforge.op import FileDigest
from hubforge.publish._paths import path_fault
from hubforge.publish._sums import read_sums, sums_text

DIGEST = "0" * 64


def listed(path: str, data: bytes) -> FileDigest:
    return FileDigest(path, len(data), hashlib.sha256(data).hexdigest())


def test_sha256sum_checks_what_was_written(tmp_path: Path) -> None:
    contents = {"config.json": b"{}", "with space.md": b"x", "sub/Größe.bin": b"\0" * 100}
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "SHA256SUMS").write_text(sums_text(listed(name, data) for name, data in contents.items()))
    checked = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    (tmp_path / "config.json").write_bytes(b"[]")
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True).returncode == 1


def test_in_a_folder_paths_are_relative_to_it_and_the_shared_card_is_left_out() -> None:
    files = [listed("README.md", b"1"), listed("g4/fisher.safetensors", b"2"), listed("g4/SHA256SUMS", b"3")]
    assert list(read_sums(sums_text(files, "g4"))) == ["fisher.safetensors"]


@given(st.dictionaries(st.text(min_size=1).filter(lambda path: path_fault(path) is None), st.binary(max_size=3)))
def test_reading_gives_back_what_was_written(contents: dict[str, bytes]) -> None:
    contents.pop("SHA256SUMS", None)
    files = [listed(path, data) for path, data in contents.items()]
    assert read_sums(sums_text(files)) == {file.path: file.sha256 for file in files}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"{DIGEST}  a", "the last line is cut off"),
        (f"{DIGEST} a\n", "line 1 is not"),
        (f"{DIGEST} *a\n", "line 1 is not"),
        (f"{DIGEST.replace('0', 'A')}  a\n", "line 1 is not"),
        (f"\\{DIGEST}  a\n", "line 1 is not"),
        (f"{DIGEST}  a\n\n", "line 2 is not"),
        (f"{DIGEST}  ../a\n", "line 1: the path ../a holds the part '..'"),
        (f"{DIGEST}  a\n{DIGEST}  a\n", "line 2: a is listed twice"),
        (f"{DIGEST}  a\r\n", "control character"),
    ],
)
def test_anything_else_is_refused_with_its_line(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match="line") as caught:
        read_sums(text)
    assert fault in str(caught.value)


@pytest.mark.parametrize("path", ["a\nb", "../a", "a\\b"])
def test_a_path_that_the_format_cannot_hold_is_not_written(path: str) -> None:
    with pytest.raises(ValueError, match="the path"):
        sums_text([FileDigest(path, 1, DIGEST)])
