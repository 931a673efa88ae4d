"""Models whose vocabularies differ, brought to one: each embedding and head as a table with a row per output token.

Rows are matched by the token's text. A token that a model lacks takes the base's row, so that the model changes
nothing there; one that the base lacks too takes the mean of those that have it. The rules are mergekit's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from hubforge.errors import StepError
from hubforge.tensors import dtypes
from hubforge.tensors.names import Aliases
from hubforge.tensors.reader import Checkpoint, TensorInfo
from hubforge.tensors.tokens import Tokens, united

if TYPE_CHECKING:
    from torch import Tensor

_INPUT = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
_PER_LAYER = "embed_tokens_per_layer"
_TABLE = re.compile(rf"(?:.*\.)?(?P<module>{'|'.join((*_INPUT, _PER_LAYER))}|lm_head|embed_out)\.(?:weight|bias)")
_STEP = 1 << 20  # elements read at once for a mean
_MEAN = (("", -1),)  # in place of rows to average: nobody has the token


@dataclass(frozen=True)
class RowOf:
    """Where the row of one token comes from: a model's row of a token or id; a zero row without a model."""

    model: str = ""
    token: str | None = None
    token_id: int | None = None
    force: bool = False  # also for the models that have the token


@dataclass(frozen=True)
class Wanted:
    """What a recipe asks of the vocabulary."""

    source: str  # "base", "union", or the ref of the model whose tokenizer the output has
    new_tokens: Literal["average", "zero"] = "average"
    tokens: Mapping[str, RowOf] = field(default_factory=dict)
    multiple: int = 1


@dataclass(frozen=True)
class Held:
    """One model: its tokens, and its checkpoint with the names by which it can be asked."""

    tokens: Tokens
    checkpoint: Checkpoint

    @cached_property
    def names(self) -> Aliases:
        return Aliases(self.checkpoint, str(self.checkpoint.path))


def is_table(name: str) -> bool:
    """Whether a tensor of that name has a row for each token."""
    return _TABLE.fullmatch(name) is not None


