"""`python -m hubforge.hub FOLDER`: serve a folder as a Hub."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from hubforge.errors import HubforgeError
from hubforge.hub.config import read_settings, read_tokens
from hubforge.hub.server import serve, write_record
from hubforge.hub.settings import HubSettings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hubforge.hub", description="Serve a folder as a Hub.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--user", help="who any token is, when there are no --tokens")
    parser.add_argument("--tokens", type=Path, help="a JSON file of token: user; needed to listen beyond loopback")
    parser.add_argument("--settings", type=Path, help="a JSON file of settings: quotas, trusted publishers, ...")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

    def ready(endpoint: str) -> None:
        if options.record:
            write_record(options.record, endpoint)
        sys.stdout.write(f"{endpoint}\n")
        sys.stdout.flush()

    try:
        settings = read_settings(options.settings) if options.settings else HubSettings()
        if options.user:
            settings = dataclasses.replace(settings, user=options.user)
        if options.tokens:
            settings = dataclasses.replace(settings, tokens=read_tokens(options.tokens))
        serve(options.folder, options.host, options.port, settings=settings, ready=ready)
    except HubforgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
