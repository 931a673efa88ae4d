"""The rows of a dataset, and what they say as token ids. Files only: nothing is downloaded or cached elsewhere."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMATS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".txt")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # As ShareGPT files say it.
_BLANK = 1_000_000  # a few kilobytes of gzip can hold lines for hours
_REST = "\0"  # Where csv puts the fields of a line that has more of them than the header.
_ANSWERS = ("completion", "response", "output", "answer")


def rows(
    artifact_path: Path,
    *,
    columns: Sequence[str] = (),
    limit: int | None = None,
    files: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a dataset: one dict per line, record or table row, in the order of the sorted file names.

    artifact_path: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt with one text per line; all but parquet also .gz)
    or a folder of them. A folder is read in one format, the first it has of parquet, jsonl, csv, tsv, json, txt; and
    where it has files whose name begins with `train`, only those are read.
    files: paths inside the folder to keep to, as an `Artifact` lists them. columns: must be in every row.
    limit: stop after that many rows.
    """
    found: list[dict[str, Any]] = []
    for path in _data_files(artifact_path, files):
        for row in _read(path):
            _need(row, columns, f"{path} row {len(found) + 1}")
            found.append(row)
            if limit is not None and len(found) >= limit:
                return found
    if not found:
        raise SourceError("the dataset has no rows", where=str(artifact_path))
    return found


def texts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str | None = None,
    chat_template: bool | None = None,
    add_generation_prompt: bool = False,
    names: Sequence[str] = (),
) -> list[list[int]]:
    """The token ids of each row, special tokens included, not truncated.

    column: the one that holds the text (a string) or the conversation (a list of messages). None: `messages` or
    `conversations`; else `prompt` or `instruction` with `input`, then the answer in `completion`, `response`,
    `output` or `answer` where there is one; else `text`.
    chat_template: True puts conversations and prompts through the tokenizer's template and raises SourceError without
    one; False joins their contents with blank lines; None does what the tokenizer can. What stands under `text` is
    taken as it is. add_generation_prompt: what the model is asked, without the answer that the row ends with if it has
    one, and with what opens the model's turn. names: what errors call each row; by default its number here.
    """
    encoded: list[list[int]] = []
    for number, row in enumerate(rows):
        where = names[number] if names else f"row {number + 1}"
        said = content_of(row, column, where)
        if add_generation_prompt and isinstance(said, list):
            said = _asked(said, where)
        # A template writes the beginning-of-text token itself.
        own_start = isinstance(said, str) or chat_template is False or not tokenizer.chat_template
        if isinstance(said, str):
            text = said
        elif not own_start:
            text = _through_template(said, tokenizer, add_generation_prompt, where)
        elif chat_template:
            raise no_template(str(tokenizer.name_or_path))
        else:
            text = "\n\n".join(message["content"] for message in said)
        encoded.append(list(tokenizer(text, add_special_tokens=own_start, verbose=False)["input_ids"]))
    return encoded


def no_template(where: str) -> SourceError:
    mend = "Set `chat_template: false`, or take the instruct model, whose tokenizer has one."
    return SourceError("the tokenizer has no chat template", where=where, mend=mend)


def _through_template(
    said: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool, where: str
) -> str:
    try:
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # Templates raise in their own words, such as "roles must alternate".
        raise SourceError(f"the chat template refuses it: {error}", where=where) from error


