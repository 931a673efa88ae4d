"""A network that breaks: passes a Hub's port through, and cuts it where it is told to.

    hubforge hub serve --port 8000
    python bench/cut.py --after 2MB:3 --after 3MB:20
    HUBFORGE_HUB_TOKEN=local hubforge publish recipes/demo.yaml --to http://127.0.0.1:8001

Each `--after SIZE:SECONDS` waits until so much was sent to the Hub since the cut before, then drops every connection in
the middle of what it carries, and refuses new ones for so many seconds. After the last cut it only passes through.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress

UNITS = {"kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}


class Network:
    def __init__(self, hub: int, cuts: list[tuple[int, float]]) -> None:
        self.hub, self.cuts, self.sent, self.down = hub, cuts, 0, False
        self.open: set[asyncio.StreamWriter] = set()

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.transport.abort()
            return
        there, away = await asyncio.open_connection("127.0.0.1", self.hub)
        self.open |= {writer, away}
        if self.down:  # cut while it was connecting
            writer.transport.abort()
            away.transport.abort()
        try:
            await asyncio.gather(self.carry(reader, away, counted=True), self.carry(there, writer, counted=False))
        finally:
            self.open -= {writer, away}

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
                self.sent += len(data) if counted else 0
                if self.cuts and self.sent >= self.cuts[0][0]:
                    await self.cut(*self.cuts.pop(0))
        with suppress(ConnectionError):
            writer.close()

    async def cut(self, size: int, seconds: float) -> None:
        print(f"cut after {self.sent:,} bytes, for {seconds:g} s", flush=True)
        self.sent, self.down = 0, True
        for writer in list(self.open):
            writer.transport.abort()
        asyncio.get_running_loop().call_later(seconds, self.mend)

    def mend(self) -> None:
        self.down = False
        print("mended", flush=True)


def cut(text: str) -> tuple[int, float]:
    size, _, seconds = text.partition(":")
    return int(float(size[:-2]) * UNITS[size[-2:]]), float(seconds or 3)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", type=int, default=8000, help="the Hub's port")
    parser.add_argument("--port", type=int, default=8001, help="the port to use instead")
    parser.add_argument("--after", type=cut, action="append", default=[], help="SIZE:SECONDS, such as 2MB:3")
    options = parser.parse_args()
    network = Network(options.hub, options.after)
    server = await asyncio.start_server(network.client, "127.0.0.1", options.port)
    print(f"http://127.0.0.1:{options.port} leads to http://127.0.0.1:{options.hub}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
