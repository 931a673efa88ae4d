"""Whole conversions of other families: each pre-tokenizer that is named by its regex, and Gemma 4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hubforge.llama_cpp.converter import convert
from hubforge.llama_cpp.fidelity import PASSAGES, check_tokens, measure
from hubforge.llama_cpp.header import read_header
from hubforge.llama_cpp.pretokenizer import FAMILIES
from hubforge.llama_cpp.runtime import GgufModel
from hubforge.llama_cpp.tree import Tree
from hubforge.models import load_model, load_tokenizer

pytestmark = pytest.mark.slow


def train(tokenizer: Any, texts: Iterable[str], size: int, special: list[str], **settings: Any) -> None:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, **settings)
    tokenizer.train_from_iterator(texts, trainer)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_tokenizer_of_ones_own_in_each_family_keeps_its_tokens(
    name: str, tiny_llama: Path, converter_tree: Tree, tmp_path: Path
) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    family = {one.name: one for one in FAMILIES}[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=family.ignore_merges))
    if family.split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(family.split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if "NFC" in family.normalizers:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    size = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    texts = [*PASSAGES, "1234 12345 2026 1999 3.14159 " * 20]  # Only learned numbers show how digits are cut.
    train(tokenizer, texts, size, ["<|endoftext|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer.save(str(model / "tokenizer.json"))
    # add_bos_token: llama.cpp would else start every prompt of Llama 3's family with BOS, which this one has not.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "add_bos_token": False}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    for stale in ("special_tokens_map.json", "chat_template.jinja"):
        (model / stale).unlink()
    assert convert(model, tmp_path / "x.gguf", tree=converter_tree, name="x") == name
    with GgufModel(tmp_path / "x.gguf", context=64) as gguf:
        assert check_tokens(load_tokenizer(model), gguf) > 20


def gemma_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer.json of Gemma's kind: spaces as ▁, bytes for what is not in the vocabulary, no regex to cut by."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    train(tokenizer, PASSAGES, size, ["<pad>", "<eos>", "<bos>", "<unk>", *bytes_], limit_alphabet=30)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [one for one in described["added_tokens"] if one["content"] not in bytes_]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    (folder / "special_tokens_map.json").unlink()


@pytest.mark.parametrize("fixture", ["tiny_gemma4", "tiny_gemma4_multimodal"])
def test_gemma_4_keeps_its_tokens_and_logits(
    fixture: str, request: pytest.FixtureRequest, converter_tree: Tree, tmp_path: Path
) -> None:
    import torch

    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    config = json.loads((folder / "config.json").read_text())
    gemma_tokenizer(folder, config.get("text_config", config)["vocab_size"])
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    # The towers' placeholders go where no text of ours does: to control characters.
    towers = [key for key in config if key.endswith("_token_id") and key not in ids]
    config |= ids | {key: 5 + at for at, key in enumerate(towers)}
    if "text_config" in config:
        config["text_config"] |= ids
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "x.gguf", tree=converter_tree, name="x", type_="F32")
    assert read_header(tmp_path / "x.gguf").metadata["general.architecture"] == "gemma4"
    with GgufModel(tmp_path / "x.gguf", context=256) as gguf:
        tokenizer = load_tokenizer(folder)
        check_tokens(tokenizer, gguf)
        distance = measure(load_model(folder, dtype=torch.float32), tokenizer, gguf)
        assert gguf.detokenize(gguf.tokenize(" a tale, told 日 ")) == " a tale, told 日 "
    assert distance.kl_mean < 1e-5
    assert distance.top1 > 0.99
