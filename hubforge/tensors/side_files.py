"""The files beside the weights: config, generation config, and every file of the tokenizer and processor.

They are copied byte for byte; only config.json is edited, as JSON, key by key. Transformers is never asked to write
one again: it renames fields, and then older readers fail.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hubforge.errors import SourceError
from hubforge.tensors.reader import read_json
from hubforge.tensors.writer import write_whole

_COPIED = re.compile(
    r"""generation_config\.json
    | tokenizer\.(json|model(\.v\w+)?) | tokenizer_config\.json | special_tokens_map\.json | added_tokens\.json
    | vocab\.(json|txt) | merges\.txt | spiece\.model | sentencepiece(\.bpe)?\.model | .*\.tiktoken | tekken\.json
    | chat_template\.(jinja|json) | additional_chat_templates/[\w.-]+\.jinja
    | (video_|image_)?preprocessor_config\.json | processor_config\.json
    | (LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(txt|md))?""",
    re.VERBOSE,
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


def tokenizer_missing(folder: Path) -> str:
    """Which tokenizer file a model folder lacks, or ""."""
    if not (folder / "tokenizer_config.json").is_file():
        return "tokenizer_config.json"
    has_pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    others = has_pair or (folder / "vocab.txt").is_file() or any(folder.glob("*.tiktoken"))
    if others or any((folder / name).is_file() for name in _VOCABULARIES):
        return ""
    return "tokenizer.json (or tokenizer.model, or vocab.json with merges.txt)"


def check_side_files(folder: Path) -> dict[str, Any]:
    """The config of a model folder; SourceError when it or a tokenizer file is missing."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise SourceError("is not a JSON object", where=str(folder / "config.json"))
    missing = tokenizer_missing(folder)
    if missing:
        mend = "The output would have no tokenizer. Fetch the file, or take a base that has it."
        raise SourceError(f"the tokenizer is incomplete: there is no {missing}", where=str(folder), mend=mend)
    return config


def copy_side_files(
    source: Path,
    out: Path,
    edit: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
    keeps: Callable[[str], bool] = lambda file: True,
) -> list[str]:
    """Copy what belongs to the model beside its weights from folder to folder; the names copied.

    edit: changes config.json; when it changes nothing, the file is copied byte for byte. keeps: whether a file goes
    along. README files, training leftovers, pickles and code are left behind.
    """
    before = check_side_files(source)
    after = edit(json.loads(json.dumps(before)))
    if after == before:
        content = (source / "config.json").read_bytes()
    else:
        content = (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    write_whole(out / "config.json", content)
    copied = ["config.json"]
    for path in sorted([*source.iterdir(), *source.glob("additional_chat_templates/*")]):
        name = path.relative_to(source).as_posix()
        if path.is_file() and _COPIED.fullmatch(name) and keeps(name):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)
            copied.append(name)
    return copied


def set_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with each `dtype` or `torch_dtype` that it has, also in its sub-configs, set to `dtype`."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            set_dtype(value, dtype)
    return config
