"""Run a helper of ours in a process of its own, follow what it prints, and have its file whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from hubforge.errors import StepError
from hubforge.processes import child_environment, ending, last_lines

UNFINISHED = ".unfinished-"  # how the name of a file being written starts; a killed run leaves such a file
_NEXT_TO_NOTHING = 256 << 10  # bytes; a block of a tensor that did not fit may have been larger than what is left
_ENDS = re.compile(r"[\r\n]+")  # tqdm ends a line with a carriage return


def run_module(
    module: str, arguments: Sequence[str], *, what: str, where: str = "", on_line: Callable[[str], None] | None = None
) -> str:
    """What `python -m module arguments` printed on stdout; StepError when it failed, with the end of its stderr.

    what: what failed, for the error: "the conversion". on_line: gets each line of stderr as it comes.
    The child holds our end of a pipe as its stdin, and `exit_with_parent` in it ends it when we are killed.
    """
    with (
        tempfile.TemporaryFile() as printed,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=subprocess.PIPE,
            env=child_environment(),
        ) as process,
    ):
        try:
            tail = _follow(cast("IO[bytes]", process.stderr), on_line)
            returncode = process.wait()
        except BaseException:
            process.kill()
            raise
        if returncode != 0:
            raise StepError(f"{what} ended with {ending(returncode)}", where=where, mend=last_lines(tail))
        printed.seek(0)
        return printed.read().decode(errors="replace")


def _follow(stream: IO[bytes], on_line: Callable[[str], None] | None) -> str:
    """Read to the end, pass each line on, and return the last 16 kB."""
    tail = rest = ""
    while chunk := os.read(stream.fileno(), 65536):
        text = chunk.decode(errors="replace")
        tail = (tail + text)[-16384:]
        *lines, rest = _ENDS.split(rest + text)
        if on_line is not None:
            for line in filter(None, lines):
                on_line(line)
    return tail.replace("\r", "\n")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A name beside `target` to write to: it becomes `target` when all went well, and nothing is left when not.

    A tool that failed on a full disk raises OSError (ENOSPC) here, however it put it itself.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=UNFINISHED, suffix=target.suffix)
    os.close(descriptor)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o644)  # mkstemp makes files that only their owner may read.
        unfinished.replace(target)
    except StepError as error:
        if shutil.disk_usage(target.parent).free < _NEXT_TO_NOTHING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)
