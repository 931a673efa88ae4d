"""llama.cpp from Python, two ways: llama-cpp-python where the user has built it, else the prebuilt cyllama.

Both are used at the level of llama.cpp's own C calls (llama_decode, llama_get_logits_ith), so that neither's idea of
sampling, stopping or penalties comes in between. Imported by `worker` only, in the process that may crash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

_BATCH = 512  # tokens per llama_decode, and llama.cpp's own default for a micro-batch

_TOKENIZER_MODEL, _SPACE_PREFIX = "tokenizer.ggml.model", "tokenizer.ggml.add_space_prefix"
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # as SentencePiece writes a byte


class Backend(Protocol):
    """One GGUF with one context of one sequence."""

    library: str  # name and version, and the llama.cpp in it
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    adds_space: bool  # whether tokenizing puts a space before a text, which its pieces then begin with
    chat_template: str | None
    batch: int

    def tokenize(self, text: str, special: bool) -> list[int]: ...

    def piece(self, token: int, special: bool) -> bytes:
        """The bytes a token stands for; of a control token none, unless special.

        Not llama_detokenize: for several families, Llama 3 among them, it takes away spaces before punctuation.
        """

    def is_end(self, token: int) -> bool: ...

    def clear(self) -> None: ...

    def decode(self, ids: Sequence[int], position: int, wanted: bool) -> np.ndarray:
        """Logits after each of the tokens, (len(ids), vocab_size) float32; (0, vocab_size) unless wanted."""


def open_backend(path: str, context: int, threads: int, gpu: bool, library: str | None = None) -> Backend:
    """The GGUF at that path, by the library asked for, else by the better one installed."""
    known: dict[str, type[CyllamaBackend] | type[LlamaCppPythonBackend]] = {
        "llama_cpp": LlamaCppPythonBackend,
        "cyllama": CyllamaBackend,
    }
    for module, backend in known.items():
        if (library is None or library == module) and find_spec(module) is not None:
            return backend(path, context, threads, gpu)
    raise RuntimeError(f"none of {', '.join(known)} is installed" if library is None else f"{library} is not installed")


def _id(token: int) -> int | None:
    return token if token >= 0 else None  # llama.cpp's LLAMA_TOKEN_NULL is -1.


def _adds_space(metadata: Mapping[str, str]) -> bool:
    """As llama.cpp decides it: what the GGUF says, else yes for SentencePiece and no for the others."""
    said = metadata.get(_SPACE_PREFIX, "")
    return said == "true" if said else metadata.get(_TOKENIZER_MODEL) in ("llama", "t5")


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's letters for bytes, as byte-level vocabularies are written in. Source: openai/gpt-2, encoder.py."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


class CyllamaBackend:
    """cyllama >= 0.2.18, at its lower level."""

    def __init__(self, path: str, context: int, threads: int, gpu: bool) -> None:
        from cyllama.llama import llama_cpp as native

        class Model(native.LlamaModel):  # type: ignore[misc]
            # LlamaContext.get_logits_ith of 0.2.18 asks the model for n_vocab, which only its vocabulary has.
            @property
            def n_vocab(self) -> int:
                return int(self.get_vocab().n_vocab)

        native.llama_backend_init()
        model_params = native.LlamaModelParams()
        model_params.n_gpu_layers = 999 if gpu else 0
        self._model = Model(path, model_params)
        self._vocab = self._model.get_vocab()
        self.batch = min(_BATCH, context)
        params = native.LlamaContextParams()
        params.n_ctx, params.n_batch, params.n_ubatch = context, self.batch, self.batch
        params.n_threads = params.n_threads_batch = threads
        self._context = native.LlamaContext(self._model, params)
        self._tokens = native.LlamaBatch(n_tokens=self.batch, embd=0, n_seq_max=1)
        self.library = cyllama_version()
        self.vocab_size = int(self._vocab.n_vocab)
        self.bos_id, self.eos_id = _id(self._vocab.token_bos()), _id(self._vocab.token_eos())
        self.adds_bos = bool(self._vocab.get_add_bos())
        self.adds_space = _adds_space(self._model.metadata())
        self.chat_template: str | None = self._model.get_default_chat_template() or None

    def tokenize(self, text: str, special: bool) -> list[int]:
        return [int(token) for token in self._vocab.tokenize(text, False, special)]

    def piece(self, token: int, special: bool) -> bytes:
        piece = str(self._vocab.token_to_piece(token, 0, special))
        if _REPLACEMENT not in piece:
            return piece.encode()
        # Part of a character, which cyllama gives as a replacement: the vocabulary's own spelling tells which bytes.
        text = str(self._vocab.get_text(token))
        if byte := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(byte[1], 16)])
        known = _byte_of()
        return bytes(known[letter] for letter in text) if all(letter in known for letter in text) else piece.encode()

    def is_end(self, token: int) -> bool:
        return bool(self._vocab.is_eog(token))

    def clear(self) -> None:
        self._context.kv_cache_clear()

    def decode(self, ids: Sequence[int], position: int, wanted: bool) -> np.ndarray:
        import numpy as np

        self._tokens.reset()
        for offset, token in enumerate(ids):
            self._tokens.add(token, position + offset, [0], wanted)
        self._context.decode(self._tokens)
        rows = np.empty((len(ids) if wanted else 0, self.vocab_size), dtype=np.float32)
        for index in range(len(rows)):
            rows[index] = self._context.get_logits_ith(index)
        return rows


def cyllama_version() -> str:
    """Its version and the llama.cpp it was built from, as it says: "cyllama 0.2.18 (llama.cpp b9190)"."""
    import json
    from importlib.metadata import version
    from importlib.resources import files

    try:
        config: dict[str, Any] = json.loads((files("cyllama") / "build_config.json").read_text(encoding="utf-8"))
        return f"cyllama {version('cyllama')} (llama.cpp {config['versions']['llama_cpp_version']})"
    except (OSError, ValueError, KeyError):
        return f"cyllama {version('cyllama')}"


class LlamaCppPythonBackend:
    """llama-cpp-python >= 0.3.36, through its ctypes declarations."""

    def __init__(self, path: str, context: int, threads: int, gpu: bool) -> None:
        import llama_cpp as native

        self._native = native
        native.llama_backend_init()
        model_params = native.llama_model_default_params()
        model_params.n_gpu_layers = 999 if gpu else 0
        self._model = native.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load it")
        self._vocab = native.llama_model_get_vocab(self._model)
        self.batch = min(_BATCH, context)
        params = native.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, self.batch, self.batch
        params.n_threads = params.n_threads_batch = threads
        self._context = native.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._tokens = native.llama_batch_init(self.batch, 0, 1)
        self.library = f"llama-cpp-python {native.__version__}"
        self.vocab_size = int(native.llama_vocab_n_tokens(self._vocab))
        self.bos_id = _id(native.llama_vocab_bos(self._vocab))
        self.eos_id = _id(native.llama_vocab_eos(self._vocab))
        self.adds_bos = bool(native.llama_vocab_get_add_bos(self._vocab))
        self.adds_space = _adds_space({key: self._text(key) for key in (_TOKENIZER_MODEL, _SPACE_PREFIX)})
        template = native.llama_model_chat_template(self._model, None)
        self.chat_template: str | None = template.decode() if template else None

    def tokenize(self, text: str, special: bool) -> list[int]:
        raw = text.encode()
        tokens = (self._native.llama_token * (len(raw) + 2))()  # a token is at least one byte; two for a prefix
        count = self._native.llama_tokenize(self._vocab, raw, len(raw), tokens, len(tokens), False, special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize wants room for {-count} tokens")
        return list(tokens[:count])

    def piece(self, token: int, special: bool) -> bytes:
        import ctypes

        size = 64
        while True:
            text = ctypes.create_string_buffer(size)
            count = self._native.llama_token_to_piece(self._vocab, token, text, size, 0, special)
            if count >= 0:
                return text.raw[:count]
            size = -count

    def is_end(self, token: int) -> bool:
        return bool(self._native.llama_vocab_is_eog(self._vocab, token))

    def _text(self, key: str) -> str:
        """The metadata under that key as text, "" when there is none."""
        import ctypes

        text = ctypes.create_string_buffer(64)
        count = self._native.llama_model_meta_val_str(self._model, key.encode(), text, len(text))
        return text.value.decode() if count >= 0 else ""

    def clear(self) -> None:
        self._native.llama_memory_clear(self._native.llama_get_memory(self._context), True)

    def decode(self, ids: Sequence[int], position: int, wanted: bool) -> np.ndarray:
        import numpy as np

        tokens = self._tokens
        tokens.n_tokens = len(ids)
        for offset, token in enumerate(ids):
            tokens.token[offset] = token
            tokens.pos[offset] = position + offset
            tokens.n_seq_id[offset] = 1
            tokens.seq_id[offset][0] = 0
            tokens.logits[offset] = wanted
        if (code := self._native.llama_decode(self._context, tokens)) != 0:
            raise RuntimeError(f"llama_decode failed with code {code}")
        rows = np.empty((len(ids) if wanted else 0, self.vocab_size), dtype=np.float32)
        for index in range(len(rows)):
            pointer = self._native.llama_get_logits_ith(self._context, index)
            rows[index] = np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
        return rows
