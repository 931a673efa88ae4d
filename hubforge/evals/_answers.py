"""What a model has answered so far: counted for the progress bar, and kept so that a killed eval goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FILE = "answers.partial.jsonl"


class Answers:
    """Takes the place of lm-eval's cache hook, which every model calls with each answer as it comes.

    path: where generated text is kept while the eval runs. batch_size: of the model; what a killed run left is cut to
    whole batches, so that the rest meets the same neighbours (padding moves the last bits of a batch's numbers).
    """

    dbdict = None  # lm-eval asks whether there is a database behind the hook

    def __init__(self, path: Path, batch_size: int, progress: Callable[[int, int], None]) -> None:
        self.path, self.progress = path, progress
        self.done = self.total = 0
        kept = _read(path)
        self.kept = dict(kept[: len(kept) // batch_size * batch_size])
        with path.open("w", encoding="utf-8") as file:
            file.writelines(_line(key, text) for key, text in self.kept.items())

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """One more answer; called by lm-eval's models."""
        if kind == "generate_until" and not _is_drawn(request):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(_key(request), answer))
        self.count(1)

    def complete(self, requests: Sequence[Any], generate: Callable[[list[Any]], list[str]]) -> list[str]:
        """The answers to all the requests, those already kept not asked again."""
        asked = [request for request in requests if _is_drawn(request.args) or _key(request.args) not in self.kept]
        self.expect(len(requests))
        self.count(len(requests) - len(asked))
        fresh = iter(generate(asked) if asked else [])
        return [
            self.kept[key] if not _is_drawn(request.args) and (key := _key(request.args)) in self.kept else next(fresh)
            for request in requests
        ]

    def get(self, request: Sequence[Any]) -> str | None:
        """The answer that a killed run had to this request."""
        return self.kept.get(_key(request))

    def expect(self, more: int) -> None:
        self.total += more

    def count(self, more: int) -> None:
        self.done += more
        self.progress(self.done, self.total)


def _is_drawn(request: Sequence[Any]) -> bool:
    """Whether the answer is sampled: the same request is then to be answered anew each time."""
    return bool(request[1].get("do_sample"))


def _key(request: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(request), sort_keys=True, default=str).encode()).hexdigest()


def _line(key: str, text: str) -> str:
    return json.dumps([key, text], ensure_ascii=False) + "\n"


def _read(path: Path) -> list[tuple[str, str]]:
    """The whole lines of the file; a kill may have cut the last one short."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        try:
            key, text = json.loads(line)
        except ValueError:
            break
        kept.append((str(key), str(text)))
    return kept
