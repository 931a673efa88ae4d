"""Load what a step computes with: a model, its tokenizer, and the rows of a dataset. From local folders only.

Nothing here runs code that came with a checkpoint, and nothing is downloaded: sources were fetched before.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hubforge.errors import SourceError
from hubforge.rows import listing, rows, some, texts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_model", "load_tokenizer", "read_config", "rows", "texts"]

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Any one of these, with what belongs to it, is a vocabulary.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json as it is on disk; SourceError when it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(
            "there is no config.json, so this is not a Transformers model", where=str(folder), mend=listing(folder)
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"config.json cannot be read: {error}", where=str(folder)) from error
    if not isinstance(config, dict):
        raise SourceError("config.json is not a JSON object", where=str(folder))
    return config


def load_model(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: Path | None = None,
    spread: bool = False,
) -> PreTrainedModel:
    """The causal language model in `folder`, in eval mode on `device`.

    dtype: of its weights; None keeps the checkpoint's. adapter: a PEFT folder to put on top, unmerged.
    spread: shard it evenly over all GPUs by accelerate's device map.
    A checkpoint of another class loads as random weights with only a log line, so every weight of the model must have
    been in the checkpoint, and every weight of the adapter must have found its place.
    """
    config = read_config(folder)
    _check_model_type(config, folder)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise SourceError(f"none of {', '.join(_WEIGHTS)} is there", where=str(folder), mend=listing(folder))
    from transformers import AutoModelForCausalLM

    with _quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **({"device_map": "balanced" if spread else {"": device}} if spread or "cuda" in device else {}),
                ignore_mismatched_sizes=True,  # Not ignored: named below, where Transformers points at its own log.
            )
        except MemoryError:
            raise
        except Exception as error:  # Whatever Transformers finds wrong with the folder, in its many ways.
            _name_damaged_shard(folder)
            raise SourceError(f"the model cannot be loaded: {_first_line(error)}", where=str(folder)) from error
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        rest = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise SourceError(
            f"{name} has shape {tuple(found)}, but config.json makes it {tuple(expected)}{rest}", where=str(folder)
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(
            f"the checkpoint lacks {some(missing)} of {type(model).__name__}, which would be random",
            where=str(folder),
            mend=f"config.json says model_type {config['model_type']!r}; do its tensor names fit that class?",
        )
    if adapter is not None:
        model = _put_on(model, adapter)
    placed = model if spread else model.to(device)
    return cast("PreTrainedModel", placed.eval())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; SourceError naming the file when there is none or it cannot be read."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise SourceError("tokenizer.json is missing", where=str(folder), mend=listing(folder))
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # As for the model: any way in which the files are wrong.
            raise SourceError(f"the tokenizer cannot be loaded: {_first_line(error)}", where=str(folder)) from error
    if len(tokenizer) == 0:
        raise SourceError("the tokenizer has no tokens: its vocabulary file is missing or empty", where=str(folder))
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_model_type(config: dict[str, Any], folder: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if not model_type:
        raise SourceError("config.json names no model_type", where=str(folder))
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if "auto_map" in config:
        raise SourceError(
            f"model_type {model_type!r} needs code from the checkpoint ({', '.join(config['auto_map'])})",
            where=str(folder),
            mend="hubforge never runs code that comes with a model. Use a checkpoint that Transformers knows.",
        )
    if model_type in CONFIG_MAPPING_NAMES:
        raise SourceError(f"model_type {model_type!r} is not a causal language model", where=str(folder))
    import transformers

    close = difflib.get_close_matches(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1)
    raise SourceError(
        f"Transformers {transformers.__version__} does not know the model_type {model_type!r}",
        where=str(folder),
        mend=f"Did you mean {close[0]!r}?" if close else "A newer Transformers may.",
    )


def _name_damaged_shard(folder: Path) -> None:
    """SourceError naming the first safetensors file that is missing or whose header does not fit its bytes."""
    from safetensors import SafetensorError, safe_open

    shards = set(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards |= {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise SourceError(f"the index has no weight_map: {_first_line(error)}", where=str(index)) from error
    for shard in sorted(shards):
        try:
            with safe_open(shard, framework="pt"):
                pass
        except FileNotFoundError as error:
            raise SourceError("the shard is missing", where=str(shard)) from error
        except (OSError, SafetensorError) as error:
            raise SourceError(f"the file is damaged: {error}", where=str(shard)) from error


def _put_on(model: Any, adapter: Path) -> Any:
    """The model with the adapter on it; SourceError unless their weights pair off exactly."""
    if not (adapter / "adapter_config.json").is_file():
        raise SourceError(
            "there is no adapter_config.json, so this is not a PEFT adapter",
            where=str(adapter),
            mend=listing(adapter),
        )
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    with _quiet():
        try:
            offered = load_peft_weights(str(adapter), device="cpu", local_files_only=True)
            adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True)
            wanted = get_peft_model_state_dict(adapted)
        except MemoryError:
            raise
        except Exception as error:  # PEFT raises what it likes: size mismatches, unknown kinds, no target found.
            raise SourceError(
                f"the adapter does not go on this model: {_first_line(error)}",
                where=str(adapter),
                mend=f"It was made for {_base_of(adapter)!r}.",
            ) from error
    # PEFT ignores what it cannot place and leaves at its initial value what it does not find: neither may happen.
    strangers, absent = sorted(offered.keys() - wanted.keys()), sorted(wanted.keys() - offered.keys())
    if strangers or absent:
        what = [f"{some(strangers)} of the adapter match nothing in the model"] if strangers else []
        what += [f"{some(absent)} are not in the adapter"] if absent else []
        raise SourceError("; ".join(what), where=str(adapter), mend=f"It was made for {_base_of(adapter)!r}.")
    return adapted


def _base_of(adapter: Path) -> str:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return str(config.get("base_model_name_or_path", "an unnamed base"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Transformers' progress bars and reports off the terminal; what they say is checked by the caller."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
