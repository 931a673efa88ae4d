"""A GGUF gives the model's logits, text and tokens; and what goes wrong in its process is an error here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hubforge.errors import SourceError, StepError
from hubforge.llama_cpp.fidelity import STRINGS
from hubforge.llama_cpp.runtime import GgufModel

TEXT = 'The lantern keeper walked to the harbour. "Did you see 12345 lights?" asked Mara.\n'


@pytest.fixture(scope="module")
def gguf(tiny_gguf: dict[str, Path]) -> Iterator[GgufModel]:
    with GgufModel(tiny_gguf["BF16"], context=256) as model:
        yield model


@pytest.fixture(scope="module")
def reference(tiny_llama_256: Path) -> Any:
    import torch

    from hubforge.models import load_model

    return load_model(tiny_llama_256, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_256: Path) -> Any:
    from hubforge.models import load_tokenizer

    return load_tokenizer(tiny_llama_256)


def logits_of(reference: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return np.asarray(reference(torch.tensor([ids])).logits[0])


def test_logits_are_the_models_at_every_position(gguf: GgufModel, reference: Any) -> None:
    ids = gguf.tokenize(TEXT, add_bos=True)
    expected = logits_of(reference, ids)
    # ggml rounds activations to bf16 where weights are: .022 was seen on a Llama with logits of this size.
    np.testing.assert_allclose(gguf.logits(ids), expected, atol=0.03)
    assert expected.std() > 0.3


def test_a_row_of_logits_depends_on_nothing_after_it(gguf: GgufModel) -> None:
    ids = gguf.tokenize(TEXT)
    whole = gguf.logits(ids)
    np.testing.assert_array_equal(gguf.logits(ids, start=20), whole[20:])
    # A shorter batch is computed in other blocks, so its last bits may differ.
    np.testing.assert_allclose(gguf.logits(ids[:9]), whole[:9], atol=1e-3)


def test_greedy_generation_takes_the_likeliest_token_each_time(gguf: GgufModel) -> None:
    ids = gguf.tokenize("The old man", add_bos=True)
    made: list[int] = []
    for _ in range(12):
        made.append(int(gguf.logits(ids + made)[-1].argmax()))
    assert gguf.generate(ids, max_tokens=12) == gguf.detokenize(made)


def test_generation_ends_before_the_first_stop_string(gguf: GgufModel) -> None:
    ids = gguf.tokenize("The old man", add_bos=True)
    whole = gguf.generate(ids, max_tokens=20)
    stop = whole[5:8]
    assert gguf.generate(ids, max_tokens=20, stop=["not there", stop]) == whole[: whole.find(stop)]


def test_sampling_repeats_with_its_seed_and_differs_without(gguf: GgufModel) -> None:
    ids = gguf.tokenize("The", add_bos=True)
    one, again, other = (gguf.generate(ids, max_tokens=16, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_sampling_follows_the_distribution(gguf: GgufModel) -> None:
    ids = gguf.tokenize("The", add_bos=True)
    scaled = gguf.logits(ids)[-1].astype(np.float64) / 0.1
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    likeliest = int(p.argmax())
    drawn = [gguf.generate(ids, max_tokens=1, temperature=0.1, seed=seed) for seed in range(300)]
    share = drawn.count(gguf.detokenize([likeliest])) / len(drawn)
    assert share == pytest.approx(p[likeliest], abs=4 * (p[likeliest] * (1 - p[likeliest]) / 300) ** 0.5)
    assert 0.02 < p[likeliest] < 0.98


@pytest.mark.parametrize("text", STRINGS)
def test_tokens_are_the_tokenizers_and_go_back_to_the_text(gguf: GgufModel, tokenizer: Any, text: str) -> None:
    assert gguf.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert gguf.detokenize(gguf.tokenize(text)) == text


def test_special_tokens_are_read_and_shown_on_request(gguf: GgufModel, tokenizer: Any) -> None:
    assert gguf.tokenize("a<|eot_id|>") == [*gguf.tokenize("a"), gguf.eos_id]
    assert len(gguf.tokenize("<|eot_id|>", special=False)) > 1
    assert gguf.detokenize([gguf.eos_id or -1]) == ""
    assert gguf.detokenize([gguf.eos_id or -1], special=True) == "<|eot_id|>"


def test_it_knows_its_vocabulary_and_template(gguf: GgufModel, tokenizer: Any) -> None:
    assert gguf.vocab_size == len(tokenizer)
    assert (gguf.bos_id, gguf.eos_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert gguf.adds_bos
    assert gguf.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("ids", "message"),
    [([5] * 300, "300 tokens do not fit the context of 256"), ([5, 9999], "token 9999"), ([], "no tokens")],
)
def test_a_wrong_request_is_an_error_and_the_next_one_works(gguf: GgufModel, ids: list[int], message: str) -> None:
    with pytest.raises(StepError, match=message):
        gguf.logits(ids)
    assert gguf.logits([5]).shape == (1, gguf.vocab_size)


def test_generation_stops_where_the_context_ends(gguf: GgufModel) -> None:
    ids = gguf.tokenize("a " * 126)[:250]
    assert len(gguf.tokenize(gguf.generate(ids, max_tokens=100))) <= 6


def test_a_crash_of_the_library_is_an_error_with_the_signal(tiny_gguf: dict[str, Path]) -> None:
    with GgufModel(tiny_gguf["Q8_0"], context=64) as model:
        os.kill(model._process.pid, signal.SIGSEGV)
        with pytest.raises(StepError, match="ended with SIGSEGV"):
            model.logits([5])


def test_closing_ends_the_process_and_may_be_done_twice(tiny_gguf: dict[str, Path]) -> None:
    model = GgufModel(tiny_gguf["Q8_0"], context=64)
    model.close()
    model.close()
    assert model._process.poll() is not None
    with pytest.raises(StepError):
        model.tokenize("a")


def test_a_truncated_file_is_refused_before_any_process_starts(tiny_gguf: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf["BF16"].read_bytes()[:100_000])
    with pytest.raises(SourceError, match="ends at byte"):
        GgufModel(path)


def test_what_llama_cpp_finds_wrong_with_a_whole_file_is_told(tiny_gguf: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    path.write_bytes(tiny_gguf["BF16"].read_bytes().replace(b"llama", b"lamma"))
    with pytest.raises(StepError, match="unknown model architecture: 'lamma'"):
        GgufModel(path)


def test_llama_cpp_python_and_cyllama_agree(gguf: GgufModel, tiny_gguf: dict[str, Path]) -> None:
    pytest.importorskip("llama_cpp")
    ids = gguf.tokenize(TEXT)
    with (
        GgufModel(tiny_gguf["BF16"], context=256, library="llama_cpp") as one,
        GgufModel(tiny_gguf["BF16"], context=256, library="cyllama") as two,
    ):
        np.testing.assert_allclose(one.logits(ids), two.logits(ids), atol=1e-3)
        assert one.generate(ids, max_tokens=20) == two.generate(ids, max_tokens=20)
        assert one.tokenize(TEXT) == two.tokenize(TEXT)
