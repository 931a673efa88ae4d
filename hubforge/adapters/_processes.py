"""Run one function in several processes that exchange tensors, and be one process towards whoever called.

They are started as `torchrun` starts its own (a process each, RANK and WORLD_SIZE in the environment), so accelerate
and the trainer find what they know. `torch.multiprocessing.spawn` would run the caller's script anew in each of them,
and torchrun's agent restarts, prints and listens: here one failure is the end, and one error says why.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from hubforge.errors import HubforgeError, StepError
from hubforge.events import Event, Report
from hubforge.processes import child_environment, cpu_threads, ending, last_lines

_GRACE = 3.0  # seconds to hear of the cause after the first failure, which may be a mere consequence of it


@dataclass(frozen=True)
class Returned:
    """What a process says when it is through; the value is that of the first process, None of the others."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """What a process says when its work raised."""

    error: BaseException
    traceback: str


@dataclass(frozen=True)
class _Died:
    """That a process ended without a word: the kernel took its memory back, or a library aborted."""

    returncode: int
    printed: str  # the end of its stderr


class _Elsewhere(Exception):
    """The traceback of another process, as the cause of an error raised in this one."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def in_processes(
    count: int, work: Callable[..., Any], arguments: tuple[Any, ...], *, device: str, report: Report, where: str = ""
) -> Any:
    """What `work(*arguments, report)` returns in the first of `count` processes, each of which runs it.

    work: a function of a module, with arguments that can be pickled. Within it torch.distributed is up: gloo where
    device is "cpu", else nccl, a GPU each. The events that the first one reports are reported here.
    When one fails, all are killed and its error is raised: one of ours, of the system's or MemoryError as it is, any
    other as a StepError. None outlives this call, however it ends, nor this process.
    """
    with tempfile.TemporaryDirectory(prefix="hubforge-") as made:
        folder = Path(made)
        (folder / "call").write_bytes(pickle.dumps((work, arguments, device)))
        inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        processes: list[subprocess.Popen[bytes]] = []
        threads: list[threading.Thread] = []
        try:
            for rank in range(count):
                processes.append(_start(folder, rank, count))
                listening = (rank, processes[rank], folder, inbox)
                threads.append(threading.Thread(target=_listen, args=listening, daemon=True))
                threads[rank].start()
            value, failures = _follow(inbox, count, report)
        finally:
            for process in processes:
                process.kill()
            for process, thread in zip(processes, threads, strict=False):
                process.wait()
                thread.join()
                for pipe in (process.stdin, process.stdout):
                    cast("IO[bytes]", pipe).close()
        if failures:
            # An error of ours names its cause; a process that died did not lose its connection to another.
            order = {HubforgeError: 0, _Died: 1}
            rank, first = min(failures, key=lambda each: order.get(_kind(each[1]), 2))
            _raise(rank, count, first, where)
        return value


def _start(folder: Path, rank: int, count: int) -> subprocess.Popen[bytes]:
    environment = child_environment()
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_threads() // count)))
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)  # All are here: nobody else need be able to connect.
    with (folder / f"stderr-{rank}").open("wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", "hubforge.adapters._rank", str(folder)],
            stdin=subprocess.PIPE,  # Nothing is ever sent; it closes when this process ends, however it does.
            stdout=subprocess.PIPE,
            stderr=printed,
            env=environment,
        )


def _listen(rank: int, process: subprocess.Popen[bytes], folder: Path, inbox: queue.SimpleQueue[Any]) -> None:
    """Pass on what one process says, and at its end None, or how it died if it had not come to a conclusion."""
    concluded = False
    stream = cast("IO[bytes]", process.stdout)
    while not concluded:
        try:
            message = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):  # The latter when it died in the middle of a message.
            break
        concluded = isinstance(message, (Returned, Raised))
        inbox.put((rank, message))
    returncode = process.wait()
    printed = (folder / f"stderr-{rank}").read_bytes()[-16384:].decode(errors="replace")
    inbox.put((rank, None if concluded else _Died(returncode, printed)))


def _follow(
    inbox: queue.SimpleQueue[tuple[int, Any]], count: int, report: Report
) -> tuple[Any, list[tuple[int, Raised | _Died]]]:
    """The first process's value; and the failures, in the order they became known, with the rank of each."""
    value: Any = None
    failures: list[tuple[int, Raised | _Died]] = []
    running, until = set(range(count)), 0.0
    while running:
        try:
            rank, message = inbox.get(timeout=max(0.0, until - time.monotonic()) if failures else None)
        except queue.Empty:
            break
        if isinstance(message, Event):
            report(message)
        elif isinstance(message, Returned):
            value = message.value if rank == 0 else value
        elif isinstance(message, (Raised, _Died)):
            until = until or time.monotonic() + _GRACE
            failures.append((rank, message))
        if message is None or isinstance(message, _Died):
            running.discard(rank)
    return value, failures


def _kind(failure: Raised | _Died) -> type:
    return HubforgeError if isinstance(failure, Raised) and isinstance(failure.error, HubforgeError) else type(failure)


def _raise(rank: int, count: int, failure: Raised | _Died, where: str) -> None:
    said = f"process {rank + 1} of {count}"
    if isinstance(failure, _Died):
        what = f"{said} ended with {ending(failure.returncode)}"
        memory = "Often for want of memory: each process holds the whole model." if failure.returncode == -9 else ""
        raise StepError(what, where=where, mend="\n  ".join(filter(None, [memory, last_lines(failure.printed)])))
    error, cause = failure.error, _Elsewhere(failure.traceback)
    if isinstance(error, (HubforgeError, OSError, MemoryError)):
        raise error from cause
    logging.getLogger("hubforge").error("%s failed\n%s", said, failure.traceback)
    text = " ".join(str(error).split())[:500]
    mend = "`--debug` shows the traceback, which is also in the log."
    raise StepError(f"{said} failed: {type(error).__name__}: {text}", where=where, mend=mend) from cause


def rank_here() -> int:
    """Which of the processes this is, from 0; 0 when there is only one."""
    return int(os.environ["RANK"]) if is_one_of_several() else 0


def is_one_of_several() -> bool:
    """Whether this process was started by `in_processes`, and its peers can be reached through torch.distributed."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