class Vocabulary:
    """The output's tokens, and for each model and token the row, or the rows to average, that stand for it.

    models: those to merge, the base first. others: further models that only lend a tokenizer or rows.
    """

    def __init__(self, wanted: Wanted, models: Mapping[str, Held], others: Mapping[str, Held]) -> None:
        import numpy as np

        self.wanted, self.models, self.held = wanted, models, {**others, **models}
        self.base = next(iter(models))
        self.reference = self.base if wanted.source in ("base", "union") else wanted.source
        first = self.held[self.reference].tokens
        rest = [held.tokens for ref, held in models.items() if ref != self.base] if wanted.source == "union" else []
        self.tokens = united(first, rest, list(wanted.tokens))
        self.changed = self.tokens.ids != first.ids
        self.size = self.tokens.end
        self.own = {}
        for ref, held in self.held.items():
            own = np.full(self.size, -1, dtype=np.int64)
            for token, number in self.tokens.ids.items():
                own[number] = held.tokens.ids.get(token, -1)
            self.own[ref] = own
        named = np.zeros(self.size, dtype=bool)
        named[list(self.tokens.ids.values())] = True
        for ref in (self.reference,):  # Ids that no token has: rows that pad the reference's table.
            self.own[ref][~named] = np.flatnonzero(~named)
        self._by_id = {number: token for token, number in self.tokens.ids.items()}
        self.forced = {self.tokens.ids[token] for token, row in wanted.tokens.items() if row.force}

    def tables(self, checkpoint: Checkpoint) -> list[TensorInfo]:
        """The tensors with a row for each token."""
        return [info for info in checkpoint.tensors.values() if info.shape and is_table(info.name)]

    def rows(self, name: str) -> int:
        """The rows that a table has in the output: the reference's, and as many more as tokens were added."""
        reference = self.held[self.reference]
        own = reference.names.find(name)
        rows = reference.checkpoint.info(own).rows if own else self.size
        rows = max(rows, self.size) if self.changed else rows
        return -(-rows // self.wanted.multiple) * self.wanted.multiple

    def view(self, ref: str) -> Checkpoint:
        """A model's checkpoint with its tables as the output has them; itself where nothing moves."""
        import numpy as np

        checkpoint, moved = self.models[ref].checkpoint, {}
        for info in self.tables(checkpoint):
            rows = self.rows(info.name)
            kept = np.array_equal(self.own[ref][:rows], np.arange(min(rows, self.size))) and not self.forced
            if rows == info.rows and kept:
                continue
            shape = (rows, *info.shape[1:])
            size = dtypes.nbytes(info.dtype, rows * (info.elements // max(info.rows, 1)))
            moved[info.name] = replace(info, shape=shape, end=info.start + size)
        return Remapped(checkpoint, moved, self, ref) if moved else checkpoint

    def donors(self, row: int, held: Mapping[str, int]) -> Sequence[tuple[str, int]]:
        """The rows (ref, row) whose mean stands for an output row where a model has none. held: ref -> table rows."""

        def has(ref: str) -> bool:
            return ref in held and row < self.size and 0 <= self.own[ref][row] < held[ref]

        def own(ref: str) -> tuple[str, int]:
            return ref, int(self.own[ref][row])

        token = self._by_id.get(row)
        if token is not None and token in self.wanted.tokens:
            return self._configured(token, self.wanted.tokens[token], held)
        if has(self.base):
            return [own(self.base)]
        if token is None and self.size <= row < held.get(self.reference, 0):
            return [(self.reference, row)]
        found = [own(ref) for ref in self.models if has(ref)] or [own(ref) for ref in [self.reference] if has(ref)]
        if self.wanted.new_tokens == "zero":
            return []
        return found or _MEAN

    def _configured(self, token: str, row: RowOf, held: Mapping[str, int]) -> Sequence[tuple[str, int]]:
        if not row.model:
            return []
        ids = self.held[row.model].tokens.ids
        number = ids.get(row.token or token, -1) if row.token_id is None else row.token_id
        if not 0 <= number < held.get(row.model, 0):
            named = f"id {row.token_id}" if row.token_id is not None else f"token {row.token or token!r}"
            raise StepError(f"tokens: {token!r} is to have the row of {named} of {row.model}, which has none")
        return [(row.model, number)]

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with the sizes of the tables that the output has, and the reference's ids of special tokens."""
        sizes = {}
        for info in self.tables(self.models[self.base].checkpoint):
            module = _TABLE.fullmatch(info.name)
            assert module
            if module["module"] in _INPUT:
                sizes["vocab_size"] = self.rows(info.name)
            elif module["module"] == _PER_LAYER:
                sizes["vocab_size_per_layer_input"] = self.rows(info.name)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part |= {name: size for name, size in sizes.items() if name in part}
        return config

    def renumbered(self, config: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
        """A config whose ids of tokens are the output's. theirs: the same file of the model that lends the tokenizer.

        The lender's own ids come first; else the token of the base's id is looked up, and an id without one is dropped.
        """
        if self.reference == self.base:
            return config
        by_id = {number: token for token, number in self.models[self.base].tokens.ids.items()}
        for key, value in list(config.items()):
            if isinstance(value, dict) and key == "text_config":
                inner = theirs.get(key)
                self.renumbered(value, inner if isinstance(inner, Mapping) else theirs)
            elif re.search(r"_token_(?:ids?|index)$", key) and value is not None:
                if theirs.get(key) is not None:
                    config[key] = theirs[key]
                    continue
                numbers = value if isinstance(value, list) else [value]
                found = [self.tokens.ids.get(by_id.get(number, ""), -1) for number in numbers]
                found = [number for number in found if number >= 0]
                config[key] = found if isinstance(value, list) else next(iter(found), None)
        return config


class Remapped(Checkpoint):
    """A model's checkpoint with some tables in the order, and of the length, of another vocabulary."""

    def __init__(self, inner: Checkpoint, moved: Mapping[str, TensorInfo], vocabulary: Vocabulary, ref: str) -> None:
        super().__init__(inner.path, {**inner.tensors, **moved})
        self._inner, self._moved, self._vocabulary, self._ref = inner, moved, vocabulary, ref
        self._found: dict[str, dict[str, tuple[Checkpoint, TensorInfo]]] = {}
        self._means: dict[str, Tensor] = {}
        self._one_mean = threading.Lock()

    def close(self) -> None:
        self._inner.close()

    def expect(self, name: str, first: int, last: int) -> None:
        if name not in self._moved:
            self._inner.expect(name, first, last)

    def read_bytes(self, name: str, first: int, last: int) -> Tensor:
        import torch

        if name not in self._moved:
            return self._inner.read_bytes(name, first, last)
        rows = self.read_rows(name, first, last).to(dtypes.torch_dtype(self.info(name).dtype))
        return rows.contiguous().reshape(-1).view(torch.uint8)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last): float32 for a table that moved, as means do not fit its own dtype."""
        if name not in self._moved:
            return self._inner.read_rows(name, first, last)
        return self._rows(name, first, last, self._mean)

    def _rows(self, name: str, first: int, last: int, mean: Any) -> Tensor:
        import numpy as np
        import torch

        plan, table = self._vocabulary, self._inner.info(name).rows
        rows = torch.empty((last - first, *self.info(name).shape[1:]))
        own = np.full(last - first, -2, dtype=np.int64)  # -2: no run of rows goes on from it to 0
        known = plan.own[self._ref][first:last]
        own[: len(known)] = np.where((known >= 0) & (known < table), known, -2)
        for number in plan.forced:
            if first <= number < last:
                own[number - first] = -2
        _gather(self._inner, name, own, rows)
        left = own < 0
        if left.any():
            left &= ~self._from_others(name, first, last, left, rows)
        for place in np.flatnonzero(left):
            rows[place] = self._stand_in(name, first + int(place), mean)
        return rows

    def _from_others(self, name: str, first: int, last: int, lacking: Any, rows: Tensor) -> Any:
        """Fill the rows of tokens that the base has, many at once; which those are."""
        import numpy as np

        plan = self._vocabulary
        checkpoint, table = self._tables(name).get(plan.base, (None, None))
        own = np.full(last - first, -2, dtype=np.int64)
        if checkpoint is None or table is None:
            return own >= 0
        known = plan.own[plan.base][first:last]
        own[: len(known)] = np.where((known >= 0) & (known < table.rows), known, -2)
        own[~lacking] = -2
        for token in plan.wanted.tokens:
            if first <= (number := plan.tokens.ids[token]) < last:
                own[number - first] = -2
        _gather(checkpoint, table.name, own, rows)
        return own >= 0

    def _stand_in(self, name: str, row: int, mean: Any) -> Tensor | float:
        tables = self._tables(name)
        donors = self._vocabulary.donors(row, {ref: table.rows for ref, (_, table) in tables.items()})
        if donors == _MEAN:
            found: Tensor | float = mean(name)
            return found
        total: Tensor | float = 0.0
        for ref, number in donors:
            checkpoint, table = tables[ref]
            total = total + checkpoint.read_rows(table.name, number, number + 1).float()[0]
        return total / max(len(donors), 1)

    def _tables(self, name: str) -> dict[str, tuple[Checkpoint, TensorInfo]]:
        """The same table in each model that has it, of the same width."""
        if name not in self._found:
            found, width = {}, self.info(name).shape[1:]
            for ref, held in self._vocabulary.held.items():
                own = held.names.find(name)
                if own is not None and held.checkpoint.info(own).shape[1:] == width:
                    found[ref] = held.checkpoint, held.checkpoint.info(own)
            self._found[name] = found
        return self._found[name]

    def _mean(self, name: str) -> Tensor:
        """The mean row of the tokens that have one."""
        import torch

        with self._one_mean:
            if name not in self._means:
                total = torch.zeros(self.info(name).shape[1:], dtype=torch.float64)
                count = 0
                end = min(self._vocabulary.size, self.info(name).rows)
                step = max(1, _STEP // max(1, total.numel()))
                for first in range(0, end, step):
                    rows = self._rows(name, first, min(first + step, end), lambda _: float("nan")).double()
                    there = ~rows.flatten(1).isnan().any(1) if rows.dim() > 1 else ~rows.isnan()
                    total += rows[there].sum(0)
                    count += int(there.sum())
                self._means[name] = (total / max(count, 1)).float()
            return self._means[name]


def _gather(checkpoint: Checkpoint, name: str, numbers: Any, into: Tensor) -> None:
    """Read the rows of those numbers into their places, those that follow one another at once; -2 leaves a place."""
    import numpy as np

    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 2) != 1)
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        if numbers[start] >= 0:
            read = checkpoint.read_rows(name, int(numbers[start]), int(numbers[start] + end - start))
            into[start:end] = read.float()
