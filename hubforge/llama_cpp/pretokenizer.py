"""Which of llama.cpp's pre-tokenizers a tokenizer uses, told by its Split regex instead of by a list of known hashes.

llama.cpp writes the name of a pre-tokenizer into a GGUF and has its own code for each. Its converter recognises a
tokenizer by a hash of what it does to one long text, so one that was trained anew, even if it cuts text exactly as a
known family does, is unknown to it. Here the cut itself is compared, and nothing is guessed: the regex must be equal
to the family's letter by letter, and what surrounds it too. What it yields is then checked token by token (`fidelity`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Family:
    """A pre-tokenizer llama.cpp knows: its name in a GGUF, and the tokenizer.json that it stands for."""

    name: str
    split: str | None
    """The regex of Split; None: ByteLevel cuts by its own, that of GPT-2."""
    ignore_merges: bool
    """Whether a whole word is looked up before merging, as llama.cpp then does."""
    normalizers: tuple[str | None, ...] = (None,)


# From the tokenizer.json of the models named; llm_tokenizer_bpe and load() in llama.cpp's src/llama-vocab.cpp.
FAMILIES = (
    Family("llama-bpe", rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}", True),  # Llama 3
    Family(
        "qwen2", rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}", False, (None, "NFC")
    ),  # Qwen 2, 3
    Family("gpt-2", None, False),
)


def match_family(folder: Path) -> Family | None:
    """The family whose pre-tokenizer the folder's tokenizer.json has, exactly; None when there is none.

    None too when there is no tokenizer.json or it cannot be read: the converter then says what it thinks of it.
    """
    try:
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return next((family for family in FAMILIES if _fits(described, family)), None)
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def split_regex(folder: Path) -> str:
    """The regex that the folder's tokenizer.json cuts text by, for messages; "none" when there is none."""
    try:
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        found = [part["pattern"].get("Regex") for part in _parts(described) if part.get("type") == "Split"]
        return found[0] if found and isinstance(found[0], str) else "none"
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return "none"


def _parts(described: dict[str, Any]) -> list[dict[str, Any]]:
    pre = described.get("pre_tokenizer") or {}
    return list(pre.get("pretokenizers", [])) if pre.get("type") == "Sequence" else [pre]


def _fits(described: dict[str, Any], family: Family) -> bool:
    model, normalizer = described.get("model") or {}, described.get("normalizer")
    if model.get("type") != "BPE" or bool(model.get("ignore_merges")) != family.ignore_merges:
        return False
    if model.get("byte_fallback") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if (normalizer and normalizer.get("type")) not in family.normalizers:
        return False
    *before, byte_level = _parts(described)
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        return False
    if family.split is None:
        return not before and bool(byte_level.get("use_regex", True))
    split = {"type": "Split", "pattern": {"Regex": family.split}, "behavior": "Isolated", "invert": False}
    return before == [split] and not byte_level.get("use_regex", True)
