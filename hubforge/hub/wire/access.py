"""Who may see and change what, and addresses that let an upload in without a token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from typing import Any

from hubforge.hub.names import Kind, prefix_of
from hubforge.hub.refusal import Refusal, no_repository
from hubforge.hub.settings import HubSettings, Token
from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.shelf import Shelf


@dataclass(frozen=True)
class Access:
    """One asker: the token shown, or None. everywhere: no tokens are configured, so any one opens every namespace."""

    token: Token | None
    everywhere: bool = False

    @classmethod
    def of(cls, secret: str, settings: HubSettings, *, lenient: bool = False) -> Access:
        token = settings.token(secret)
        if token is None and not lenient:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return cls(token, everywhere=not settings.tokens)

    @property
    def user(self) -> str:
        """The user's name; 401 for who shows no token."""
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        return self.token.user

    def _owns(self, namespace: str) -> bool:
        token = self.token
        return token is not None and (self.everywhere or namespace == token.user or namespace in token.orgs)

    def _reaches(self, name: str) -> bool:
        return self.token is not None and (self.token.repos is None or name in self.token.repos)

    def can_read(self, repo: Repository) -> bool:
        return not repo.private or (self._owns(repo.namespace) and self._reaches(repo.name))

    def can_write(self, repo: Repository) -> bool:
        return self.may_write(repo.kind, repo.id)

    def may_write(self, kind: Kind, id: str) -> bool:
        """Whether the token may change (or make) the repository of that id."""
        name = prefix_of(kind) + id
        token = self.token
        return token is not None and token.role == "write" and self._owns(id.partition("/")[0]) and self._reaches(name)

    def check(self, shelf: Shelf, kind: Kind, id: str, write: bool = False) -> Repository:
        """The repository, or the refusal the real Hub would give: 401 or 404 when hidden, 403 when read-only."""
        try:
            repo = shelf.get(kind, id)
            seen = self.can_read(repo)
        except Refusal:
            seen = False
        if not seen:
            if self.token is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise no_repository()
        if write:
            self.check_write(kind, id)
        return repo

    def check_write(self, kind: Kind, id: str) -> None:
        if not self.may_write(kind, id):
            user = self.user
            raise Refusal(403, f"Forbidden: {user}'s token may not write to {prefix_of(kind)}{id}")

    def check_may_write(self) -> str:
        """The user's name, if the token may write anywhere at all: to open a pull request or to comment."""
        user = self.user
        if self.token is None or self.token.role != "write":
            raise Refusal(403, f"Forbidden: {user}'s token is for reading only")
        return user

    def check_gate(self, repo: Repository) -> None:
        """Files of a gated repository are for those who may write to it."""
        if repo.about()["gated"] and not self.can_write(repo):
            raise Refusal(
                401 if self.token is None else 403,
                f"Access to {repo.kind[:-1]} {repo.id} is restricted and you are not in the authorized list.",
                "GatedRepo",
            )


class Signer:
    """Signs what an upload address allows, as the client sends no token when it uploads."""

    def __init__(self, secret: str) -> None:
        self._key = bytes.fromhex(secret)

    def sign(self, grant: dict[str, Any], seconds: int = 24 * 3600) -> str:
        payload = base64.urlsafe_b64encode(json.dumps({**grant, "until": int(time.time()) + seconds}).encode())
        return f"{payload.decode().rstrip('=')}.{self._mac(payload.rstrip(b'='))}"

    def open(self, text: str) -> dict[str, Any]:
        """The grant, if it was signed here and has not run out."""
        payload, _, mac = text.partition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(payload.encode()).encode()):
            raise Refusal(403, "This upload address was not made here")
        grant: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        if grant["until"] < time.time():
            raise Refusal(403, "This upload address has run out")
        return grant

    def _mac(self, payload: bytes) -> str:
        return hmac.new(self._key, payload, hashlib.sha256).hexdigest()
