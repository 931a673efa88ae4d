"""Names that are safe to store and to show: repositories, file paths, branches and tags."""

from __future__ import annotations

import re
from typing import Final, Literal, get_args

from hubforge.hub.refusal import Refusal

Kind = Literal["models", "datasets", "spaces", "kernels"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
SINGULAR: Final[dict[Kind, str]] = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}
# First segments of addresses that mean something else than a user.
RESERVED: Final = frozenset(
    {*KINDS, "api", "oauth", "login", "logout", "settings", "docs", "new", "collections", "resolve", "static", "_lfs"}
)
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REF: Final = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+/-]{0,199}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
MAX_PATH: Final = 1000


def prefix_of(kind: Kind) -> str:
    """What stands before a repository's id in its address: nothing for models, else `datasets/` and so on."""
    return "" if kind == "models" else f"{kind}/"


def kind_of(singular: object) -> Kind:
    """`model` (or nothing) -> `models`; refuses what is no type of repository."""
    for kind, name in SINGULAR.items():
        if singular in (name, kind) or (singular is None and kind == "models"):
            return kind
    raise Refusal(400, f"Invalid repo type: {singular!r}")


def check_name(name: object, what: str) -> str:
    """A namespace or repository name, unchanged; refuses what the real Hub refuses."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or "--" in name or ".." in name:
        raise Refusal(
            400,
            f"Invalid {what} {name!r}: up to 96 letters, digits, '-', '_' or '.', with no '-' or '.' at either end "
            "and neither '--' nor '..' inside",
        )
    if name.lower().endswith((".git", ".ipynb")):
        raise Refusal(400, f"Invalid {what} {name!r}: it must not end in .git or .ipynb")
    return name


def is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and "--" not in name and ".." not in name


def check_path(path: object) -> str:
    """A file's path inside a repository, unchanged; refuses whatever could leave it or confuse git.

    Kept: any Unicode but control characters, `/` between segments. Refused: absolute paths, `.`, `..` and empty
    segments, backslashes, `.git` in any case, and paths of more than 1000 bytes.
    """
    if not isinstance(path, str) or not path:
        raise Refusal(400, f"Invalid path in repo: {path!r}")
    segments = path.split("/")
    if (
        len(path.encode("utf-8", "surrogatepass")) > MAX_PATH
        or "\\" in path
        or any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in path)
        or any(segment in ("", ".", "..") or segment.lower() == ".git" for segment in segments)
        or any(len(segment.encode()) > 255 for segment in segments)
    ):
        raise Refusal(400, f"Invalid path in repo: {path[:200]!r}")
    return path


def check_ref_name(name: object) -> str:
    """The name of a branch or tag, unchanged; git's rules, a little stricter."""
    if (
        not isinstance(name, str)
        or not _REF.fullmatch(name)
        or any(bad in name for bad in ("..", "//", "/."))
        or name.endswith(("/", ".", ".lock"))
        or name.startswith("refs/")
        or is_commit(name)
    ):
        raise Refusal(400, f"Invalid reference name: {name!r}")
    return name


def is_commit(text: str) -> bool:
    return bool(_COMMIT.fullmatch(text))


def is_sha256(text: object) -> bool:
    return isinstance(text, str) and bool(_SHA256.fullmatch(text))
