"""What a thread of the engine has at hand: its device, what it read and computed for the block it is at.

A block's inputs are read once, however many ops of a chain ask for them. Where a tensor is passed over twice (first to
measure, then to write), its rows stay in memory as they were read, as far as the memory goes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from hubforge.tensors.reader import Checkpoint


class Kept:
    """Rows from one pass over a tensor to the next, at most `limit` bytes of them. What does not fit is read again."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._rows: dict[str, dict[Hashable, Any]] = {}
        self._lock = threading.Lock()

    def put(self, tensor: str, key: Hashable, rows: Tensor | ndarray) -> None:
        with self._lock:
            if self._held + rows.nbytes <= self._limit:
                self._rows.setdefault(tensor, {})[key] = rows
                self._held += rows.nbytes

    def get(self, tensor: str, key: Hashable, *, last: bool) -> Any:
        """The rows, if they were kept. last: nobody will ask again."""
        with self._lock:
            held = self._rows.get(tensor, {})
            if not last:
                return held.get(key)
            rows = held.pop(key, None)
            self._held -= rows.nbytes if rows is not None else 0
            return rows

    def drop(self, tensor: str) -> None:
        with self._lock:
            self._held -= sum(rows.nbytes for rows in self._rows.pop(tensor, {}).values())


class Desk(threading.local):
    """One per run; every thread that touches it has its own. shared: whether several ops read the same rows."""

    def __init__(self, kept: Kept | None = None, *, shared: bool = True) -> None:
        self.device = "cpu"
        self._kept, self._shared = kept or Kept(0), shared
        self._found: dict[Hashable, weakref.ref[Tensor]] = {}
        self._held: list[Tensor] = []
        self._factors: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._tensor, self._passes = "", 1

    def start(self, tensor: str = "", passes: int = 1) -> None:
        """Clear the desk for another block. passes: how often its rows are needed from now on, this time included."""
        self._found.clear()
        self._held.clear()
        self._tensor, self._passes = tensor, passes

    def found(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What was read or computed under that key for this block.

        A single op that writes asks once for all but its base, so what it has dropped is not held for it: the next
        rows take that place in the cache.
        """
        known = self._found.get(key)
        rows = known() if known is not None else None
        if rows is None:
            rows = make()
            self._found[key] = weakref.ref(rows)
            if self._shared or self._passes > 1:
                self._held.append(rows)
        return rows

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A clean desk for a look at rows beside this block's, whose things lie on it again afterwards."""
        before = self._found, self._held, self._tensor, self._passes
        self._found, self._held, self._tensor, self._passes = {}, [], "", 1
        try:
            yield
        finally:
            self._found, self._held, self._tensor, self._passes = before

    def computed(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Rows that one op of a chain computes for another; kept, as those of files are, from pass to pass."""
        return self.found(key, lambda: self._from_pass(key, make))

    def read(self, checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a file's tensor, float32 on this thread's device."""
        key = (id(checkpoint), name, first, last)
        return self.found(
            key, lambda: self._on_device(self._from_pass(key, lambda: checkpoint.read_rows(*key[1:]))).float()
        )

    def factors(self, key: Hashable, read: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """An adapter's factors of the module last asked for, float32 on this thread's device."""
        if key not in self._factors:
            if len(self._factors) > 16:  # modules of the tensors before this one
                self._factors.clear()
            a, b = read()
            self._factors[key] = self._on_device(a), self._on_device(b)
        return self._factors[key]

    def _from_pass(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        kept: Tensor | None = self._kept.get(self._tensor, key, last=self._passes == 1)
        if kept is not None:
            return kept
        rows = make()
        if self._passes > 1:
            self._kept.put(self._tensor, key, rows)
        return rows

    def _on_device(self, rows: Tensor) -> Tensor:
        if self.device == "cpu":
            return rows
        if self.device.startswith("cuda"):
            # From pinned memory the copy runs beside other threads' kernels; torch reuses the buffer once it is done.
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)
