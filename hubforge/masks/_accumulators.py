"""Sums of squares in float32, kept where there is room: beside the weights, in host memory, or in files."""

from __future__ import annotations

import math
import os
import queue
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hubforge.tensors.writer import store_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Where = Literal["device", "host", "disk"]
_SLOTS = 2  # buffers of the largest weight's size between a GPU and the host: one fills while the other is added


class Accumulators:
    """One float32 sum per weight, `tensors`, all zero at first.

    shapes: of the weights. devices: where each gradient arises. where: "device" keeps a sum there; "host" in memory;
    "disk" in files under `folder`, mapped into memory, so that the system writes out what memory cannot hold.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        devices: Mapping[str, torch.device],
        where: Where = "device",
        folder: Path | None = None,
    ) -> None:
        import torch

        self._files = folder if where == "disk" else None
        self._couriers: dict[torch.device, _Courier] = {}
        self._largest = max((math.prod(shape) for shape in shapes.values()), default=0)
        self.tensors: dict[str, Tensor] = {}
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)
            self._files.mkdir(parents=True)
        for number, (name, shape) in enumerate(shapes.items()):
            if self._files is not None:
                self.tensors[name] = _mapped(self._files / f"{number}.f32", shape)
            else:
                device = devices[name] if where == "device" else torch.device("cpu")
                self.tensors[name] = torch.zeros(shape, dtype=torch.float32, device=device)

    def open(self, name: str, device: torch.device) -> Tensor:
        """What to add squares to on that device: the sum itself, or zeros that `close` will add to it."""
        import torch

        sums = self.tensors[name]
        return sums if sums.device == device else torch.zeros(sums.shape, dtype=torch.float32, device=device)

    def close(self, name: str, squares: Tensor) -> None:
        """Take in what `open` gave. From a GPU to the host it travels while the GPU goes on computing."""
        sums = self.tensors[name]
        if squares is sums:
            return
        if squares.device.type != "cuda":
            sums.add_(squares.to(sums.device))
            return
        courier = self._couriers.get(squares.device)
        if courier is None:
            courier = self._couriers[squares.device] = _Courier(squares.device, self._largest)
        courier.send(squares, sums)

    def settle(self) -> None:
        """Wait until everything that was closed is in the sums."""
        for courier in self._couriers.values():
            courier.settle()

    def drop(self) -> None:
        """Free the sums and their files."""
        for courier in self._couriers.values():
            courier.stop()
        self._couriers.clear()
        self.tensors.clear()
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Zeros in a file. All of its space is taken now: a full disk would otherwise end the process by a signal."""
    import torch

    count = math.prod(shape)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * count)
            else:
                file.truncate(4 * count)
    except OSError as error:
        raise store_error(error, path) from error
    return torch.from_file(str(path), shared=True, size=count, dtype=torch.float32).view(shape)


class _Courier:
    """Carries tensors from one GPU through pinned buffers, on a stream of its own, and adds them up in a thread."""

    def __init__(self, device: torch.device, largest: int) -> None:
        import torch

        self._stream: Any = torch.cuda.Stream(device)
        self._device = device
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._sent: queue.Queue[tuple[Tensor, Any, Tensor] | None] = queue.Queue()
        self._error: BaseException | None = None
        for _ in range(_SLOTS):
            self._free.put(torch.empty(largest, dtype=torch.float32, pin_memory=True))
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def send(self, squares: Tensor, sums: Tensor) -> None:
        """Add `squares` to `sums` some time before `settle` returns. Waits while all buffers are on their way."""
        import torch

        buffer = self._free.get()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer[: squares.numel()].copy_(squares.view(-1), non_blocking=True)
            squares.record_stream(self._stream)  # Not to be reused before it has been copied.
            arrived = self._stream.record_event()
        self._sent.put((buffer, arrived, sums))

    def settle(self) -> None:
        self._sent.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._sent.put(None)
        self._thread.join()

    def _deliver(self) -> None:
        while (parcel := self._sent.get()) is not None:
            buffer, arrived, sums = parcel
            try:
                arrived.synchronize()
                sums.view(-1).add_(buffer[: sums.numel()])
            except BaseException as error:  # Told by `settle`, in the thread that can do something about it.
                self._error = error
            finally:
                self._free.put(buffer)
                self._sent.task_done()
        self._sent.task_done()
