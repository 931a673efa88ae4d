"""A Transformers model folder -> an unquantized GGUF, by llama.cpp's own converter in a process of its own."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hubforge.errors import SourceError, StepError
from hubforge.front_matter import front_matter_in
from hubforge.llama_cpp.convert_driver import NAMED, UNKNOWN
from hubforge.llama_cpp.pretokenizer import match_family, split_regex
from hubforge.llama_cpp.process import run_module, written_whole
from hubforge.llama_cpp.tree import Tree

UNQUANTIZED = ("BF16", "F16", "F32")
_WRITTEN = re.compile(r"Writing:\s+(\d+)%")


def convert(
    model: Path,
    target: Path,
    *,
    tree: Tree,
    name: str,
    type_: str = "BF16",
    card: Mapping[str, Any] | None = None,
    general: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> str | None:
    """Write the model as a GGUF of that type to `target`, which appears whole or not at all.

    name: general.name, and what the converter takes the folder to be called. card: keys of a model card's front matter
    (license, base_model, tags ...) that override the model's own. general: further `general.*` keys, without prefix.
    Returns the name given to a pre-tokenizer the converter does not know, None when it knew it.
    Raises SourceError for a folder it cannot take, StepError when it fails.
    """
    _check_folder(model)
    family = match_family(model)
    lines: list[str] = []

    def read(line: str) -> None:
        if written := _WRITTEN.search(line):
            progress(int(written[1]) / 100)
        else:
            lines.append(line)

    with tempfile.TemporaryDirectory(prefix="hubforge-gguf-") as scratch:
        # The converter derives metadata from the folder's name, which for an artifact is its key, and takes some only
        # from the card: show it the model's files under `name`, with the card it should have.
        shown = Path(scratch) / name
        shown.mkdir()
        for path in model.iterdir():
            (shown / path.name).symlink_to(path.resolve())
        (shown / "README.md").unlink(missing_ok=True)
        (shown / "README.md").write_text(_card(model, card or {}), encoding="utf-8")
        overrides = Path(scratch) / "metadata.json"
        overrides.write_text(json.dumps(_general(general or {}, name)), encoding="utf-8")
        with written_whole(target) as unfinished:
            arguments = [str(shown), "--outtype", type_.lower(), "--outfile", str(unfinished)]
            arguments += ["--metadata", str(overrides)]
            asked = {"tree": str(tree.path), "pre": family and family.name, "arguments": arguments}
            try:
                run_module(
                    "hubforge.llama_cpp.convert_driver",
                    [json.dumps(asked)],
                    what=f"llama.cpp's converter ({tree.build})",
                    where=str(model),
                    on_line=read,
                )
            except StepError as error:
                if UNKNOWN in lines:
                    raise _unknown_pre_tokenizer(model, tree) from error
                raise
    return next((line.removeprefix(NAMED) for line in lines if line.startswith(NAMED)), None)


def _card(model: Path, overrides: Mapping[str, Any]) -> str:
    """The front matter of the model's README.md, if it has any that can be read, with the overrides."""
    import yaml

    front = {**front_matter_in(model), **overrides}
    return f"---\n{yaml.safe_dump(front, allow_unicode=True)}---\n" if front else ""


def _general(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    # gguf-py spells these two otherwise than the rest: source.url for source_url.
    return {f"general.{key.replace('source_', 'source.')}": value for key, value in keys.items()} | {
        "general.name": name
    }


def _check_folder(model: Path) -> None:
    if not (model / "config.json").is_file():
        raise SourceError("there is no config.json, so this is not a Transformers model", where=str(model))
    if not any(model.glob("model*.safetensors")):
        raise SourceError(
            "there are no model*.safetensors to convert",
            where=str(model),
            mend="Pickled weights are not read. Save the model anew with save_pretrained.",
        )


def _unknown_pre_tokenizer(model: Path, tree: Tree) -> StepError:
    return StepError(
        f"{tree.build} does not know how this tokenizer cuts text, and its Split regex is no known family's: "
        f"{split_regex(model)}",
        where=str(model / "tokenizer.json"),
        mend="Use a base model's tokenizer unchanged, train one with such a family's regex, "
        "or name a newer llama.cpp with --llama-cpp DIR.",
    )
