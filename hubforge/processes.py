"""What a process of ours needs to know about processes: how many threads to take, and how to have a child.

A child of ours finds this very hubforge, reaches no Hub, ends with its parent, and when it fails the end of what it
printed is the error.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_threads() -> int:
    """How many threads to compute with: what OMP_NUM_THREADS says, else one for each processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else processors()


def child_environment() -> dict[str, str]:
    """Our environment, in which a child finds this very hubforge and reaches no Hub."""
    here = str(Path(__file__).resolve().parents[1])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(paths)}


def exit_with_parent() -> None:
    """For a child: end when the parent's end of our stdin closes, so that a killed run leaves nobody writing."""
    import threading

    def watch() -> None:
        os.read(0, 1)  # Not sys.stdin, whose lock would be missed at exit. Nothing is ever sent.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ending(returncode: int) -> str:
    """How a process ended, in words: "exit code 1", "SIGABRT"."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def last_lines(text: str, most: int = 4) -> str:
    """The end of what a tool printed, which is where it says why."""
    return "\n  ".join([line.rstrip() for line in text.splitlines() if line.strip()][-most:])
