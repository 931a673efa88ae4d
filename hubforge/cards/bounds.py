"""Bounds on a card template: Jinja's sandbox keeps it from Python; this keeps it from taking the machine with it."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 3.0  # of processor time; a card takes milliseconds
MEMORY = 256 << 20  # bytes beyond what the process has; a card is some kilobytes
_BITS = 1 << 14  # of a whole number


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with numbers that stay small: a product of large integers takes hours and cannot be interrupted."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS:
                raise SecurityError(f"a number of {bits} bits is too large")
        return super().call_binop(context, operator, left, right)


class TooLong(Exception):
    """Raised in a template that is still at it when its time is over."""

    def __str__(self) -> str:
        return f"it takes longer than {SECONDS:g} s"


@contextmanager
def bounded() -> Iterator[None]:
    """Stop what happens in this block after SECONDS, by `TooLong`; and give it no more than MEMORY, by MemoryError.

    The time is the processor's, and is kept between two steps of the interpreter. Memory is bounded on Linux, for the
    whole process: other threads share it as long as the block lasts.
    """
    thread, guard, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    until = time.process_time() + SECONDS

    def watch() -> None:
        while not over.wait(0.02):
            if time.process_time() > until:
                with guard:
                    if not over.is_set():
                        raise_in(thread, ctypes.py_object(TooLong))
                return

    threading.Thread(target=watch, name="template-watch", daemon=True).start()
    try:
        with _little_memory():
            yield
    finally:
        with guard:
            over.set()
            raise_in(thread, None)  # one that was sent and has not arrived


@contextmanager
def _little_memory() -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with open("/proc/self/statm") as sizes:  # noqa: PTH123 - a pseudo-file, read as such
        used = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + MEMORY
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
