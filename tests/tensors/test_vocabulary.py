"""Vocabularies brought to one: rows by the tokens' text, what stands in for a token that a model lacks, side files."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from hubforge.errors import SourceError, StepError
from hubforge.stages.linear import Linear
from hubforge.stages.task_arithmetic import TaskArithmetic
from hubforge.tensors.tokens import read_tokens

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def model(checkpoint_folder):
    """model(name, {token: value}): each token's embedding is [value, 10 * value], its head's row [-value, value]."""

    def write(name, rows, added=(), padding=0, offset=0, **config):
        values = torch.tensor([0.0] * offset + [float(value) for value in rows.values()] + [99.0] * padding)
        tensors = {
            EMBED: torch.stack([values, 10 * values], 1),
            HEAD: torch.stack([-values, values], 1),
            "model.norm.weight": torch.ones(2),
        }
        fields = {"model_type": "toy", "vocab_size": len(values)} | config
        folder = checkpoint_folder(name, tensors, config=fields)
        ids = {token: number for number, token in enumerate(rows, offset)}
        vocab = {token: number for token, number in ids.items() if token not in added}
        data = {
            "version": "1.0",
            "added_tokens": [{"id": ids[token], "content": token, "special": True} for token in added],
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]] if "ab" in ids else []},
        }
        (folder / "tokenizer.json").write_text(json.dumps(data))
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {}, "name": name}))
        (folder / "merges.txt").write_text(name)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids.get("<e>", 0)}))
        return folder

    return write


def values(folder, tensors_of, name=EMBED):
    return tensors_of(folder)[name][:, 0].tolist()


def test_base_keeps_its_tokens_and_maps_the_others_rows(model, context, run_op, tensors_of):
    one = model("one", {"<e>": 1, "a": 2, "b": 3, "only": 4}, padding=2)
    two = model("two", {"b": 30, "x": 40, "a": 20, "<e>": 10})
    ctx = context(m=("model", one), o=("model", two))
    run_op(Linear(models=["m", "o"], tokenizer="base"), ctx)
    # `only` and the padding are the base's in both; x is gone.
    assert values(ctx.out, tensors_of) == [5.5, 11.0, 16.5, 4.0, 99.0, 99.0]
    assert tensors_of(ctx.out)[HEAD][:, 0].tolist() == [-5.5, -11.0, -16.5, -4.0, -99.0, -99.0]
    for file in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "config.json", "generation_config.json"):
        assert (ctx.out / file).read_bytes() == (one / file).read_bytes()


def test_union_appends_what_only_others_have(model, context, run_op, tensors_of):
    one = model("one", {"<e>": 1, "a": 2, "b": 3}, added=["<e>"])
    two = model("two", {"b": 30, "ab": 40, "a": 20, "<new>": 50}, added=["<new>"])
    ctx = context(m=("model", one), o=("model", two))
    run_op(Linear(models=["m", "o"], tokenizer="union"), ctx)
    # Of what only one has, both have its row: the mean is that row.
    assert values(ctx.out, tensors_of) == [1.0, 11.0, 16.5, 40.0, 50.0]
    assert json.loads((ctx.out / "config.json").read_text())["vocab_size"] == 5
    tokenizer = json.loads((ctx.out / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"] == {"a": 1, "b": 2, "ab": 3}
    assert tokenizer["model"]["merges"] == [["a", "b"]]
    assert tokenizer["added_tokens"][1] == {"id": 4, "content": "<new>", "special": True}
    decoder = json.loads((ctx.out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["4"] == {"content": "<new>", "special": True}
    assert not (ctx.out / "merges.txt").exists()  # It would lack what was added.


@pytest.mark.parametrize(("new_tokens", "expected"), [("average", 60.0), ("zero", 40.0)])
def test_a_token_that_the_base_lacks(new_tokens, expected, model, context, run_op, tensors_of):
    one, two, three = model("one", {"a": 1}), model("two", {"x": 40, "a": 1}), model("three", {"a": 1, "x": 80})
    ctx = context(m=("model", one), o=("model", two), p=("model", three))
    run_op(Linear(models=["m", "o", "p"], tokenizer="union", new_tokens=new_tokens), ctx)
    assert values(ctx.out, tensors_of) == [1.0, pytest.approx(expected)]


def test_a_task_vector_is_zero_for_a_token_that_the_model_lacks(model, context, run_op, tensors_of):
    one, two = model("one", {"a": 1, "b": 2}), model("two", {"b": 5})
    ctx = context(m=("model", one), o=("model", two))
    run_op(TaskArithmetic(model="m", models=["o"], scale=10.0, tokenizer="base"), ctx)
    assert values(ctx.out, tensors_of) == [1.0, 32.0]


def test_the_tokenizer_of_a_named_model_that_is_not_merged(model, context, run_op, tensors_of):
    one = model("one", {"<e>": 1, "a": 2, "b": 3}, eos_token_id=0)
    two = model("two", {"a": 4, "<e>": 3, "b": 5})
    lender = model("lender", {"q": 7, "b": 8, "<e>": 9}, padding=1, eos_token_id=2)
    ctx = context(m=("model", one), o=("model", two), t=("model", lender))
    run_op(Linear(models=["m", "o"], tokenizer="t"), ctx)
    assert values(ctx.out, tensors_of) == [7.0, 4.0, 2.0, 99.0]
    assert (ctx.out / "tokenizer.json").read_bytes() == (lender / "tokenizer.json").read_bytes()
    config = json.loads((ctx.out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (4, 2)
    assert json.loads((ctx.out / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_rows_of_single_tokens_and_padding(model, context, run_op, tensors_of):
    one, two = model("one", {"a": 1, "b": 2}), model("two", {"a": 3, "b": 6, "c": 8})
    ctx = context(m=("model", one), o=("model", two))
    tokens = {"a": {"model": "o", "token": "c", "force": True}, "<t>": {"model": "o", "token_id": 1}, "<z>": {}}
    op = Linear(models=["m", "o"], tokenizer="base", tokens=tokens, pad_to_multiple_of=8)
    run_op(op, ctx)
    # b: (2 + 6) / 2; three rows of padding are each model's mean row: (8 + 2 + 6 + 0) / 4 and (8 + 6 + 6 + 0) / 4.
    assert values(ctx.out, tensors_of) == [8.0, 4.0, 6.0, 0.0, 4.5, 4.5, 4.5, 4.5]
    added = json.loads((ctx.out / "tokenizer.json").read_text())["added_tokens"]
    assert [(entry["content"], entry["id"]) for entry in added] == [("<t>", 2), ("<z>", 3)]


def test_wrong_tokens(model, context, run_op):
    one, two = model("one", {"a": 1}), model("two", {"a": 3})
    ctx = context(m=("model", one), o=("model", two))
    with pytest.raises(StepError, match="'<t>' is to have the row of token 'nope' of o, which has none"):
        run_op(Linear(models=["m", "o"], tokenizer="base", tokens={"<t>": {"model": "o", "token": "nope"}}), ctx)
    (two / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"o has no tokenizer.json"):
        run_op(Linear(models=["m", "o"], tokenizer="union"), ctx)
    with pytest.raises(ValueError, match="need a tokenizer"):
        Linear(models=["m", "o"], tokens={"<t>": {}})


def test_a_unigram_tokenizer_takes_what_is_new_as_added_tokens(model, context, run_op, tensors_of):
    folders = {"m": model("one", {"a": 1, "b": 2}), "o": model("two", {"b": 3, "c": 4})}
    for folder, pieces in zip(folders.values(), ("ab", "bc"), strict=True):
        vocab = [[piece, -1.0] for piece in pieces]
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": vocab}}))
    ctx = context(**{name: ("model", folder) for name, folder in folders.items()})
    run_op(Linear(models=["m", "o"], tokenizer="union"), ctx)
    assert values(ctx.out, tensors_of) == [1.0, 2.5, 4.0]
    made = json.loads((ctx.out / "tokenizer.json").read_text())
    assert [piece for piece, _ in made["model"]["vocab"]] == ["a", "b"]  # Its ids are places: c's is behind them.
    assert [(entry["content"], entry["id"], entry["special"]) for entry in made["added_tokens"]] == [("c", 2, False)]


def test_a_table_for_each_layer_s_embeddings_moves_too(checkpoint_folder, context, run_op, tensors_of):
    folders = {}
    for name, tokens in {"m": "ab", "o": "ba"}.items():
        rows = torch.tensor([[float(ord(token))] for token in tokens])
        tensors = {"model.embed_tokens.weight": rows, "model.embed_tokens_per_layer.weight": 2 * rows}
        config = {"model_type": "toy", "text_config": {"vocab_size": 2, "vocab_size_per_layer_input": 2}}
        folders[name] = checkpoint_folder(name, tensors, config=config)
        vocab = {token: number for number, token in enumerate(tokens)}
        (folders[name] / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    ctx = context(**{name: ("model", folder) for name, folder in folders.items()})
    run_op(Linear(models=["m", "o"], tokenizer="base", tokens={"z": {"model": "o", "token": "b"}}), ctx)
    assert values(ctx.out, tensors_of, "model.embed_tokens_per_layer.weight") == [194.0, 196.0, 196.0]
    config = json.loads((ctx.out / "config.json").read_text())
    assert config["text_config"] == {"vocab_size": 3, "vocab_size_per_layer_input": 3}


def test_real_tokenizers_united(tiny_llama, context, run_op, tmp_path):
    """What Transformers makes of the output: the base's text as before, the new tokens whole, tables of its length."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hubforge.lab.tiny import tiny_llama as build

    other = build(tmp_path / "other", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(other)
    before = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<|think|>"], special_tokens=True)
    tokenizer.add_tokens(["zebra"])
    grown = AutoModelForCausalLM.from_pretrained(other, dtype=torch.bfloat16)
    grown.resize_token_embeddings(len(tokenizer))
    shutil.rmtree(other)
    grown.save_pretrained(other)
    tokenizer.save_pretrained(other)
    ctx = context(m=("model", tiny_llama), o=("model", other))
    run_op(Linear(models=["m", "o"], tokenizer="union"), ctx)
    made, model = AutoTokenizer.from_pretrained(ctx.out), AutoModelForCausalLM.from_pretrained(ctx.out)
    text = "The lantern keeper walked, and it's done."
    assert made(text)["input_ids"] == before(text)["input_ids"]
    ids = made("<|think|>a zebra")["input_ids"]
    assert {made.convert_tokens_to_ids("<|think|>"), made.convert_tokens_to_ids("zebra")} <= set(ids)
    assert "<|think|>" not in made.decode(ids, skip_special_tokens=True)
    assert model.config.vocab_size == len(made) == model.lm_head.weight.shape[0]
    think = made.convert_tokens_to_ids("<|think|>")
    assert torch.equal(
        model.get_input_embeddings().weight[think],
        grown.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<|think|>")],
    )


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("tokenizer.model", "Make it of tokenizer.model, .*\n  pip install transformers sentencepiece protobuf\n"),
        ("qwen.tiktoken", "Make it of qwen.tiktoken, .*\n  pip install transformers tiktoken\n"),
        ("merges.txt", "Make it of the tokenizer's files, .*\n  pip install transformers\n"),
    ],
)
def test_without_tokenizer_json_the_command_that_makes_one_is_named(file, command, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text("")
    with pytest.raises(SourceError, match=command) as caught:
        read_tokens(tmp_path, "old")
    assert "from transformers import AutoTokenizer as T; T.from_pretrained('.').backend_tok" in str(caught.value)


def test_that_command_makes_one(tmp_path):
    """Of the files of a byte-level BPE, which need no further package."""
    from tokenizers import ByteLevelBPETokenizer

    ByteLevelBPETokenizer({"a": 0, "b": 1, "ab": 2}, [("a", "b")]).save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SourceError) as caught:
        read_tokens(tmp_path, "old")
    command = str(caught.value).splitlines()[-1].strip()
    subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert read_tokens(tmp_path, "old").ids.items() >= {"a": 0, "b": 1, "ab": 2}.items()
