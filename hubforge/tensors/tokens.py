"""What a tokenizer.json says of tokens and their ids, and the same file with the tokens of others added.

Only tokenizer.json is read: of all the formats it alone holds vocabulary, merges and added tokens together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from hubforge.errors import SourceError
from hubforge.tensors.reader import read_json

FILE = "tokenizer.json"
# Files that say the same in another way, and would be wrong once tokens were added.
SUPERSEDED = frozenset(
    {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"}
    | {"added_tokens.json", "tekken.json"}
)
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclass(frozen=True)
class Tokens:
    """A tokenizer's tokens by their ids, and those that were added to its vocabulary, with their settings."""

    file: Path
    data: Mapping[str, Any]  # tokenizer.json, as it is
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @property
    def end(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def read_tokens(folder: Path, name: str) -> Tokens:
    """The tokens of a model's folder; SourceError when there is no tokenizer.json, or one of no known form."""
    file = folder / FILE
    if not file.is_file():
        raise SourceError(f"{name} has no {FILE}", where=str(folder), mend=_how_to_make_one(folder))
    data = read_json(file)
    model = data.get("model") if isinstance(data, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list) and all(
        isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab
    ):  # Unigram
        ids = {entry[0]: number for number, entry in enumerate(vocab)}
    elif isinstance(vocab, dict):
        ids = dict(vocab)
    else:
        raise SourceError("has no vocabulary", where=str(file))
    entries = data.get("added_tokens") or []
    try:
        added = {entry["content"]: entry for entry in entries}
        ids |= {content: entry["id"] for content, entry in added.items()}
    except (TypeError, KeyError) as error:
        raise SourceError(f"has an added token without {error}", where=str(file)) from error
    if not all(
        isinstance(token, str) and type(number) is int and 0 <= number < 1 << 31 for token, number in ids.items()
    ):
        raise SourceError("has a token whose id is not a number", where=str(file))
    return Tokens(file, data, ids, added)


def require_same(one: Path, other: Path, mend: str) -> list[str] | None:
    """SourceError when two models' folders give tokens different numbers; the added tokens that differ, as text.

    Added tokens may: instruct models rename reserved ones for their chat turns. None without a tokenizer.json in both:
    there is nothing to compare then.
    """
    if not all((folder / FILE).is_file() for folder in (one, other)):
        return None
    found = [read_tokens(folder, str(folder)) for folder in (one, other)]
    # Some tokenizers list the added tokens in the vocabulary too; there they may differ.
    mine, theirs = ({token: n for token, n in each.ids.items() if token not in each.added} for each in found)
    differing = [token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)]
    if differing:
        token = min(differing, key=lambda token: (min(mine.get(token, 1 << 60), theirs.get(token, 1 << 60)), token))
        what = (
            f"another tokenizer than {one / FILE}: {len(differing)} tokens differ, the first {token!r} "
            f"({_number(mine.get(token))} there, {_number(theirs.get(token))} here)"
        )
        raise SourceError(what, where=str(other / FILE), mend=mend)
    ours, others = ({each.ids[token]: token for token in each.added} for each in found)
    numbers = sorted(number for number in ours.keys() & others.keys() if ours[number] != others[number])
    return [f"{number}: {ours[number]!r} and {others[number]!r}" for number in numbers]


def _number(token_id: int | None) -> str:
    return "absent" if token_id is None else f"number {token_id}"


def _how_to_make_one(folder: Path) -> str:
    """The commands that make tokenizer.json of the files that are there.

    They are not run here: what they write differs between versions of Transformers, and no key holds that version.
    """
    held = {path.suffix: path.name for path in sorted(folder.iterdir()) if path.is_file()}
    needs, of = "", "the tokenizer's files"
    for suffix, packages in ((".tiktoken", " tiktoken"), (".model", " sentencepiece protobuf")):
        if suffix in held:
            needs, of = packages, held[suffix]
    made = f"T.from_pretrained('.').backend_tokenizer.save('{FILE}')"
    return (
        f"Vocabularies are matched by {FILE}. Make it of {of}, in the folder or a copy of it that is then a source:\n"
        f"  pip install transformers{needs}\n"
        f'  python -c "from transformers import AutoTokenizer as T; {made}"'
    )


def united(base: Tokens, others: Sequence[Tokens], more: Sequence[str] = ()) -> Tokens:
    """The base's tokenizer with every token that only others have, numbered from the base's end; base ids stay.

    What the others had added (special tokens among them) is added, with the same settings; what was in their
    vocabularies joins the base's, and the merges of a BPE that make it follow the base's own merges. more: tokens that
    no tokenizer needs to have.
    """
    data = json.loads(json.dumps(base.data))
    model, added = data["model"], data.setdefault("added_tokens", [])
    ids, known, numbers = dict(base.ids), set(base.ids), count(base.end)
    is_bpe = isinstance(model.get("merges"), list)

    def add(token: str, settings: Mapping[str, Any]) -> None:
        ids[token] = next(numbers)
        added.append({"id": ids[token], "content": token} | {key: settings[key] for key in _PLAIN if key in settings})

    for other in others:
        new = sorted((number, token) for token, number in other.ids.items() if token not in ids)
        for _, token in new:
            if token in other.added or not isinstance(model["vocab"], dict):
                add(token, other.added.get(token, _PLAIN))
            else:
                ids[token] = model["vocab"][token] = next(numbers)
        if is_bpe:
            model["merges"] += _merges(model, other.data.get("model") or {}, known, ids)
        known |= {token for _, token in new}
    for token in more:
        if token not in ids:
            add(token, _PLAIN)
    return Tokens(base.file, data, ids, {entry["content"]: entry for entry in added})


def _merges(model: Mapping[str, Any], other: Mapping[str, Any], known: set[str], ids: Mapping[str, int]) -> list[Any]:
    """The other's merges that make tokens which were not known, in the form of the first's."""
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    found = []
    for merge in other.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else list(merge)
        whole = "".join(pair)
        if len(pair) == 2 and whole in ids and whole not in known and all(part in ids for part in pair):
            found.append(" ".join(pair) if as_text else pair)
    return found
