"""A GGUF that one can ask for tokens, logits and text, held by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from hubforge.errors import StepError
from hubforge.llama_cpp.header import read_header
from hubforge.processes import child_environment, cpu_threads, ending, last_lines

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np

_WORTH_THREADS = 100_000_000  # parameters


class GgufModel:
    """A loaded GGUF. A context manager; `close()` ends its process.

    path: a .gguf file. context: tokens that prompt and answer may take together. threads: default 1 for a model below
    100 million parameters, else as `cpu_threads`.
    gpu: put all layers on the GPU, where the library can. seed: of generations that name none.
    library: "llama_cpp" or "cyllama"; default the first of them that is installed.
    Raises SourceError when the file is not a whole GGUF, StepError when llama.cpp cannot load it, fails or dies.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    """Whether the GGUF says that a prompt starts with `bos_id`."""
    adds_space: bool
    """Whether tokenizing puts a space before the text, as SentencePiece does."""
    chat_template: str | None
    """The GGUF's own Jinja text."""
    library: str
    """What runs it: "cyllama 0.2.18 (llama.cpp b9190)"."""

    def __init__(
        self,
        path: Path,
        *,
        context: int = 2048,
        threads: int | None = None,
        gpu: bool = False,
        seed: int = 0,
        library: str | None = None,
    ) -> None:
        header = read_header(path)  # What is wrong with a file is said better here than by C++.
        if threads is None:
            # llama.cpp's threads meet after every operation: for a tiny model, on busy cores, that costs ten times more
            # than it brings.
            threads = 1 if header.parameters < _WORTH_THREADS else cpu_threads()
        self.path, self.context, self.seed = path, context, seed
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        settings = {"path": str(path), "context": context, "threads": threads, "gpu": gpu}
        if library is not None:
            settings["library"] = library
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hubforge.llama_cpp.worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child_environment(),
        )
        try:
            facts, _ = self._receive(loading=True)
        except BaseException:
            self.close()
            raise
        self.vocab_size, self.bos_id, self.eos_id = facts["vocab_size"], facts["bos_id"], facts["eos_id"]
        self.adds_space = facts["adds_space"]
        self.adds_bos, self.chat_template, self.library = facts["adds_bos"], facts["chat_template"], facts["library"]

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process and free what it held. May be called again."""
        if self._process.poll() is None:
            self._process.kill()  # It writes nothing, so there is nothing to let it finish.
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):
                    stream.close()

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        """Token ids. special: read `<|eot_id|>` and its like in the text as the tokens they name."""
        facts, _ = self._ask("tokenize", text=text, special=special)
        start = [self.bos_id] if add_bos and self.bos_id is not None else []
        return start + [int(token) for token in facts["ids"]]

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of those tokens. special: show control tokens too."""
        facts, _ = self._ask("detokenize", ids=[int(token) for token in ids], special=special)
        return str(facts["text"])

    def logits(self, ids: Sequence[int], *, start: int = 0) -> np.ndarray:
        """(len(ids) - start, vocab_size) float32: row i predicts the token after ids[start + i]."""
        import numpy as np

        facts, payload = self._ask("logits", ids=[int(token) for token in ids], start=start)
        return np.frombuffer(payload, dtype=np.float32).reshape(facts["shape"])

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """The text that follows, without control tokens, ending before the first stop string.

        temperature: 0 takes the likeliest token each time. No penalties, no top-k, no top-p.
        """
        facts, _ = self._ask(
            "generate",
            ids=[int(token) for token in ids],
            max_tokens=max_tokens,
            stop=[text for text in stop if text],
            temperature=temperature,
            seed=self.seed if seed is None else seed,
        )
        return str(facts["text"])

    def _ask(self, what: str, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        if self._log.closed:
            raise StepError("this GGUF was closed", where=str(self.path))
        stdin = cast("IO[bytes]", self._process.stdin)
        try:
            stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return self._receive()

    def _receive(self, loading: bool = False) -> tuple[dict[str, Any], bytes]:
        stdout = cast("IO[bytes]", self._process.stdout)
        line = stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        facts: dict[str, Any] = json.loads(line)
        if "error" in facts:
            mend = self._last_words() if loading else ""
            raise StepError(f"llama.cpp: {facts['error']}", where=str(self.path), mend=mend)
        payload = stdout.read(facts["bytes"])
        if len(payload) != facts["bytes"]:
            raise self._death()
        return facts, payload

    def _death(self) -> StepError:
        how = ending(self._process.wait())
        return StepError(
            f"the process that ran this GGUF ended with {how}", where=str(self.path), mend=self._last_words()
        )

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        return last_lines(self._log.read().decode(errors="replace"))
