"""Did a reply follow its instructions? Each is decided by a short function; the same file serves as an lm-eval task.

It imports nothing of hubforge, since lm-eval runs a copy of it from the task's own folder. The shape follows
IFEval (Zhou et al. 2023, arXiv:2311.07911): a prompt carries several instructions; prompt level asks for all of them,
instruction level counts each; "loose" forgives a stray first or last line and asterisks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BULLET = re.compile(r"^\s*\* \S", re.MULTILINE)
TITLE = re.compile(r"<<[^<>\n]+>>")
SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"]|$)")


def words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes."""
    return re.findall(r"[\w']+", text)


def capitals(reply: str) -> bool:
    return reply.isupper()


def lowercase(reply: str) -> bool:
    return reply.islower()


def exact_words(reply: str, n: int) -> bool:
    return len(words(reply)) == n


def exact_sentences(reply: str, n: int) -> bool:
    return len(SENTENCE_END.findall(reply)) == n


def bullets(reply: str, n: int) -> bool:
    """Exactly n lines that begin with an asterisk and a space."""
    return len(BULLET.findall(reply)) == n


def include(reply: str, word: str) -> bool:
    return word.lower() in [found.lower() for found in words(reply)]


def avoid(reply: str, word: str) -> bool:
    return not include(reply, word)


def starts(reply: str, phrase: str) -> bool:
    return reply.strip().strip('"').lower().startswith(phrase.lower())


def ends(reply: str, phrase: str) -> bool:
    return reply.strip().strip('"').lower().endswith(phrase.lower())


def quoted(reply: str) -> bool:
    """The whole reply stands between two double quotation marks."""
    text = reply.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


def title(reply: str) -> bool:
    """A title in double angle brackets stands on the first line."""
    return TITLE.fullmatch(reply.strip().splitlines()[0].strip()) is not None


CHECKS: dict[str, Callable[..., bool]] = {
    "capitals": capitals,
    "lowercase": lowercase,
    "words": exact_words,
    "sentences": exact_sentences,
    "bullets": bullets,
    "include": include,
    "avoid": avoid,
    "starts": starts,
    "ends": ends,
    "quoted": quoted,
    "title": title,
}


def follows(reply: str, instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `reply` follows one instruction; an empty reply follows none."""
    return bool(reply.strip()) and CHECKS[instruction](reply, **arguments)


def forgiving(reply: str) -> list[str]:
    """The reply and its seven variants that the loose score accepts, as in IFEval."""
    lines = reply.split("\n")
    cuts = [reply, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return cuts + [cut.replace("*", "") for cut in cuts]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """lm-eval: the four scores of one document."""
    asked = list(zip(doc["instructions"], map(json.loads, doc["arguments"]), strict=True))
    strict = [follows(results[0], *one) for one in asked]
    loose = [any(follows(reply, *one) for reply in forgiving(results[0])) for one in asked]
    return {
        "prompt_level_strict_acc": all(strict),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": all(loose),
        "inst_level_loose_acc": loose,
    }


def share(items: Sequence[Sequence[bool]]) -> float:
    """lm-eval: the share of all instructions that were followed."""
    flat = [one for item in items for one in item]
    return sum(flat) / len(flat)


def held_out(**_: Any) -> dict[str, Any]:
    """lm-eval: the documents, read from the file beside this one, wherever the folder has been moved to."""
    from datasets import Dataset  # lm-eval asks for its columns by name.

    with (Path(__file__).parent / "held_out.jsonl").open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}
