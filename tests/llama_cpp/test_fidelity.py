"""The gate after a conversion: what it measures by hand, and that each kind of damage fails it by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hubforge.errors import StepError
from hubforge.llama_cpp.fidelity import (
    PASSAGES,
    STRINGS,
    Distance,
    check_distance,
    check_tokens,
    kl_divergence,
    measure,
)
from hubforge.llama_cpp.runtime import GgufModel
from hubforge.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def gguf(tiny_gguf: dict[str, Path]) -> Iterator[GgufModel]:
    with GgufModel(tiny_gguf["BF16"], context=256) as model:
        yield model


def test_kl_of_a_coin_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3. A shift of all logits changes nothing.
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]) + 7
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    np.testing.assert_allclose(kl_divergence(p, q), [expected], rtol=1e-12)
    np.testing.assert_allclose(kl_divergence(p, p + 3), [0.0], atol=1e-15)


def test_all_strings_and_special_tokens_are_checked(gguf: GgufModel, tiny_llama_256: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_256)
    built_in = check_tokens(tokenizer, gguf)
    assert built_in >= len(STRINGS) + len(PASSAGES) + len(tokenizer.all_special_tokens) + 1
    assert check_tokens(tokenizer, gguf, ["the lab's own text"]) == built_in + 1


def merge_in_another_order(described: dict[str, Any]) -> None:
    described["model"]["merges"].reverse()


def swap_two_tokens(described: dict[str, Any]) -> None:
    vocabulary = described["model"]["vocab"]
    vocabulary["e"], vocabulary["l"] = vocabulary["l"], vocabulary["e"]


def cut_punctuation_otherwise(described: dict[str, Any]) -> None:
    pattern = described["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{L}+")


def start_without_bos(described: dict[str, Any]) -> None:
    described["post_processor"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (merge_in_another_order, "token parity: the GGUF reads"),
        (swap_two_tokens, "token parity: the GGUF reads 'Hello, world!' as other tokens"),
        (cut_punctuation_otherwise, "token parity: the GGUF reads"),
        (start_without_bos, "does not start a prompt with BOS, the GGUF does"),
    ],
)
def test_an_altered_tokenizer_fails_token_parity(
    gguf: GgufModel, tiny_llama_256: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_256, model)
    described = json.loads((model / "tokenizer.json").read_text())
    change(described)
    (model / "tokenizer.json").write_text(json.dumps(described))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("add_bos_token", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(StepError, match=message):
        check_tokens(load_tokenizer(model), gguf)


def test_another_chat_template_fails_by_name(gguf: GgufModel, tiny_llama_256: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_256)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(StepError, match="chat template: the GGUF's is not the model's"):
        check_tokens(tokenizer, gguf)


def test_other_weights_fail_the_limit_by_name(
    gguf: GgufModel, tiny_llama_256: Path, tmp_path: Path, tiny_gguf: dict[str, Path]
) -> None:
    import torch

    model = load_model(tiny_llama_256, dtype=torch.float32)
    tokenizer = load_tokenizer(tiny_llama_256)
    good = measure(model, tokenizer, gguf, ["A short passage."])
    check_distance(good, 0.01, gguf.path)
    with torch.no_grad():  # As if q and k had been permuted for another rotary layout.
        query = model.model.layers[0].self_attn.q_proj.weight
        query.copy_(query.flip(0))
        model.model.layers[0].mlp.down_proj.weight.neg_()
    bad = measure(model, tokenizer, gguf, ["A short passage."])
    with pytest.raises(StepError, match=rf"logits: the mean KL divergence from the model is .* over {bad.positions}"):
        check_distance(bad, 0.01, gguf.path)


def test_a_divergence_that_is_no_number_fails() -> None:
    with pytest.raises(StepError, match="is nan"):
        check_distance(Distance(math.nan, math.nan, 0.0, 1), 1.0, Path("x.gguf"))


def test_only_as_much_of_a_passage_is_read_as_the_model_has_room_for(gguf: GgufModel, tiny_llama_256: Path) -> None:
    import torch

    model, tokenizer = load_model(tiny_llama_256, dtype=torch.float32), load_tokenizer(tiny_llama_256)
    assert measure(model, tokenizer, gguf, ["word " * 2000, "two words"]).positions == 256 + len(
        tokenizer("two words")["input_ids"]
    )
