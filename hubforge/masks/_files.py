"""Whole tensors to safetensors files, one at a time: to be kept, and to go on from after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.tensors.dtypes import from_torch
from hubforge.tensors.layout import Layout, lay_out
from hubforge.tensors.reader import Checkpoint, open_checkpoint
from hubforge.tensors.writer import Piece, Writer, piece_of, write_whole

if TYPE_CHECKING:
    from torch import Tensor


class TensorWriter:
    """Puts whole tensors at their places in a layout; `done` holds the names that a killed run left in place."""

    def __init__(self, folder: Path, layout: Layout, plan: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._pieces: dict[str, Piece] = {
            name: piece_of(slot, 0, 0, max(slot.shape[0] if slot.shape else 1, 1))
            for name, slot in layout.slots.items()
        }
        self._writer = Writer(folder, layout, list(self._pieces.values()), plan)
        self.done: dict[str, Any] = {
            name: self._writer.finished[piece.key]
            for name, piece in self._pieces.items()
            if piece.key in self._writer.finished
        }

    def put(self, name: str, tensor: Tensor, facts: Any = None) -> None:
        """Write one tensor, of the layout's shape and dtype; facts: JSON to find in `done` after a kill."""
        import torch

        data = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        piece = self._pieces[name]
        assert len(data) == piece.end - piece.start, name
        self._writer.write(piece, 0, data)
        self._writer.finish(piece, facts)

    def complete(self) -> dict[str, str]:
        """Give the files their names; their sha256."""
        return self._writer.complete()

    def close(self) -> None:
        """Stop, leaving what is done for another try."""
        self._writer.close()


def write_tensors(
    out: Path, stem: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], get: Callable[[str], Tensor]
) -> dict[str, str]:
    """Write `get(name)` for each name (dtype as safetensors has it, shape) to `out`/`stem`.safetensors, or shards.

    Under `out`/writing until all of it is there; other files in `out` stay. Returns the sha256 of each file.
    """
    writing = out / "writing"
    layout = lay_out([(name, dtype, shape) for name, (dtype, shape) in tensors.items()], stem=stem)
    shutil.rmtree(writing, ignore_errors=True)
    writer = TensorWriter(writing, layout, plan="")
    try:
        for name in layout.slots:
            writer.put(name, get(name))
        digests = writer.complete()
    except BaseException:
        writer.close()
        raise
    settle(writing, out)
    return digests


def settle(folder: Path, out: Path) -> None:
    """Move the files of a finished folder into `out`, and drop the folder."""
    for path in sorted(folder.iterdir()):
        path.replace(out / path.name)
    folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


class States:
    """States saved now and then under a folder, of which the newest whole one counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> tuple[dict[str, Any], Checkpoint] | None:
        """Facts and tensors (close them) of the last state that was saved whole."""
        whole = sorted(self._folder.glob("*/facts.json"), key=lambda path: int(path.parent.name))
        if not whole:
            return None
        return json.loads(whole[-1].read_text(encoding="utf-8")), open_checkpoint(whole[-1].parent)

    def save(self, number: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Save a state, then drop those before it. facts.json comes last: it makes the state whole."""
        folder = self._folder / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shapes = {name: (from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(folder, "state", shapes, lambda name: tensors[name])
        write_json(folder / "facts.json", facts)
        for other in self._others(number):
            shutil.rmtree(other)

    def drop(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _others(self, number: int) -> Iterable[Path]:
        return [path for path in self._folder.iterdir() if path.name != str(number)]


def size(count: float, unit: str = "B") -> str:
    """Three figures of a large number: "7.78 GB", or with unit "" "7.94 G"."""
    for prefix in ("", "k", "M", "G"):
        if count < 1000 or prefix == "G":
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}".rstrip()
