"""Several processes that are one towards the caller: values, events, and above all their failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hubforge.adapters._processes import in_processes
from hubforge.errors import SourceError, StepError
from hubforge.events import Event, Note


def summed(ours: int, folder: Path, report) -> float:
    """What the processes make of their ranks together."""
    import torch
    import torch.distributed as dist

    print("in nobody's way")
    total = torch.tensor([float(ours + dist.get_rank())])
    dist.all_reduce(total)
    report(Note("s", f"rank {dist.get_rank()}"))
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    return float(total)


def failing(how: str, folder: Path, report) -> None:
    """The second process fails while the first waits for it."""
    import torch.distributed as dist

    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "ours":
            raise SourceError("row 3 is not text", where="rows.jsonl", mend="Mend row 3.")
        if how == "raises":
            raise KeyError("lm_head")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
    if how == "waits":
        report(Note("s", "waiting"))
        time.sleep(600)
    dist.barrier()


def alive(folder: Path) -> list[int]:
    """Which of the processes that wrote their ids there still run."""
    found = []
    for pid in (int(path.read_text()) for path in folder.iterdir()):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        found.append(pid)
    return found


def test_one_value_comes_back_and_the_first_process_reports(tmp_path, capfd):
    said: list[Event] = []
    assert in_processes(2, summed, (10, tmp_path), device="cpu", report=said.append) == 10 + 11
    assert said == [Note("s", "rank 0")]
    assert len(list(tmp_path.iterdir())) == 2 and alive(tmp_path) == []
    assert capfd.readouterr() == ("", "")


FAILURES = [
    ("ours", SourceError, "rows.jsonl: row 3 is not text\n  Mend row 3."),
    ("raises", StepError, "process 2 of 2 failed: KeyError: 'lm_head'"),
    ("dies", StepError, "process 2 of 2 ended with SIGKILL\n  Often for want of memory"),
]


@pytest.mark.parametrize(("how", "kind", "text"), FAILURES)
def test_the_process_that_fails_is_the_one_error_and_none_is_left(tmp_path, how, kind, text):
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        in_processes(2, failing, (how, tmp_path), device="cpu", report=lambda event: None)
    assert text in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 2 and alive(tmp_path) == []
    assert time.monotonic() - began < 60  # not the half hour in which the other would give up waiting


def test_an_interruption_ends_them_all(tmp_path):
    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt  # as Ctrl-C does wherever the caller is

    with pytest.raises(KeyboardInterrupt):
        in_processes(2, failing, ("waits", tmp_path), device="cpu", report=interrupt)
    assert len(list(tmp_path.iterdir())) == 2 and alive(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from hubforge.adapters._processes import in_processes
from tests.adapters.test_processes import failing
def kill(event):
    os.kill(os.getpid(), signal.SIGKILL)
in_processes(2, failing, ("waits", Path(sys.argv[1])), device="cpu", report=kill)
"""


def test_a_killed_caller_leaves_none_behind(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    deadline = time.monotonic() + 10
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(tmp_path) == []
