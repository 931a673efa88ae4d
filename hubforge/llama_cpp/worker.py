"""The other end of `runtime.GgufModel`: holds one GGUF and answers requests on stdin until stdin closes.

A request is one line of JSON. An answer is one line of JSON, then as many raw bytes as its "bytes" says. Whatever the
C++ prints goes to stderr, so it cannot get between.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from hubforge.llama_cpp.backends import Backend, open_backend

if TYPE_CHECKING:
    import numpy as np

_OUTPUT_BYTES = 64 << 20  # llama.cpp keeps a float32 row of the vocabulary for every position it was asked for.


class Session:
    """One GGUF, loaded; a method per request."""

    def __init__(self, backend: Backend, context: int) -> None:
        self.backend, self.context = backend, context
        self.piece = cache(backend.piece)

    def describe(self) -> dict[str, Any]:
        backend = self.backend
        return {
            "vocab_size": backend.vocab_size,
            "bos_id": backend.bos_id,
            "eos_id": backend.eos_id,
            "adds_bos": backend.adds_bos,
            "adds_space": backend.adds_space,
            "chat_template": backend.chat_template,
            "library": backend.library,
        }

    def tokenize(self, text: str, special: bool) -> dict[str, Any]:
        return {"ids": self.backend.tokenize(text, special)}

    def detokenize(self, ids: list[int], special: bool) -> dict[str, Any]:
        return {"text": self.text(ids, special)}

    def text(self, ids: Sequence[int], special: bool) -> str:
        text = b"".join(self.piece(token, special) for token in ids).decode(errors="replace")
        return text.removeprefix(" ") if self.backend.adds_space else text

    def logits(self, ids: list[int], start: int) -> np.ndarray:
        import numpy as np

        self._check(ids)
        self.backend.clear()
        rows = np.empty((len(ids) - start, self.backend.vocab_size), dtype=np.float32)
        for first, last, wanted in self._chunks(len(ids), start):
            answer = self.backend.decode(ids[first:last], first, wanted)
            if wanted:
                rows[first - start : last - start] = answer
        return rows

    def generate(
        self, ids: list[int], max_tokens: int, stop: list[str], temperature: float, seed: int
    ) -> dict[str, Any]:
        import numpy as np

        self._check(ids)
        random = np.random.Generator(np.random.PCG64(seed))
        self.backend.clear()
        for first, last, wanted in self._chunks(len(ids), len(ids) - 1):
            row = self.backend.decode(ids[first:last], first, wanted)
        # Each token is at least one byte, so a stop string lies within as many tokens as it has bytes.
        window = max((len(text.encode()) for text in stop), default=0)
        made: list[int] = []
        while len(made) < max_tokens and len(ids) + len(made) < self.context:
            token = _draw(row[-1], temperature, random)
            if self.backend.is_end(token):
                break
            made.append(token)
            if stop and any(text in self.text(made[-window:], True) for text in stop):
                break
            if len(made) < max_tokens and len(ids) + len(made) < self.context:
                row = self.backend.decode([token], len(ids) + len(made) - 1, True)
        text = self.text(made, False)
        cuts = [at for at in (text.find(one) for one in stop) if at >= 0]
        return {"text": text[: min(cuts)] if cuts else text, "tokens": len(made)}

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ValueError("there are no tokens to start from")
        if len(ids) > self.context:
            raise ValueError(f"{len(ids)} tokens do not fit the context of {self.context}")
        wrong = next((token for token in ids if not 0 <= token < self.backend.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"token {wrong} is not in the vocabulary of {self.backend.vocab_size}")

    def _chunks(self, count: int, start: int) -> list[tuple[int, int, bool]]:
        """(first, last, logits wanted) of the batches to decode: none mixes, none asks for too many logits."""
        most = max(1, min(self.backend.batch, _OUTPUT_BYTES // (4 * self.backend.vocab_size)))
        before = [(at, min(at + self.backend.batch, start), False) for at in range(0, start, self.backend.batch)]
        return before + [(at, min(at + most, count), True) for at in range(start, count, most)]


def _draw(row: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """The likeliest token, or at a temperature above 0 one drawn from softmax(row / temperature)."""
    import numpy as np

    if temperature <= 0:
        return int(row.argmax())
    scaled = row.astype(np.float64) / temperature
    cumulative = np.exp(scaled - scaled.max()).cumsum()
    # min: rounding may leave the last sum below the number drawn.
    return min(int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")), len(row) - 1)


def serve(session: Session, requests: IO[bytes], answers: IO[bytes]) -> None:
    import numpy as np

    def answer(facts: dict[str, Any], payload: bytes = b"") -> None:
        answers.write(json.dumps({**facts, "bytes": len(payload)}).encode() + b"\n")
        answers.write(payload)
        answers.flush()

    answer(session.describe())
    for line in requests:
        request = json.loads(line)
        method: Callable[..., Any] = getattr(session, request.pop("do"))
        try:
            result = method(**request)
        except (ValueError, RuntimeError, MemoryError) as error:
            answer({"error": str(error) or type(error).__name__})
            continue
        if isinstance(result, np.ndarray):
            answer({"shape": result.shape}, result.tobytes())
        else:
            answer(result)


def main() -> int:
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; we end when it closes our stdin.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        backend = open_backend(**settings)
    except Exception as error:  # Whatever the library finds wrong with the file is what the user must read.
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}", "bytes": 0}).encode() + b"\n")
        answers.flush()
        return 1
    serve(Session(backend, settings["context"]), sys.stdin.buffer, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
