"""A pre-tokenizer is named by its regex, exactly or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubforge.llama_cpp.pretokenizer import FAMILIES, match_family, split_regex


def save(folder: Path, family: str) -> dict[str, Any]:
    """A tokenizer.json that cuts as that family does; its JSON."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    known = {one.name: one for one in FAMILIES}[family]
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    if known.split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(known.split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    return json.loads((folder / "tokenizer.json").read_text())


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_each_family_is_recognised_as_itself(tmp_path: Path, name: str) -> None:
    save(tmp_path, name)
    family = match_family(tmp_path)
    assert family is not None
    assert family.name == name


def test_the_labs_tokenizer_is_of_llama_3s_family(tiny_llama_256: Path) -> None:
    family = match_family(tiny_llama_256)
    assert family is not None
    assert family.name == "llama-bpe"


def change_regex(described: dict[str, Any]) -> None:
    pattern = described["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace("{1,3}", "{1,4}")


def look_up_no_words(described: dict[str, Any]) -> None:
    described["model"]["ignore_merges"] = False


def lower_case(described: dict[str, Any]) -> None:
    described["normalizer"] = {"type": "Lowercase"}


def prefix_space(described: dict[str, Any]) -> None:
    described["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def merge_cuts(described: dict[str, Any]) -> None:
    described["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext"


def fall_back_to_bytes(described: dict[str, Any]) -> None:
    described["model"]["byte_fallback"] = True


def other_model(described: dict[str, Any]) -> None:
    described["model"]["type"] = "Unigram"


@pytest.mark.parametrize(
    "change",
    [change_regex, look_up_no_words, lower_case, prefix_space, merge_cuts, fall_back_to_bytes, other_model],
)
def test_anything_else_about_it_makes_it_unknown(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    described = save(tmp_path, "llama-bpe")
    change(described)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert match_family(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pre_tokenizer": 3}', '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_json_that_is_none_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert match_family(tmp_path) is None
    assert split_regex(tmp_path) == "none"
