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
from hubforge.hub.settings import HubSettings
from hubforge.hub.storage.repository import Repository
from hubforge.hub.storage.shelf import Shelf
from hubforge.hub.tokens import COLLECTS, READS, SEES_COLLECTIONS, TALKS, WRITES, Publisher, Token, split_name

JWT = "hf_jwt_"  # How tokens begin that a CI job was given.


@dataclass(frozen=True)
class Access:
    """One asker: the token shown, or None. everywhere: no tokens are configured, so any one opens every namespace."""

    token: Token | None
    everywhere: bool = False

    @classmethod
    def of(cls, secret: str, settings: HubSettings, signer: Signer, *, lenient: bool = False) -> Access:
        if secret.startswith(JWT):
            token, everywhere = _of_publisher(secret, settings, signer), False
        else:
            token, everywhere = settings.token(secret), not settings.tokens
        if token is not None and token.until is not None and token.until < time.time():
            token = None
        if token is None and not lenient:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return cls(token, everywhere=everywhere)

    @property
    def user(self) -> str:
        """The user's name; 401 for who shows no token."""
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        return self.token.user

    def owns(self, namespace: str) -> bool:
        token = self.token
        return token is not None and (self.everywhere or namespace == token.user or namespace in token.orgs)

    def _may(self, permissions: tuple[str, ...], kind: Kind, id: str) -> bool:
        """Whether the token grants one of those permissions on a repository of the user's, there or not."""
        token = self.token
        if token is None or not self.owns(id.partition("/")[0]):
            return False
        granted = token.granted()
        if granted is None:
            return token.role == "write" or READS in permissions
        return any(scope.covers(kind, id) and set(permissions) & set(scope.permissions) for scope in granted)

    def can_read(self, repo: Repository) -> bool:
        return not repo.private or self._may((READS, WRITES), repo.kind, repo.id)

    def may_write(self, kind: Kind, id: str) -> bool:
        """Whether the token may change the repository of that id."""
        return self._may((WRITES,), kind, id)

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
            self.check_write(repo.kind, repo.id)
        return repo

    def check_write(self, kind: Kind, id: str) -> None:
        if not self.may_write(kind, id):
            raise Refusal(403, f"Forbidden: {self.user}'s token may not write to {prefix_of(kind)}{id}")

    def check_create(self, kind: Kind, id: str) -> None:
        """Making a repository takes a right to all of a namespace: a scope for one repository is for what is there."""
        self.check_write(kind, id)
        granted, namespace = self.token.granted() if self.token else None, id.partition("/")[0]
        if granted is not None and not any(
            scope.covers_all_of(namespace) and WRITES in scope.permissions for scope in granted
        ):
            raise Refusal(403, f"Forbidden: {self.user}'s token may not create repositories in {namespace}")

    def check_may_propose(self, repo: Repository) -> str:
        """The user's name, if the token may open pull requests and comment on what its user can see."""
        token, user = self.token, self.user
        granted = token.granted() if token else None
        if granted is None:
            may = token is not None and token.role == "write"
        else:
            may = (token is not None and TALKS in token.anywhere) or self._may((TALKS, WRITES), repo.kind, repo.id)
        if not may:
            raise Refusal(403, f"Forbidden: {user}'s token may not propose changes or comment here")
        return user

    def may_collect(self, namespace: str, *, write: bool) -> bool:
        """Whether the token may see a namespace's private collections, or for `write` change its collections."""
        token = self.token
        if token is None or not self.owns(namespace):
            return False
        granted = token.granted()
        if granted is None:
            return token.role == "write" or not write
        wanted = {COLLECTS} if write else {COLLECTS, SEES_COLLECTIONS}
        return any(scope.covers_all_of(namespace) and wanted & set(scope.permissions) for scope in granted)

    def check_gate(self, repo: Repository) -> None:
        """Files of a gated repository are for its owners."""
        if repo.about()["gated"] and not self._may((READS, WRITES), repo.kind, repo.id):
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


def publisher_token(signer: Signer, publisher: Publisher, subject: str, seconds: int) -> str:
    """A token for a publisher's repository, good for so many seconds. All is in the text: nothing is stored."""
    grant = {"action": "publish", "repo": publisher.repo, "read": publisher.read_only, "sub": subject}
    return JWT + signer.sign(grant, seconds)


def _of_publisher(secret: str, settings: HubSettings, signer: Signer) -> Token | None:
    """What such a token opens, while its publisher is still trusted."""
    try:
        grant = signer.open(secret.removeprefix(JWT))
    except Refusal:
        return None
    trusted = [publisher for publisher in settings.publishers if publisher.repo == grant.get("repo")]
    if grant["action"] != "publish" or not trusted:
        return None
    return Token(
        split_name(grant["repo"])[1].partition("/")[0],
        role="read" if grant.get("read") else "write",
        repos=(grant["repo"],),
        until=grant["until"],
        publisher=grant["sub"],
    )
