"""huggingface_hub's process-wide settings, set up for one Hub and put back.

The client keeps its transport, its progress bars and its HTTP client for the whole process. `Remote` sets them for as
long as it is open; a lock keeps two threads from having one open at once, so pushes run one after another.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hubforge.events import Warned
from hubforge.publish._explain import explain, scrubbed
from hubforge.publish._paths import shown

if TYPE_CHECKING:
    from hubforge.publish._remote import Remote

_LOCK = threading.RLock()
_CONNECT, _SILENCE = 15.0, 300.0  # seconds; without them the client waits for ever. Large commits take minutes.
_STALLED = 60.0  # seconds in which an upload must move; it is then broken off and sent again


def has_xet(endpoint: str) -> bool:
    """Whether files go there by xet. huggingface.co stores by xet; elsewhere LFS always works and xet seldom.

    The client does not negotiate: with xet and a Hub that has none, the first large file fails
    (huggingface_hub#4507), so the transport is chosen by the address.
    """
    host = (urlsplit(endpoint).hostname or "").lower()
    return host == "huggingface.co" or host.endswith(".huggingface.co")


class _ToReport(logging.Handler):
    """Turns the client's warnings ("Retrying in 4s") into events, so that they neither get lost nor tear a display."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(logging.WARNING)
        self.remote = remote

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(scrubbed(record.getMessage(), self.remote.hub).split())
        self.remote.report(Warned(self.remote.step, shown(text, 300)))


@contextmanager
def client_settings(remote: Remote) -> Iterator[None]:
    """huggingface_hub set up for this Hub, and as it was before when this ends."""
    import httpx2
    from huggingface_hub import constants, hf_raise_for_status, set_client_factory
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import _http as client_module

    bars = import_module("huggingface_hub.utils.tqdm")  # an import statement would find the class of that name
    with _LOCK, warnings.catch_warnings():
        xet_was_off, bars_were_off = constants.HF_HUB_DISABLE_XET, bars.are_progress_bars_disabled()
        # There is no public way to ask which factory is set; a user's own (proxy, certificates) must survive.
        factory = client_module._GLOBAL_CLIENT_FACTORY
        logger, handler = logging.getLogger("huggingface_hub"), _ToReport(remote)
        handlers, propagate = list(logger.handlers), logger.propagate

        def heed(response: httpx2.Response) -> None:
            """Stop the client from sleeping for longer than the user would: it waits as long as a 429 tells it."""
            if response.status_code == 429:
                response.read()
                try:
                    hf_raise_for_status(response)
                except HfHubHTTPError as error:
                    ours = explain(error, remote.hub, remote.repo, "go on")
                    if ours.wait is not None and not remote.retry.has_patience_for(ours.wait):
                        raise ours from error

        def bound(request: httpx2.Request) -> None:
            """Bound every silence. Not by the client's default: model_info and others ask for no limit by name."""
            limits = httpx2.Timeout(_SILENCE, connect=_CONNECT, write=_STALLED, pool=None).as_dict()
            asked = request.extensions.get("timeout") or {}
            known = {name: seconds for name, seconds in asked.items() if seconds is not None}
            request.extensions = {**request.extensions, "timeout": {**limits, **known}}

        def patient() -> httpx2.Client:
            client = factory()
            hooks = client.event_hooks
            client.event_hooks = {"request": [*hooks["request"], bound], "response": [*hooks["response"], heed]}
            return client

        def told(message: Warning | str, *_: object, **__: object) -> None:
            remote.report(Warned(remote.step, shown(" ".join(scrubbed(str(message), remote.hub).split()), 300)))

        try:
            if not has_xet(remote.endpoint):
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
