"""Converting a model folder: what comes out, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hubforge.errors import SourceError, StepError
from hubforge.llama_cpp.converter import convert
from hubforge.llama_cpp.header import read_header
from hubforge.llama_cpp.tree import Tree


def copy(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


def test_a_converted_model_says_what_it_is(tiny_gguf: dict[str, Path]) -> None:
    header = read_header(tiny_gguf["BF16"])
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.author": "someone",
        "general.license": "mit",
        "general.tags": ["tiny"],
        "tokenizer.ggml.pre": "llama-bpe",
    }
    assert {key: header.metadata.get(key) for key in expected} == expected
    assert header.count_types() == {"BF16": 9, "F32": 3}


def test_a_tokenizer_of_no_known_family_is_refused_with_its_regex(
    tiny_llama_256: Path, converter_tree: Tree, tmp_path: Path
) -> None:
    model = copy(tiny_llama_256, tmp_path / "model")
    described = json.loads((model / "tokenizer.json").read_text())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,9}|\s+|\p{L}+"
    (model / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(StepError, match=r"does not know how this tokenizer cuts text.*\\p\{N\}\{1,9\}"):
        convert(model, tmp_path / "x.gguf", tree=converter_tree, name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_code_that_comes_with_a_model_is_not_run(tiny_llama_256: Path, tmp_path: Path) -> None:
    model, sign = copy(tiny_llama_256, tmp_path / "model"), tmp_path / "it-ran"
    (model / "tokenization_evil.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(sign)!r}, 'w')\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "EvilTokenizer"
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    trusting = tmp_path / "tree"
    trusting.mkdir()
    (trusting / "convert_hf_to_gguf.py").write_text(
        "import sys\n"
        "def main():\n"
        "    from transformers import AutoTokenizer\n"
        "    AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    with pytest.raises(StepError, match="needs code that comes with it"):
        convert(model, tmp_path / "x.gguf", tree=Tree(trusting, "trusting", ""), name="x")
    assert not sign.exists()


def test_a_folder_without_safetensors_is_refused(tiny_llama_256: Path, converter_tree: Tree, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(SourceError, match=r"no config\.json"):
        convert(model, tmp_path / "x.gguf", tree=converter_tree, name="x")
    shutil.copy(tiny_llama_256 / "config.json", model)
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match="Pickled weights are not read"):
        convert(model, tmp_path / "x.gguf", tree=converter_tree, name="x")


def test_a_converter_that_fails_is_told_with_its_last_words(tiny_llama_256: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "convert_hf_to_gguf.py").write_text("def main():\n    raise ValueError('Can not map tensor x')\n")
    with pytest.raises(StepError, match=r"(?s)converter \(mine\) ended with exit code 1.*Can not map tensor x"):
        convert(tiny_llama_256, tmp_path / "x.gguf", tree=Tree(tree, "mine", ""), name="x")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("front", ["license: gpl-3.0", "license: gpl-3.0\ndate: 2026-13-45", "a: " + "[" * 9999])
def test_the_converter_sees_the_card_with_the_overrides(tiny_llama_256: Path, tmp_path: Path, front: str) -> None:
    model, tree = copy(tiny_llama_256, tmp_path / "model"), tmp_path / "tree"
    (model / "README.md").write_text(f"---\n{front}\n---\n# Title\n", encoding="utf-8")
    tree.mkdir()
    (tree / "convert_hf_to_gguf.py").write_text(
        "import sys\ndef main():\n    raise ValueError(open(sys.argv[1] + '/README.md').read())\n"
    )
    with pytest.raises(StepError, match=r"---\s+license: mit\s+---"):
        convert(model, tmp_path / "x.gguf", tree=Tree(tree, "mine", ""), name="x", card={"license": "mit"})


@pytest.mark.slow
def test_converting_twice_gives_the_same_bytes(
    tiny_llama_256: Path, converter_tree: Tree, tiny_gguf: dict[str, Path], tmp_path: Path
) -> None:
    model = copy(tiny_llama_256, tmp_path / "elsewhere")
    card, general = {"license": "mit", "tags": ["tiny"]}, {"author": "someone"}
    convert(model, tmp_path / "x.gguf", tree=converter_tree, name="tiny", card=card, general=general)
    assert (tmp_path / "x.gguf").read_bytes() == tiny_gguf["BF16"].read_bytes()
