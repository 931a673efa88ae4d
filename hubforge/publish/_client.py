"""huggingface_hub's process-wide settings, set up for one Hub and put back.

The client keeps its transport, its progress bars and its HTTP client for the whole process. `Remote` sets them for as
long as it is open; a lock keeps two threads from having one open at once, so pushes run one after another.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hubforge.errors import shown
from hubforge.events import Warned
from hubforge.publish._explain import explain, scrubbed

if TYPE_CHECKING:
    import httpx2

    from hubforge.publish._remote import Remote

_LOCK = threading.RLock()
_CONNECT, _SILENCE = 15.0, 300.0  # seconds; without them the client waits for ever. Large commits take minutes.
STALLED = 60.0  # seconds in which an upload must move; it is else broken off and sent again
_OPEN: list[Remote] = []  # the innermost last: whose request it is that is going on


def has_xet(endpoint: str) -> bool:
    """Whether files go there by xet. huggingface.co stores by xet; elsewhere LFS always works and xet seldom.

    The client does not negotiate: with xet and a Hub that has none, the first large file fails
    (huggingface_hub#4507), so the transport is chosen by the address.
    """
    host = (urlsplit(endpoint).hostname or "").lower()
    return host == "huggingface.co" or host.endswith(".huggingface.co")


_ADDRESS = re.compile(r"(https?://[^/\s]+)[^\s]*")


class _ToReport(logging.Handler):
    """Turns the client's warnings ("Retrying in 4s") into events, so that they neither get lost nor tear a display.

    It warns of a failed request, and then of the wait before the next: the two are told as one. After its last try only
    the first comes, which is not told: what it raises says the same.
    """

    _failed = threading.local()  # it uploads several files at a time, each in a thread

    def emit(self, record: logging.LogRecord) -> None:
        # A signed upload address is a secret for as long as it holds, and nothing that anybody wants to read.
        text = _ADDRESS.sub(r"\1", record.getMessage())
        before, self._failed.text = getattr(self._failed, "text", ""), ""
        if " thrown while requesting " in text:
            self._failed.text = text
            return
        waits = text.startswith(("Retrying in ", "Rate limited. "))
        _tell(f"{before[:200]}; {text}" if before and waits else text)


def _tell(text: str) -> None:
    remote = _OPEN[-1]
    remote.report(Warned(remote.step, shown(" ".join(scrubbed(text, remote.hub).split()), 300)))


def _heed(response: httpx2.Response) -> None:
    """Stop the client from sleeping for longer than the user would: it waits as long as a 429 tells it."""
    from huggingface_hub import hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError

    if response.status_code == 429:
        remote = _OPEN[-1]
        response.read()
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            ours = explain(error, remote.hub, remote.repo, "go on")
            if ours.wait is not None and not remote.retry.has_patience_for(ours.wait):
                raise ours from error


def _bound(request: httpx2.Request) -> None:
    """Bound every silence. Not by the client's default: model_info and others ask for no limit by name."""
    import httpx2

    limits = httpx2.Timeout(_SILENCE, connect=_CONNECT, write=STALLED, pool=None).as_dict()
    asked = request.extensions.get("timeout") or {}
    known = {name: seconds for name, seconds in asked.items() if seconds is not None}
    request.extensions = {**request.extensions, "timeout": {**limits, **known}}


@contextmanager
def client_settings(remote: Remote) -> Iterator[None]:
    """huggingface_hub set up for this Hub, and as it was before when this ends.

    Within another one for the same Hub it keeps the client, and so its connection and certificates.
    """
    with _LOCK, ExitStack() as stack:
        if not (_OPEN and _OPEN[-1].endpoint == remote.endpoint):
            stack.enter_context(_set_up(remote.endpoint))
        _OPEN.append(remote)
        try:
            yield
        finally:
            _OPEN.pop()


@contextmanager
def _set_up(endpoint: str) -> Iterator[None]:
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http as client_module

    bars = import_module("huggingface_hub.utils.tqdm")  # an import statement would find the class of that name
    with warnings.catch_warnings():
        xet_was_off, bars_were_off = constants.HF_HUB_DISABLE_XET, bars.are_progress_bars_disabled()
        # There is no public way to ask which factory is set; a user's own (proxy, certificates) must survive.
        factory = client_module._GLOBAL_CLIENT_FACTORY
        logger, handler = logging.getLogger("huggingface_hub"), _ToReport(logging.WARNING)
        handlers, propagate = list(logger.handlers), logger.propagate

        def patient() -> httpx2.Client:
            client = factory()
            hooks = client.event_hooks
            client.event_hooks = {"request": [*hooks["request"], _bound], "response": [*hooks["response"], _heed]}
            return client

        def told(message: Warning | str, *_: object, **__: object) -> None:
            _tell(str(message))

        try:
            if not has_xet(endpoint):
                constants.HF_HUB_DISABLE_XET = True
            if not bars_were_off:
                bars.disable_progress_bars()
            set_client_factory(patient)
            logger.handlers, logger.propagate = [handler], False
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = told
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = xet_was_off
            if not bars_were_off:
                bars.enable_progress_bars()
            set_client_factory(factory)
            logger.handlers, logger.propagate = handlers, propagate
