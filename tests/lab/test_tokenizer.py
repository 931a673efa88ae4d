"""The tokenizer: nothing lost, chats as the template writes them, the pre-tokenizer llama.cpp knows."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from hubforge.lab.corpora import Encoder
from hubforge.lab.instructions import request
from hubforge.lab.tokenizer import BOS, EOT, LLAMA3_SPLIT, load_tokenizer, save_tokenizer, special_ids, train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = Random(0)
    texts = [text for _ in range(200) for example in [request(random)] for text in (example.prompt, example.reply)]
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe([*texts, "user assistant system"], 600), folder, eos_token=EOT, max_length=256)
    return folder


@pytest.mark.parametrize(
    "text", ["The fox ran.", "  two\n\n\nlines \t", "naïve café — 12345 日本 🦊", '"WHO?!" she\'ll ask']
)
def test_any_text_comes_back(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_text_begins_with_bos_once(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("The fox")
    assert ids[0] == tokenizer.bos_token_id == special_ids()["bos_token_id"]
    assert ids.count(ids[0]) == 1


def test_the_chat_template_writes_llama_3s_turns(folder: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi \n"}]
    turns = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == turns
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        turns + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_training_rows_are_the_ids_the_chat_template_gives(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    random = Random(5)
    for _ in range(50):
        example = request(random)
        row = Encoder(tokenizer.backend_tokenizer).chat(example)
        asked = [{"role": "user", "content": example.prompt}]
        told = [*asked, {"role": "assistant", "content": example.reply}]
        assert row.ids == tokenizer.apply_chat_template(told, return_dict=True)["input_ids"]
        begun = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row.ids[: row.learn_from] == begun


def test_the_saved_split_is_llama_3s(folder: Path) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = saved["pre_tokenizer"]["pretokenizers"]
    assert (split["type"], split["pattern"]["Regex"]) == ("Split", LLAMA3_SPLIT)
    assert (byte_level["type"], byte_level["use_regex"]) == ("ByteLevel", False)
    assert saved["model"]["ignore_merges"] is True
    assert saved["added_tokens"][0]["content"] == BOS


def test_the_converter_takes_it_for_llama_bpe(folder: Path) -> None:
    from hubforge.llama_cpp.pretokenizer import match_family

    family = match_family(folder)
    assert family is not None
    assert family.name == "llama-bpe"
