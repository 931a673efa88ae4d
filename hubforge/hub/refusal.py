"""Refusal: what the Hub answers instead of doing what was asked."""

from __future__ import annotations

from typing import Any, Literal

ErrorCode = Literal["RepoNotFound", "RevisionNotFound", "EntryNotFound", "GatedRepo"]


class Refusal(Exception):
    """An HTTP answer of 4xx: status, sentence, the code the client maps to an exception, further JSON and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: ErrorCode | None = None,
        *,
        more: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.more, self.headers = more or {}, headers or {}


def no_repository() -> Refusal:
    """The same answer for what is missing and for what is private, so that nobody learns which."""
    return Refusal(404, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(path: str, commit: str = "") -> Refusal:
    headers = {"X-Repo-Commit": commit} if commit else {}  # The client caches the absence under this commit.
    return Refusal(404, f"Entry not found: {path}", "EntryNotFound", headers=headers)
