"""`python -m hubforge.lab FOLDER [SEED]`: build the family there."""

from __future__ import annotations

import sys
from pathlib import Path

from hubforge.errors import HubforgeError

from .build import build


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2 or (len(arguments) == 2 and not arguments[1].isdigit()):
        sys.stderr.write("usage: python -m hubforge.lab FOLDER [SEED]\n")
        return 2
    try:
        build(
            Path(arguments[0]),
            seed=int(arguments[1]) if arguments[1:] else 0,
            report=say,
        )
    except HubforgeError as error:
        say(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
