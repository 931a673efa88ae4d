"""What every verb prints alike: data as JSON, and words in colour."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]


def emit(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def colour(text: str, code: int) -> str:
    """Text in an ANSI colour on a terminal that wants it; plain in a pipe, and where NO_COLOR is set."""
    wanted = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"\033[{code}m{text}\033[0m" if wanted else text
