"""`python -m hubforge.hub FOLDER`: serve a folder as a Hub."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hubforge.errors import HubforgeError
from hubforge.hub.server import serve, write_record
from hubforge.hub.settings import HubSettings, Token


def read_tokens(path: Path) -> dict[str, Token | str]:
    """Tokens from a JSON file: `{"hf_abc": "ann", "hf_def": {"user": "bot", "role": "read", "orgs": ["team"]}}`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tokens: dict[str, Token | str] = {}
        for secret, value in data.items():
            if isinstance(value, dict):
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
                value = Token(**fields)
            elif not isinstance(value, str):
                raise TypeError("a token opens a user's name or an object")
            tokens[secret] = value
        return tokens
    except OSError as error:
        raise HubforgeError(f"the file of tokens cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise HubforgeError(
            "the file of tokens is not understood",
            where=str(path),
            mend='Write {"TOKEN": "USER"} or {"TOKEN": {"user": "USER", "role": "read", "orgs": []}}.',
        ) from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hubforge.hub", description="Serve a folder as a Hub.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--user", default="local", help="who any token is, when there are no --tokens")
    parser.add_argument("--tokens", type=Path, help="a JSON file of token: user; needed to listen beyond loopback")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

    def ready(endpoint: str) -> None:
        if options.record:
            write_record(options.record, endpoint)
        sys.stdout.write(f"{endpoint}\n")
        sys.stdout.flush()

    try:
        settings = HubSettings(user=options.user, tokens=read_tokens(options.tokens) if options.tokens else {})
        serve(options.folder, options.host, options.port, settings=settings, ready=ready)
    except HubforgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
