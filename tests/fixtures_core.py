"""Fixtures of the core: small recipes, a toy op of each kind, and a source folder that only has to be keyed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from hubforge import catalog
from hubforge.errors import SourceError
from hubforge.op import DatasetRef, Kind, Metrics, ModelRef, Op


class Shout(Op):
    """A text file in capitals. A toy: it reads one word per model, and counts how often it ran."""

    makes: ClassVar[Kind] = "model"
    formula: ClassVar[str] = "UPPER(x)"

    model: ModelRef = Field(description="What to shout.")
    times: int = Field(1, ge=1, le=9, description="How often, in [1, 9].")
    data: DatasetRef | None = Field(None, description="Words to add.")
    note: str = Field("", description="Changes nothing.")
    unkeyed: ClassVar[tuple[str, ...]] = ("note",)
    runs: ClassVar[list[str]] = []

    def run(self, ctx) -> Metrics:
        self.runs.append(ctx.name)
        word = (ctx.path(self.model) / "word.txt").read_text()
        ctx.progress(1, 1, "words")
        (ctx.out / "word.txt").write_text(word.upper() * self.times)
        return {"letters": len(word)}


class Fail(Op):
    """A step that fails half way, leaving a file behind."""

    makes: ClassVar[Kind] = "model"
    model: ModelRef
    how: str = "value"

    def run(self, ctx) -> Metrics:
        (ctx.out / "half.txt").write_text("half")
        if self.how == "disk":
            raise OSError(28, "No space left on device")
        if self.how == "input":
            raise SourceError("row 1 has no 'text'", where="data/rows.jsonl", mend="Columns: body.")
        raise ValueError("a tensor of shape (3,) is not (4,)")


TOYS = {("stages", "shout"): Shout, ("stages", "fail"): Fail}


@pytest.fixture
def toy_ops(monkeypatch):
    """Adds `op: shout` and `op: fail` under stages; gives the list of the steps that shout ran."""
    names, find = catalog.names, catalog.find
    monkeypatch.setattr(
        catalog,
        "names",
        lambda section: names(section) | {name: None for where, name in TOYS if where == section},
    )
    monkeypatch.setattr(catalog, "find", lambda section, name: TOYS.get((section, name)) or find(section, name))
    Shout.runs.clear()
    return Shout.runs


@pytest.fixture
def source_folder():
    """Makes a model folder that can be keyed and described: a config and one safetensors file with one number."""

    def make(folder: Path, word: str = "hello") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0))
        (folder / "config.json").write_text('{"architectures": ["ToyForCausalLM"], "model_type": "toy"}')
        (folder / "word.txt").write_text(word)
        return folder

    return make


@pytest.fixture
def write_recipe(tmp_path, source_folder):
    """Writes a recipe next to a source folder ./model, and gives its path."""

    def write(text: str, name: str = "r.yaml") -> Path:
        source_folder(tmp_path / "model")
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
