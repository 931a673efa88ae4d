"""One of several processes: `python -m hubforge.adapters._rank FOLDER`, as `_processes` starts it."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from hubforge.adapters._processes import Raised, Returned
from hubforge.events import silent
from hubforge.processes import exit_with_parent

_PATIENCE = timedelta(minutes=30)  # of those that wait while the first measures and writes; it is accelerate's


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends us.
    exit_with_parent()
    # Messages go out where stdout was; whatever libraries print goes to stderr, and cannot get between.
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            pickle.dump(message, messages)
            messages.flush()

    code = 0
    try:
        send(Returned(_work(Path(sys.argv[1]), send)))
    except BaseException as error:
        send(Raised(_sendable(error), traceback.format_exc()))
        code = 1
    os._exit(code)  # At once: what torch would wait for at exit may wait for a process that has failed.


def _work(folder: Path, send: Any) -> Any:
    """Join the others, do the work; its value in the first process."""
    import torch
    import torch.distributed as dist

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    work, arguments, device = pickle.loads((folder / "call").read_bytes())
    cuda = device != "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    # A file to meet in: a free port may be taken before it is used.
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(str(folder / "store"), count),
        rank=rank,
        world_size=count,
        timeout=_PATIENCE,
        device_id=torch.device("cuda", rank) if cuda else None,
    )
    value = work(*arguments, send if rank == 0 else silent)
    dist.barrier()  # Until the first has written, the others are there to be killed.
    dist.destroy_process_group()
    return value if rank == 0 else None


def _sendable(error: BaseException) -> BaseException:
    """The error, or its words where it would not come through."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Its class has an odd constructor, or it holds what cannot be sent.
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main()