def listing(folder: Path) -> str:
    """What is in a folder, as the help of an error about what is not."""
    if not folder.is_dir():
        return "The folder does not exist." if not folder.exists() else "It is a file, not a folder."
    names = sorted(path.name for path in folder.iterdir())
    return f"There: {some(names, 8)}." if names else "The folder is empty."


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _format(path: Path) -> str:
    """The suffix that says how to read it, without .gz; "" when we do not read it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes = [suffix for suffix in suffixes[-2:-1] if suffix != ".parquet"]
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else ""


def _data_files(path: Path, keep: Collection[str] | None) -> list[Path]:
    if path.is_file():
        if not _format(path):
            raise SourceError(f"{path.name} is none of {', '.join(_FORMATS)}", where=str(path))
        return [path]
    inside = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    wanted = {
        name: file
        for name, file in inside.items()
        if (keep is None or name in keep)
        and not re.search(r"(^|/)(\.|readme|license|notice|requirements)", name.lower())
    }
    for suffix in _FORMATS:
        files = {name: file for name, file in wanted.items() if _format(file) == suffix}
        train = [file for name, file in files.items() if re.search(r"(^|[/_.-])train", name.lower())]
        if files:
            return train or list(files.values())
    raise SourceError(f"no data files ({', '.join(_FORMATS)}) here", where=str(path), mend=listing(path))


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file; SourceError naming the line that is not one."""
    suffix = _format(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
            return
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            if suffix == ".txt":
                yield from ({"text": line.rstrip("\r\n")} for line in file if line.strip())
            elif suffix in (".csv", ".tsv"):
                yield from _read_csv(file, "\t" if suffix == ".tsv" else ",", path)
            elif suffix == ".json":
                yield from _read_json(json.load(file), path)
            else:
                blank = 0
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _record(json.loads(line), f"{path}:{number}")
                    elif (blank := blank + 1) > _BLANK:
                        raise SourceError(f"more than {_BLANK:,} lines are empty", where=str(path))
    except json.JSONDecodeError as error:
        line = f"line {number}: " if suffix in (".jsonl", ".ndjson") else ""
        raise SourceError(f"{line}not JSON: {error}", where=str(path)) from error
    except RecursionError as error:
        raise SourceError("its JSON is nested too deep", where=str(path)) from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise SourceError(f"the file cannot be read: {error}", where=str(path)) from error


def _read_csv(file: Iterable[str], delimiter: str, path: Path) -> Iterator[dict[str, Any]]:
    table = csv.DictReader(file, delimiter=delimiter, restkey=_REST)
    before = csv.field_size_limit(1 << 30)  # Whole documents stand in one field.
    try:
        for row in table:
            if _REST in row or None in row.values():
                raise SourceError(
                    f"the header has {len(table.fieldnames or ())} columns, this line has not",
                    where=f"{path}:{table.line_num}",
                )
            yield row
    except csv.Error as error:
        raise SourceError(f"not CSV: {error}", where=f"{path}:{table.line_num}") from error
    finally:
        csv.field_size_limit(before)


def _read_json(value: Any, path: Path) -> Iterator[dict[str, Any]]:
    """A list of records, or an object that holds one such list."""
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise SourceError("the file is neither a list of records nor an object with one such list", where=str(path))
    yield from (_record(item, f"{path} record {number}") for number, item in enumerate(value, 1))


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"a row must be an object with columns, this is {type(value).__name__}", where=where)
    return value


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import importlib

    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        mend = "Install it with: pip install 'hubforge[train]'"
        raise SourceError("reading parquet needs pyarrow", where=str(path), mend=mend) from error
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(256):
                yield from batch.to_pylist()
    except importlib.import_module("pyarrow").ArrowException as error:
        raise SourceError(f"the file is damaged: {error}", where=str(path)) from error


def _need(row: Mapping[str, Any], columns: Iterable[str], where: str) -> None:
    for column in columns:
        if column not in row:
            close = difflib.get_close_matches(column, row, 1)
            mend = f" Did you mean {close[0]!r}?" if close else ""
            raise SourceError(f"no column {column!r}", where=where, mend=f"Columns: {', '.join(row)}.{mend}")


def content_of(row: Mapping[str, Any], column: str | None, where: str) -> str | list[dict[str, str]]:
    """Plain text, or the messages of a conversation; SourceError when the row has neither. column: as for `texts`."""
    named = column is not None
    if column is not None:
        _need(row, [column], where)
    else:
        known = ("messages", "conversations", "prompt", "instruction", "text")
        column = next((name for name in known if row.get(name)), None)
        if column is None:
            mend = f"Columns: {', '.join(row)}. Name one with `column:`."
            raise SourceError(f"none of the columns {', '.join(known)}, or they are empty", where=where, mend=mend)
    value = row[column]
    if isinstance(value, list):
        return [_message(item, f"{where}, {column}[{number}]") for number, item in enumerate(value)]
    if not isinstance(value, str):
        raise SourceError(f"{column!r} is {type(value).__name__}, not text or a list of messages", where=where)
    if column == "text":
        return value
    if named:
        return [{"role": "user", "content": value}]
    if column == "instruction" and row.get("input"):
        value = f"{value}\n\n{row['input']}"
    answer = next((str(row[name]) for name in _ANSWERS if row.get(name)), None)
    said = [{"role": "user", "content": value}]
    return said if answer is None else [*said, {"role": "assistant", "content": answer}]


def _asked(said: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """A conversation up to the last thing that was not said by the model."""
    last = max((number for number, message in enumerate(said) if message["role"] != "assistant"), default=None)
    if last is None:
        raise SourceError("nothing is asked: every message is the assistant's", where=where)
    return said[: last + 1]


def _message(item: Any, where: str) -> dict[str, str]:
    role = item.get("role", item.get("from")) if isinstance(item, dict) else None
    content = item.get("content", item.get("value")) if isinstance(item, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise SourceError("a message needs `role` and `content`, both text", where=where)
    return {"role": _ROLES.get(role, role), "content": content}
