"""Publishing from CI without a token: the job proves who it is, and gets a short-lived token for each repository.

    the CI provider signs who the job is, for the Hub's address  (GitHub: `permissions: id-token: write`)
    POST /oauth/token with that and the repository's name  ->  a token for that repository, good for about an hour

The repository's settings on the Hub name the jobs that are trusted. A repository that does not exist has no settings:
the first publish of it takes a token, once. Nothing is kept on disk; tokens are renewed before they run out.
Source: https://huggingface.co/docs/hub/trusted-publishers; RFC 8693; huggingface_hub 2.4 `_oidc.py`, whose functions do
the asking. It reads one repository from HF_OIDC_RESOURCE; a release has several, so each is asked for here by name.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hubforge.errors import PublishError, shown
from hubforge.publish._explain import HubError, explained
from hubforge.publisher import Hub

_MARGIN = 300.0  # seconds before its end from which a token is not used any more, as huggingface_hub has it


def job_credentials(endpoint: str, *, has_token: bool) -> Keyless | None:
    """What a CI job publishes with, or None where this is no such job, or a token is to be used.

    HF_OIDC_RESOURCE asks for it by name and goes before any token, as in huggingface_hub; otherwise a token goes first.
    """
    asked = bool(os.environ.get("HF_OIDC_RESOURCE"))
    if asked or (not has_token and (os.environ.get("HF_OIDC_ID_TOKEN") or _may_mint())):
        return Keyless(endpoint.rstrip("/"))
    return None


def _may_mint() -> bool:
    """Whether the CI provider signs identities for this job; GitHub Actions only for now."""
    names = ("ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    return os.environ.get("GITHUB_ACTIONS") == "true" and all(os.environ.get(name) for name in names)


@dataclass
class Keyless:
    """The tokens of one job for one Hub, by repository. `clock` is in seconds, so that tests need not wait."""

    endpoint: str
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _held: dict[str, tuple[str, float]] = field(default_factory=dict, repr=False)
    _secrets: set[str] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def secrets(self) -> Iterable[str]:
        """Every token so far, and what they were asked for with."""
        given = (os.environ.get(name) for name in ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "HF_OIDC_ID_TOKEN"))
        return [*self._secrets, *(secret for secret in given if secret)]

    def token(self, repo: str, *, fresh: bool = False) -> str:
        """A token for that repository with some of its life left; one exchange, and then from memory.

        fresh: the last one was refused. PublishError where the Hub trusts this job with no such repository.
        """
        with self._lock:
            now = self.clock()
            held = self._held.get(repo)
            if held is not None and not fresh and now < held[1]:
                return held[0]
            token, seconds = self._exchange(repo)
            self._secrets.add(token)
            self._held[repo] = token, now + max(seconds - _MARGIN, seconds / 2)
            return token

    def _exchange(self, repo: str) -> tuple[str, float]:
        from huggingface_hub._oidc import exchange_oidc_token, get_oidc_token
        from huggingface_hub.errors import OIDCError

        hub = Hub(self.endpoint, credentials=self)
        identity = os.environ.get("HF_OIDC_ID_TOKEN")
        if not identity:
            try:
                with explained(hub, repo, "have the CI provider sign who this job is"):
                    identity = get_oidc_token(audience=self.endpoint)
            except HubError as error:
                if isinstance(error.__cause__, OIDCError):
                    raise _cannot_prove(self.endpoint) from error
                raise
        self._secrets.add(identity)
        try:
            with explained(hub, repo, "exchange this job's identity for a token"):
                answer = exchange_oidc_token(subject_token=identity, resource=repo, endpoint=self.endpoint)
                return str(answer["access_token"]), float(answer.get("expires_in", 3600))
        except HubError as error:
            if error.status in (400, 401, 403, 404):
                raise _not_trusted(self.endpoint, repo, error) from error
            raise


def _cannot_prove(endpoint: str) -> PublishError:
    return PublishError(
        "this job cannot prove who it is, so the Hub gives it no token",
        where=endpoint,
        mend="Give the job `permissions: {id-token: write}` in its workflow, or a token in HF_TOKEN.",
    )


def _not_trusted(endpoint: str, repo: str, error: HubError) -> PublishError:
    """One error for all reasons: to who is not trusted the Hub does not tell whether the repository is there."""
    job = {
        name: os.environ.get(variable)
        for name, variable in (
            ("repository", "GITHUB_REPOSITORY"),
            ("workflow", "GITHUB_WORKFLOW_REF"),
            ("ref", "GITHUB_REF"),
        )
    }
    known = ", ".join(f"{name} {shown(value)}" for name, value in job.items() if value)
    return PublishError(
        f"the Hub gives this job no token for {repo}: {error.what}",
        where=f"{repo} on {endpoint}",
        mend=f"If it does not exist yet, a token is needed once: run `hubforge publish` with HF_TOKEN, or make it on"
        f" the Hub. Then name this job as a trusted publisher at {endpoint}/{repo}/settings"
        f"{f' ({known})' if known else ''}.",
    )
