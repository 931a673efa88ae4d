"""Rows come out the same whatever the format, and a row that is not one is named by file and line."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from hubforge.errors import SourceError
from hubforge.models import load_tokenizer, rows, texts

ROWS = [{"prompt": "Hi, you", "key": "1"}, {"prompt": 'Say "no"\nthen stop', "key": "2"}]


def write(path: Path, records: list[dict[str, str]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(records[0]))
            table.writeheader()
            table.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert rows(write(tmp_path / name)) == ROWS


def test_a_text_file_gives_one_row_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert rows(tmp_path / "a.txt") == [{"text": "one"}, {"text": " two "}]


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    (tmp_path / "README.md").write_text("about")
    assert [row["prompt"] for row in rows(tmp_path)] == ["a", "b"]


def test_a_folder_with_a_train_split_gives_that_alone(tmp_path: Path) -> None:
    for name in ("train-00001", "train-00000", "test-00000"):
        write(tmp_path / "data" / f"{name}.jsonl", [{"prompt": name}])
    assert [row["prompt"] for row in rows(tmp_path)] == ["train-00000", "train-00001"]
    assert [row["prompt"] for row in rows(tmp_path, files=["data/test-00000.jsonl"])] == ["test-00000"]


def test_metadata_beside_the_data_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert rows(tmp_path) == ROWS


def test_limit_stops_before_a_later_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{\n")
    assert rows(path, limit=2) == ROWS
    with pytest.raises(SourceError, match=r"a.jsonl: line 3: not JSON"):
        rows(path)


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"row 1: no column 'promt'\n  Columns: prompt, key. Did you mean 'prompt'?"):
        rows(write(tmp_path / "a.jsonl"), columns=["promt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "[1]\n", "a.jsonl:1: a row must be an object"),
        ("a.json", '{"a": 1}', "neither a list of records"),
        ("a.csv", "a,b\n1\n", "a.csv:2: the header has 2 columns"),
        ("a.txt", "\xff", None),
        ("a.bin", "", "a.bin is none of .parquet"),
        ("a.jsonl", "", "has no rows"),
        ("a.parquet", "PAR1", "a.parquet: the file"),
        ("a.jsonl.gz", "plain", "a.jsonl.gz: the file cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str | None) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(SourceError, match=message or "cannot be read: .*utf-8"):
        rows(tmp_path / name)


def test_a_prompt_goes_through_the_chat_template_once_begun(tiny_llama: Path) -> None:
    """The template writes the beginning-of-text token; the tokenizer must not write a second one."""
    tokenizer = load_tokenizer(tiny_llama)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, return_dict=False)
    assert texts([{"prompt": "Hi"}], tokenizer, chat_template=True) == [expected]
    assert expected.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}]},
        {"prompt": "Hi", "completion": "No"},
        {"instruction": "Hi", "input": "", "output": "No"},
    ],
    ids=["messages", "sharegpt", "prompt", "alpaca"],
)
def test_these_rows_are_one_conversation(tiny_llama: Path, row: dict[str, object]) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]
    assert texts([row], tokenizer) == [tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)]
    assert texts([row], tokenizer, chat_template=False) == [tokenizer("Hi\n\nNo")["input_ids"]]


@pytest.mark.parametrize("template", [True, False])
def test_what_is_asked_leaves_out_the_answer(tiny_llama: Path, template: bool) -> None:
    """So that a model which is to reply does not find the reply there."""
    tokenizer = load_tokenizer(tiny_llama)
    ask, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    rows = [{"prompt": "Hi"}, {"prompt": "Hi", "completion": "Ho"}, {"messages": [ask, said]}]
    found = texts(rows, tokenizer, chat_template=template, add_generation_prompt=True)
    assert found[0] == found[1] == found[2]
    later = texts([{"messages": [ask, said, ask]}], tokenizer, chat_template=template, add_generation_prompt=True)
    assert len(later[0]) > len(found[0])
    with pytest.raises(SourceError, match="row 1: nothing is asked"):
        texts([{"messages": [said]}], tokenizer, add_generation_prompt=True)


def test_text_is_taken_as_it_is(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    assert texts([{"text": "The sea"}], tokenizer, chat_template=True) == [tokenizer("The sea")["input_ids"]]


def test_a_named_column_is_read_alone(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    row = {"prompt": "Hi", "completion": "No", "question": "Why"}
    assert texts([row], tokenizer, column="question", chat_template=False) == [tokenizer("Why")["input_ids"]]


def test_wrong_rows_are_named(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(SourceError, match=r"row 1: none of the columns .*\n  Columns: question"):
        texts([{"question": "Why"}], tokenizer)
    with pytest.raises(SourceError, match=r"row 2: no column 'question'"):
        texts([{"question": "Why"}, {"prompt": "Hi"}], tokenizer, column="question")
    with pytest.raises(SourceError, match=r"row 1, messages\[0\]: a message needs `role` and `content`"):
        texts([{"messages": [{"role": "user"}]}], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match=r"no chat template\n  Set `chat_template: false`"):
        texts([{"prompt": "Hi"}], tokenizer, chat_template=True)


def test_lines_without_end_and_json_without_bottom_are_refused(tmp_path):
    import gzip

    endless, deep = tmp_path / "a.jsonl.gz", tmp_path / "b.json"
    endless.write_bytes(gzip.compress(b"\n" * 1_100_000, 1))
    deep.write_text("[" * 100_000)
    with pytest.raises(SourceError, match="more than 1,000,000 lines are empty"):
        rows(endless)
    with pytest.raises(SourceError, match="nested too deep"):
        rows(deep)
