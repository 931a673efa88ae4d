"""What access tokens open: by role, as all of a user's rights, or by scopes, as fine-grained tokens do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hubforge.errors import HubforgeError
from hubforge.hub.names import KINDS, SINGULAR, Kind, prefix_of

READS, WRITES, TALKS = "repo.content.read", "repo.write", "discussion.write"
COLLECTS, SEES_COLLECTIONS = "collection.write", "collection.read"
GITHUB = "https://token.actions.githubusercontent.com"


@dataclass(frozen=True)
class Scope:
    """Permissions on one repository (type `model`, `dataset` ...) or on all of a `user`'s or `org`'s."""

    type: str
    name: str
    permissions: tuple[str, ...]

    def covers(self, kind: Kind, id: str) -> bool:
        if self.covers_all_of(id.partition("/")[0]):
            return True
        return self.type == SINGULAR[kind] and self.name == id

    def covers_all_of(self, namespace: str) -> bool:
        return self.type in ("user", "org") and self.name == namespace

    def as_json(self) -> dict[str, Any]:
        entity = {"_id": f"{self.type}:{self.name}", "type": self.type, "name": self.name}
        return {"entity": entity, "permissions": list(self.permissions)}


@dataclass(frozen=True)
class Token:
    """What one access token opens: who it is, and what of their rights it has.

    `role` read or write: all that the user may. fineGrained: what `scopes` grant, and `anywhere` on what is public.
    """

    user: str
    role: Literal["read", "write", "fineGrained"] = "write"
    orgs: tuple[str, ...] = ()
    repos: tuple[str, ...] | None = None  # Short for a scope for each: `ns/name` or `datasets/ns/name`.
    scopes: tuple[Scope, ...] = ()
    anywhere: tuple[str, ...] = ()  # `discussion.write`: may open pull requests on repositories of others.
    name: str = "local"
    until: float | None = None  # Seconds since 1970; None: for ever.
    publisher: str | None = None  # The subject of a CI job that this token was given to.

    def granted(self) -> tuple[Scope, ...] | None:
        """The token's scopes; None for one that has all of its user's rights."""
        if self.repos is not None:
            permissions = (READS,) if self.role == "read" else (READS, WRITES, TALKS)
            return tuple(Scope(SINGULAR[kind], id, permissions) for kind, id in map(split_name, self.repos))
        return self.scopes if self.role == "fineGrained" else None


def split_name(name: str) -> tuple[Kind, str]:
    """`ns/name` -> models, `datasets/ns/name` -> datasets."""
    for kind in KINDS[1:]:
        if name.startswith(prefix_of(kind)) and name.count("/") == 2:
            return kind, name.removeprefix(prefix_of(kind))
    return "models", name


@dataclass(frozen=True)
class Publisher:
    """CI jobs that may have a token for one repository: those whose identity token carries exactly these claims.

    `Publisher("acme/poet", {"repository": "acme/models", "ref": "refs/heads/main"})`
    """

    repo: str  # `ns/name` or `datasets/ns/name`
    claims: Mapping[str, str] = field(default_factory=dict)
    issuer: str = GITHUB
    read_only: bool = False

    def __post_init__(self) -> None:
        # Anyone may run a job at GitHub: a claim must say whose it is.
        owners = {"sub", "repository", "repository_id", "repository_owner", "repository_owner_id"}
        if not self.claims or (self.issuer == GITHUB and not owners & self.claims.keys()):
            raise HubforgeError(
                f"the trusted publisher of {self.repo} does not say whose jobs it trusts",
                where="hub serve",
                mend='Give it claims, such as {"repository": "OWNER/NAME", "ref": "refs/heads/main"}.',
            )
