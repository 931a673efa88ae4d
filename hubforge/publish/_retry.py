"""When a call to the Hub is tried again, and after how long.

| what happened                                    | rule                                                       |
|--------------------------------------------------|------------------------------------------------------------|
| 429 that says when (RateLimit r=0, Retry-After)  | wait as long as it says                                    |
| 429 that does not (commits per hour)             | wait 30, 60, 120, 240, 480 s, then 600 s at a time         |
| 408, 500, 502, 503, 504                          | wait 1, 2, 4, 8, 16 s, then give up                        |
| no answer came (timeout, reset)                  | the same                                                   |
| either of the two above, on a commit             | the same, but look first: when the branch has it, it is done |
| nothing answers (connection refused)             | wait 1, 2 s, then give up: most often the address is wrong |
| 412 on a commit                                  | never resent: what to push is planned afresh               |
| any other 4xx; an answer not understood          | never                                                      |

All waiting of one push stays below `Hub.patience` seconds together, and each wait is reported before it begins.
Calls that huggingface_hub retries by itself (`client_retries=True`) get no second helping of the short waits: it has
already waited 1, 2, 4, 8 and 8 s.

Sources: huggingface_hub 2.4 `utils/_http.py` (which calls it retries, and how); RateLimit header:
draft-ietf-httpapi-ratelimit-headers-09; the quota that the header does not show: braindecode/braindecode#947.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from hubforge.events import Report, Warned, silent
from hubforge.publish._explain import HubError

T = TypeVar("T")

_SHORT: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
_QUOTA = (30.0, 60.0, 120.0, 240.0, 480.0)


@dataclass
class Retry:
    """The waiting that one push may do. `sleep` is what waits, so that tests need not."""

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
        tries = 0
        while True:
            try:
                return function()
            except HubError as error:
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
        if wait is None or not self.has_patience_for(wait):
            raise error
        self.report(Warned(self.step, f"{error.what}; trying again in {wait:.0f} s"))
        self.waited += wait
        self.sleep(wait)

    def has_patience_for(self, wait: float) -> bool:
        return self.waited + wait <= self.patience
