"""Which paths and names a repository may hold: checked before anything is sent, and in what the Hub sends back."""

from __future__ import annotations

import re

_FORBIDDEN = frozenset({"", ".", "..", ".git", ".cache"})  # the last two are refused by huggingface_hub as well
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def path_fault(path: str) -> str | None:
    """Why that is no path inside a repository, or None when it is: relative, forward slashes, printable, no `..`."""
    if not path:
        return "is empty"
    if len(path) > 1024:
        return "is longer than 1,024 characters"
    if not path.isprintable() or "\\" in path:
        return "holds a backslash or a control character"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute, but must be relative to the repository"
    for part in path.split("/"):
        if part.lower() in _FORBIDDEN:
            return f"holds the part {part!r}, which no repository path may have"
    return None


def repo_fault(repo: str) -> str | None:
    """Why the Hub would refuse that repository name, or None when it would take it.

    The rules of `huggingface_hub.utils.validate_repo_id`, but with the namespace required: what is published
    belongs to somebody.
    """
    namespace, slash, name = repo.partition("/")
    if not slash or "/" in name:
        return "must be written namespace/name, such as me/my-model"
    for part in (namespace, name):
        if len(part) > 96:
            return f"has a part of {len(part)} characters, but 96 is the most the Hub takes"
        if not _NAME.fullmatch(part):
            return (
                "may hold only letters, digits, '-', '_' and '.', and neither part may be empty, or begin or end with"
                " '-' or '.'"
            )
        if "--" in part or ".." in part:
            return "may not hold '--' or '..'"
    if name.endswith(".git"):
        return "may not end in .git"
    return None


def tag_fault(tag: str) -> str | None:
    """Why that is no tag, or None when it is one: git's rules for ref names, and no word that already means a ref."""
    if _COMMIT.fullmatch(tag):
        return "looks like a commit, so that nobody could tell which is meant"
    if tag in ("main", "HEAD") or tag.startswith("refs/"):
        return "is the name of a branch or ref"
    if not _TAG.fullmatch(tag):
        return "may hold only letters, digits and . _ / + -, and begins with a letter, a digit or _"
    if ".." in tag or "//" in tag or "/." in tag or tag.endswith(("/", ".", ".lock")):
        return "is no name git takes for a tag"
    return None
