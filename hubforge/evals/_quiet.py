"""Keep what libraries print off the terminal: a run has one voice, the reporter's. What matters becomes a warning."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_TALKERS = (
    "lm_eval",
    "transformers",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "absl",
    "httpx",
    "filelock",
    "fsspec",
)
# lm-eval warns of these on every run of ours: each is something we do on purpose.
_EXPECTED = re.compile(
    r"`pretrained` model kwarg is not of type|Overwriting default num_fewshot|specified through cli"
    r"|overrides existing task|Custom kwargs can be passed|is defined, but (aggregation|higher_is_better) is not"
    r"|Passed an already-initialized model"
    r"|No `until` specified|No `generation_kwargs` specified|was called with the chat_template set to"
)
_MOST = 5  # warnings of one kind of library per step; the rest would say the same


class _Listener(logging.Handler):
    """Hands each distinct warning of lm-eval on, once; drops what other libraries say short of an error."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.warn = warn
        self.heard: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not (record.name.startswith("lm_eval") or record.levelno >= logging.ERROR) or _EXPECTED.search(text):
            return
        kind = re.sub(r"\d+", "#", text)
        if kind not in self.heard and len(self.heard) < _MOST:
            self.heard.add(kind)
            self.warn(f"{record.name.partition('.')[0]}: {text}")


@contextmanager
def quiet(warn: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, lm-eval, Transformers and Datasets print nothing; lm-eval's warnings go to `warn`.

    Only what was set before is touched, and everything is put back: the process may have others to serve.
    """
    listener = _Listener(warn)
    bars = list(_progress_bars())  # first: a library sets up its logger when it is imported
    with ExitStack() as stack:
        for name in _TALKERS:
            stack.enter_context(_routed(logging.getLogger(name), listener))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(
            _replaced(sys, "dont_write_bytecode", True)
        )  # a task's folder is an input: nothing is added
        for bar in bars:
            stack.enter_context(bar)
        yield


@contextmanager
def _routed(logger: logging.Logger, listener: logging.Handler) -> Iterator[None]:
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    logger.handlers[:], logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def _progress_bars() -> Iterator[Any]:
    """For each library that draws bars of its own, a context in which it does not."""
    from transformers.utils import logging as transformers_logging

    for library in filter(None, map(sys.modules.get, ("datasets.utils", "huggingface_hub.utils"))):
        yield _switched_off(
            getattr(library, "are_progress_bars_disabled"),  # noqa: B009 - re-exported, but not by name
            getattr(library, "disable_progress_bars"),  # noqa: B009
            getattr(library, "enable_progress_bars"),  # noqa: B009
        )
    yield _switched_off(
        lambda: not transformers_logging.is_progress_bar_enabled(),
        transformers_logging.disable_progress_bar,
        transformers_logging.enable_progress_bar,
    )
    if (task := sys.modules.get("lm_eval.api.task")) is not None:
        # Building the prompts draws a bar that no argument turns off.
        yield _replaced(task, "tqdm", lambda items, **_: items)


@contextmanager
def _switched_off(is_off: Callable[[], bool], off: Callable[[], Any], on: Callable[[], Any]) -> Iterator[None]:
    was_off = is_off()
    off()
    try:
        yield
    finally:
        if not was_off:
            on()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def offline(is_offline: bool) -> Iterator[None]:
    """While it lasts, Datasets and the Hub's client use only what they have; both read the switch at import."""
    import datasets.config
    import huggingface_hub.constants

    if not is_offline:
        yield
        return
    with (
        _replaced(datasets.config, "HF_HUB_OFFLINE", True),
        _replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield
