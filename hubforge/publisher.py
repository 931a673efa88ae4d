"""Publisher, Upload, Hub: all that a contributor must read to push to another place, beside `op.py`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from hubforge.events import Event
from hubforge.op import Kind, Metrics, Op


@dataclass(frozen=True)
class UploadFile:
    """One file to push: its path in the repository, where its bytes are, and their digest (taken when written)."""

    path: str
    content: Path | bytes
    size: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """What one repository (or one folder of it) is to hold after a push."""

    target: str  # the entry under `publish`
    repo: str  # "namespace/name"
    files: tuple[UploadFile, ...]
    message: str  # of the commit
    folder: str | None = None  # everything is pushed below it, but for the card at the root
    tag: str | None = None
    private: bool = False
    collection: str | None = None  # slug, or title, of the collection that the repository joins
    supersedes: tuple[str, ...] = ()  # repositories whose page then points to this one
    take: Literal["ours", "theirs"] | None = None  # which card wins where people edited what hubforge wrote
    prune: frozenset[str] = frozenset()  # paths that are not of this release and go all the same


class Credentials(Protocol):
    """Tokens that are good for one repository and for a short time, as a CI job gets them."""

    def token(self, repo: str, *, fresh: bool = False) -> str:
        """A token for that repository; fresh: a new one, since the last was refused. Raises PublishError."""
        ...

    def secrets(self) -> Iterable[str]:
        """All that must never be printed."""
        ...


@dataclass(frozen=True)
class Hub:
    """Which Hub, and as whom. The token never leaves this object: it has no place in reprs, logs or manifests."""

    endpoint: str
    token: str | None = field(default=None, repr=False)
    patience: float = 1800.0  # seconds of waiting in all, for a Hub that limits or fails
    name: str = ""  # what this Hub is known by on this machine, where its address changes
    credentials: Credentials | None = field(default=None, repr=False)  # used in place of `token` to publish
    variable: str = "HF_TOKEN"  # of the environment, that the token is taken from

    def sign_in(self) -> str:
        """How to give it a token: a sentence for the user."""
        if self.variable == "HF_TOKEN":
            return f"Run `hf auth login`, or set HF_TOKEN to a token from {self.endpoint}/settings/tokens."
        return (
            f"Set {self.variable} to a token of that Hub, which is not sent the one of huggingface.co. An embedded Hub "
            "that has no list of tokens takes any, such as `local`."
        )

    def secrets(self) -> tuple[str, ...]:
        """Every secret known of this Hub, so that it can be taken out of what is printed or written."""
        held = self.credentials.secrets() if self.credentials else ()
        return tuple(secret for secret in (self.token, *held) if secret)


class Publisher(Op):
    """Pushes what steps made. Never cached, idempotent, and able to read back what it pushed."""

    makes: ClassVar[Kind] = "receipt"
    staged: ClassVar[bool] = False  # True: its uploads may go through `publish.release`, all repositories together

    @abstractmethod
    def push(self, upload: Upload, hub: Hub, report: Callable[[Event], None]) -> Metrics:
        """Make the repository hold those files in one commit, tag it, and read every digest back.

        Returns {"repo", "commit", "url", "pushed": [paths], "unchanged": n, "bytes": n, "tag"}; raises PublishError,
        or VerifyError when what is there is not what was pushed. An unchanged upload makes no commit.
        """
