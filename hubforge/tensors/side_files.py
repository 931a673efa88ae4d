"""The files beside the weights: config, generation config, and every file of the tokenizer and processor.

They are copied byte for byte; only config.json is edited, as JSON, key by key. Transformers is never asked to write
one again: it renames fields, and then older readers fail.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hubforge.errors import SourceError
from hubforge.tensors.chat_template import FILE as TEMPLATE
from hubforge.tensors.reader import read_json
from hubforge.tensors.tokens import SUPERSEDED
from hubforge.tensors.vocabulary import Vocabulary
from hubforge.tensors.writer import write_whole

_OF_TOKENIZER = re.compile(
    r"""tokenizer\.(json|model(\.v\w+)?) | tokenizer_config\.json | special_tokens_map\.json | added_tokens\.json
    | vocab\.(json|txt) | merges\.txt | spiece\.model | sentencepiece(\.bpe)?\.model | .*\.tiktoken | tekken\.json
    | chat_template\.(jinja|json) | additional_chat_templates/[\w.-]+\.jinja""",
    re.VERBOSE,
)
_OF_MODEL = re.compile(
    r"""generation_config\.json | (video_|image_)?preprocessor_config\.json | processor_config\.json
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
    if not (folder / "config.json").is_file():
        mend = "A model's folder has it beside the weights. Fetch the whole repository again."
        raise SourceError("there is no config.json", where=str(folder), mend=mend)
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
    vocabulary: Vocabulary | None = None,
    template: str | None = None,
) -> list[str]:
    """Copy what belongs to the model beside its weights from folder to folder; the names copied.

    edit: changes config.json; when it changes nothing, the file is copied byte for byte. keeps: whether a file goes
    along. vocabulary: whose tokenizer the output has, if not simply the source's. template: the chat template, in place
    of all that are there. README files, training leftovers, pickles and code are left behind.
    """
    check_side_files(source)
    lender = vocabulary.tokens.file.parent if vocabulary else source
    _write_json(source / "config.json", out, lambda config: edit(_renumbered(config, vocabulary, "config.json")))
    copied = ["config.json"]
    for folder, pattern in ((source, _OF_MODEL), (lender, _OF_TOKENIZER)):
        for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or not pattern.fullmatch(name) or not keeps(name):
                continue
            if (vocabulary and vocabulary.changed and _is_superseded(name)) or (template and "chat_template" in name):
                continue
            copied.append(name)
            edited = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
            if (vocabulary or template) and name in edited:
                _write_json(path, out, partial(_of_output, name=name, vocabulary=vocabulary, template=template))
            else:
                (out / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, out / name)
    if template:
        write_whole(out / TEMPLATE, template.encode("utf-8"))
        copied.append(TEMPLATE)
    return copied


def _write_json(path: Path, out: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The file as edited; byte for byte where nothing changes."""
    before = read_json(path)
    if not isinstance(before, dict):
        raise SourceError("is not a JSON object", where=str(path))
    after = edit(json.loads(json.dumps(before)))
    content = (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    write_whole(out / path.name, path.read_bytes() if after == before else content)


def _of_output(
    data: dict[str, Any], *, name: str, vocabulary: Vocabulary | None, template: str | None
) -> dict[str, Any]:
    """A file of the tokenizer, or generation_config.json, as the output's tokens and its chat template want it."""
    if template and name == "tokenizer_config.json" and "chat_template" in data:
        data["chat_template"] = template  # Readers that do not know chat_template.jinja look here.
    return data if vocabulary is None else _of_vocabulary(data, vocabulary, name)


def _of_vocabulary(data: dict[str, Any], vocabulary: Vocabulary, name: str) -> dict[str, Any]:
    if name == "generation_config.json":
        return _renumbered(data, vocabulary, name)
    if not vocabulary.changed:
        return data
    if name == "tokenizer.json":
        return dict(vocabulary.tokens.data)
    if isinstance(decoder := data.get("added_tokens_decoder"), dict):
        for entry in vocabulary.tokens.data["added_tokens"]:
            decoder.setdefault(str(entry["id"]), {key: value for key, value in entry.items() if key != "id"})
    return data


def _renumbered(config: dict[str, Any], vocabulary: Vocabulary | None, name: str) -> dict[str, Any]:
    if vocabulary is None:
        return config
    theirs = vocabulary.tokens.file.parent / name
    return vocabulary.renumbered(config, read_json(theirs) if theirs.is_file() else {})


def _is_superseded(name: str) -> bool:
    return name in SUPERSEDED or name.endswith(".tiktoken") or name.startswith("tokenizer.model")


def set_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with each `dtype` or `torch_dtype` that it has, also in its sub-configs, set to `dtype`."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            set_dtype(value, dtype)
    return config
