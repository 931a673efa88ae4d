"""What whoever starts a Hub decides: where it listens, who may enter, and its limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from hubforge.errors import HubforgeError
from hubforge.hub.tokens import Publisher, Token

MIB = 1 << 20


@dataclass(frozen=True)
class Quota:
    """At most `number` in a window of so many seconds."""

    number: int
    seconds: float


@dataclass(frozen=True)
class HubSettings:
    """Limits are in bytes unless they say otherwise."""

    user: str = "local"  # Who any bearer token is when `tokens` is empty.
    tokens: Mapping[str, Token | str] = field(default_factory=dict)  # A plain string is a user who may write.
    lfs_from: int = 10 * MIB  # Files from this size on go to LFS, whatever their name.
    multipart_from: int = 5 << 30  # Larger LFS files are uploaded in parts, as on the real Hub.
    part_size: int = 512 * MIB
    page_size: int = 1000  # Entries in one answer of a listing.
    max_json: int = 16 * MIB
    max_lfs: int = 200 << 30
    remote_images: bool = False  # Whether cards may make a reader's browser call other servers.
    endpoint: str | None = None  # `https://hub.example`: its address as users know it, where a proxy stands before it.
    issuers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # Who signs CI jobs' identities -> JWKS.
    publishers: tuple[Publisher, ...] = ()  # Which jobs may exchange theirs for a token.
    publisher_seconds: int = 3600  # How long such a token is good.
    allowed_hosts: tuple[str, ...] = ()  # More names this Hub answers to when it listens on loopback.
    # To try a publisher's patience; None: no limit. The real Hub's are about Quota(1000, 300) and Quota(128, 3600).
    api_quota: Quota | None = None  # Requests below /api/, of one token or else one machine.
    resolve_quota: Quota | None = None  # Downloads of files, likewise.
    commit_quota: Quota | None = None  # Commits to one repository. No header tells of it.

    def hosts(self) -> set[str]:
        """Names this Hub answers to when it listens on loopback, besides those of loopback itself."""
        own = urlsplit(self.endpoint).hostname if self.endpoint else None
        return {name.lower() for name in (*self.allowed_hosts, own) if name}

    def token(self, secret: str) -> Token | None:
        """What that secret opens, or None."""
        if not self.tokens:
            return Token(self.user)
        found = self.tokens.get(secret)
        return Token(found) if isinstance(found, str) else found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, settings: HubSettings) -> None:
    """Refuse to listen where others could write without a token."""
    if not is_loopback(host) and not settings.tokens:
        raise HubforgeError(
            f"the embedded Hub would listen on {host}, where other machines reach it, and takes any token",
            where="hub serve",
            mend="Give it tokens (--tokens FILE, a JSON object of token: user), or keep --host 127.0.0.1.",
        )
    if not is_loopback(host) and settings.publishers and not settings.endpoint:
        raise HubforgeError(
            "identity tokens are made out to an address, and this Hub's is not known",
            where="hub serve",
            mend="Name it: `endpoint`, such as https://hub.example, in the settings.",
        )
