"""When a call to the Hub is tried again, and after how long.

| what happened                                    | rule                                                       |
|--------------------------------------------------|------------------------------------------------------------|
| 429 that says when (RateLimit r=0, Retry-After)  | wait as long as it says                                    |
| 429 that does not (commits per hour)             | wait 30, 60, 120, 240, 480 s, then 600 s at a time         |
| 408, 500, 502, 503, 504                          | wait 1, 2, 4, 8, 16 s, then give up                        |
| no answer came (timeout, reset)                  | the same                                                   |
| either of the two above, on a commit             | the same, but look first: when the branch has it, it is done |
| nothing answers (connection refused)             | wait 1, 2 s, then give up: most often the address is wrong |
| 412 on a commit, 409 on a merge                  | never resent: what to push is planned afresh               |
| 401 in mid-release                               | a keyless job takes a new token and asks once more         |
| an upload that moves less than 64 KiB in 60 s    | broken off and sent again, by the client's own retries     |
| any other 4xx; an answer not understood          | never                                                      |

All waiting of one publish stays below `Hub.patience` seconds together (`--patience`), over all its repositories. Each
wait is reported before it begins, and the progress line counts its seconds.
Calls that huggingface_hub retries by itself (`client_retries=True`) get no second helping of the short waits: it has
already waited 1, 2, 4, 8 and 8 s.

Sources: huggingface_hub 2.4 `utils/_http.py` (which calls it retries, and how); RateLimit header:
draft-ietf-httpapi-ratelimit-headers-09; the quota that the header does not show: braindecode/braindecode#947.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from hubforge.events import Progress, Report, Warned, silent
from hubforge.publish._explain import HubError

T = TypeVar("T")

_SHORT: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
_QUOTA = (30.0, 60.0, 120.0, 240.0, 480.0)


@dataclass
class Retry:
    """The waiting that one publish may do. `sleep` is what waits, so that tests need not."""

    report: Report = silent
    step: str = ""
    patience: float = 1800.0
    sleep: Callable[[float], None] = field(default_factory=lambda: time.sleep)
    waited: float = field(default=0.0, init=False)

    def call(self, function: Callable[[], T], *, client_retries: bool = False, resend: bool = True) -> T:
        """What `function` returns, tried again by the table above.

        resend=False: the call must not be sent twice unless it surely did nothing; when in doubt the error is raised,
        and the caller looks at what is there.
        """
        tries, doubted = 0, False
        while True:
            try:
                return function()
            except HubError as error:
                error.doubted = doubted
                doubted = doubted or error.in_doubt
                if not resend and error.in_doubt:
                    raise
                self.pause(error, tries, client_retries=client_retries)
                tries += 1

    def wait_for(self, error: HubError, tries: int, *, client_retries: bool = False) -> float | None:
        """Seconds to wait after that many tries failed before this one; None: do not try again."""
        if error.status == 429:
            if error.wait is not None:
                return error.wait
            return _QUOTA[tries] if tries < len(_QUOTA) else 600.0
        if error.trouble == "unreachable":
            waits = _SHORT[:2]
        elif error.in_doubt:
            waits = _SHORT
        else:
            return None
        return waits[tries] if tries < len(waits) and not client_retries else None

    def pause(self, error: HubError, tries: int, *, client_retries: bool = False) -> None:
        """Wait as `wait_for` says, after reporting why; raises the error when there is nothing to wait for."""
        wait = self.wait_for(error, tries, client_retries=client_retries)
        if wait is None:
            raise error
        if not self.has_patience_for(wait):
            if error.status == 429 or self.waited:
                raise out_of_patience(error, wait, self.patience) from error
            raise error
        self.report(Warned(self.step, f"{error.what}; trying again in {wait:.0f} s"))
        self.wait(wait, "waiting for the Hub")

    def wait(self, seconds: float, what: str) -> None:
        """Sleep for so long, which counts against patience, while the progress line counts the seconds."""
        self.waited += seconds
        over = threading.Event()

        def show() -> None:
            began = time.monotonic()
            while not over.wait(1.0):
                spent = min(seconds, time.monotonic() - began)
                self.report(Progress(self.step, what, float(int(spent)), seconds, "s"))

        showing = threading.Thread(target=show, daemon=True)
        showing.start()
        try:
            self.sleep(seconds)
        finally:
            over.set()
            showing.join()

    def has_patience_for(self, wait: float) -> bool:
        return self.waited + wait <= self.patience


def out_of_patience(error: HubError, wait: float, patience: float) -> HubError:
    """The same error, with how to give it more time."""
    return HubError(
        f"{error.what}; it would take another {wait:.0f} s, and all waiting is to stay below {patience:.0f} s",
        where=error.where,
        mend="Run the same command again later (what is there is not sent twice), or give it time: --patience 2h.",
        status=error.status,
        trouble=error.trouble,
        wait=error.wait,
    )
