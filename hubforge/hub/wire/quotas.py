"""Quotas: so many requests of each kind in a window, so many commits an hour. Off unless the settings name them.

The real Hub counts three kinds of requests apart, in fixed windows, and tells in `RateLimit` and `RateLimit-Policy` of
every answer how many are left. Commits to a repository have a quota too, which no header shows.
Sources: draft-ietf-httpapi-ratelimit-headers-09; https://huggingface.co/docs/hub/rate-limits.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from hubforge.hub.refusal import Refusal
from hubforge.hub.settings import HubSettings, Quota

_MANY = 10_000  # Askers remembered before those whose window is over are forgotten.


class Quotas:
    """What has been used up, in memory: a restarted Hub begins anew."""

    def __init__(self, settings: HubSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._quotas = {"api": settings.api_quota, "resolvers": settings.resolve_quota}
        self._commits = settings.commit_quota
        self._clock = clock
        self._used: dict[tuple[str, str], tuple[float, int]] = {}  # (kind, asker) -> (end of its window, requests)
        self._committed: dict[str, deque[float]] = {}  # repository -> when its recent commits were taken
        self._guard = threading.Lock()

    def spend(self, path: str, asker: str) -> tuple[dict[str, str], Refusal | None]:
        """Count one request. The headers its answer carries, and the refusal when nothing was left."""
        kind = "resolvers" if "/resolve/" in path else "api" if path.startswith("/api/") else ""
        quota = self._quotas.get(kind)
        if quota is None or path == "/api/hubforge":  # Whether this Hub is up may always be asked.
            return {}, None
        now = self._clock()
        with self._guard:
            if len(self._used) > _MANY:
                self._used = {key: used for key, used in self._used.items() if used[0] > now}
            end, number = self._used.get((kind, asker), (0.0, 0))
            if end <= now:
                end, number = now + quota.seconds, 0
            number += 1
            self._used[kind, asker] = end, number
        left, wait = max(0, quota.number - number), max(1, round(end - now))
        headers = {
            "RateLimit": f'"{kind}";r={left};t={wait}',
            "RateLimit-Policy": f'"fixed window";"{kind}";q={quota.number};w={quota.seconds:g}',
        }
        if number <= quota.number:
            return headers, None
        return headers, Refusal(
            429, f"You have used up the {quota.number} {kind} requests of {quota.seconds:g} seconds. Retry in {wait} s."
        )

    @contextlib.contextmanager
    def commit(self, repo: str) -> Iterator[None]:
        """Take one of a repository's commits of the hour; given back when the commit is refused."""
        if self._commits is None:
            yield
            return
        taken = self._take(repo, self._commits)
        try:
            yield
        except BaseException:
            with self._guard, contextlib.suppress(ValueError):
                self._committed[repo].remove(taken)
            raise

    def _take(self, repo: str, quota: Quota) -> float:
        now = self._clock()
        with self._guard:
            recent = self._committed.setdefault(repo, deque())
            while recent and recent[0] <= now - quota.seconds:
                recent.popleft()
            if len(recent) >= quota.number:
                minutes = max(1, round((recent[0] + quota.seconds - now) / 60)) if recent else 60
                span = "hour" if quota.seconds == 3600 else f"{quota.seconds:g} seconds"
                raise Refusal(
                    429,
                    f"You have exceeded the rate limit for repository commits ({quota.number} per {span}). "
                    f"You can retry this action in about {minutes} minute{'s' if minutes != 1 else ''}.",
                )
            recent.append(now)
        return now


def asker_of(headers: Mapping[bytes, bytes], client: tuple[str, int] | None) -> str:
    """Whose quota a request counts against: the token's, else the machine's."""
    shown = headers.get(b"authorization") or headers.get(b"cookie")
    return hashlib.sha256(shown).hexdigest() if shown else client[0] if client else ""
