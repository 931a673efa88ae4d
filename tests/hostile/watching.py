"""What one hostile input may not do: raise anything but our errors, hang, eat memory, or write outside its folder."""

from __future__ import annotations

import getpass
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubforge.errors import HubforgeError

SECONDS = 5.0  # of processor time, so that a busy machine breaks no test
HANG = 60.0  # of wall time: something waits that should not
BYTES = 1 << 30

_WRITES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.symlink": (1,),
           "os.link": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,), "shutil.rmtree": (0,)}  # fmt: skip
_TORCH_CACHE = Path(tempfile.gettempdir()).resolve() / f"torchinductor_{getpass.getuser()}"  # made by importing torch
_TIMERS = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, HANG))
_OURS = ("git", "nvidia-smi")  # what hubforge itself asks of the machine
_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork")


@dataclass
class Watch:
    """The folder in which writing is allowed, and what was seen since."""

    allowed: tuple[Path, ...] = ()
    outside: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    on: bool = False

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and _writes(args):
            self._wrote(args[0])
        elif event in _WRITES:
            for index in _WRITES[event]:
                self._wrote(args[index])
        elif event.startswith(_CODE) and not str(args[0]).endswith(_OURS):
            self.ran.append(f"{event} {args[:2]!r}"[:300])

    def _wrote(self, path: Any) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return  # a file descriptor, which something opened
        where = Path(path)
        real = where.parent.resolve() / where.name  # the link itself, not what it points to
        if not any(real.is_relative_to(other) for other in self.allowed):
            self.outside.append(str(real))


def _writes(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


_watch = Watch()
sys.addaudithook(_watch.hear)  # cannot be taken out again; silent but while `_watch.on`


class TookTooLong(BaseException):
    """Not an Exception: nothing may swallow it."""


@dataclass(frozen=True)
class Verdict:
    """refused: our error, if any; faults: what must not happen. seconds of work; bytes: the peak above the start."""

    refused: str | None
    faults: tuple[str, ...]
    seconds: float
    bytes: int


def judge(attack: Callable[[], None], folder: Path, more: tuple[Path, ...] = ()) -> Verdict:
    """Run one attack, which may write under `folder` only, and say what it did."""
    faults: list[str] = []
    refused = None
    _watch.allowed = (*(path.resolve() for path in (folder, *more)), Path("/dev"), _TORCH_CACHE)
    _watch.outside, _watch.ran = [], []
    before = _reset_peak()
    began = time.process_time()
    try:
        with _alarm():
            _watch.on = True
            attack()
    except HubforgeError as error:
        refused = str(error)
        if not refused.strip():
            faults.append("an error without a word")
        if "\x1b" in refused or "\x00" in refused:
            faults.append(f"control characters in the error: {refused[:200]!r}")
        if len(refused) > 200_000:
            faults.append(f"an error of {len(refused)} characters")
    except TookTooLong:
        lines = traceback.format_exc().splitlines(True)[-9:-1]
        faults.append(f"still at it after {SECONDS:g} s of work, or {HANG:g} s, in {''.join(lines)}")
    except BaseException as error:
        faults.append(f"{type(error).__name__}: {error}"[:300] + "\n" + _innermost(error))
    finally:
        _watch.on = False
    seconds, grown = time.process_time() - began, max(0, _peak() - before)
    if grown > BYTES:
        faults.append(f"{grown / 1e9:.2f} GB of memory")
    faults += [f"wrote {path}" for path in _watch.outside[:3]]
    faults += [f"ran {what}" for what in _watch.ran[:3]]
    return Verdict(refused, tuple(faults), seconds, grown)


def _innermost(error: BaseException) -> str:
    """Where the first of a chain of errors came from: its last frames."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    return "".join(traceback.format_list(frames)) + f"{type(error).__name__}: {error}"[:300]


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(signal_number: int, frame: Any) -> None:
        raise TookTooLong

    for timer, number, seconds in _TIMERS:
        signal.signal(number, ring)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, number, _ in _TIMERS:
            signal.setitimer(timer, 0)
            signal.signal(number, signal.SIG_DFL)


def _reset_peak() -> int:
    """Bytes resident now, from where the peak is counted. Linux; elsewhere memory is not judged."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 1 << 62
    return _peak()


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
