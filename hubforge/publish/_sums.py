"""SHA256SUMS: written so that `sha256sum -c SHA256SUMS` checks a download, and read back strictly.

Source of the format: GNU coreutils manual, section 6.6 (md5sum invocation): digest, space, space or `*`, file name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hubforge.errors import shown
from hubforge.publish._paths import path_fault
from hubforge.release import SUMS_NAME
from hubforge.sources import Digested

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def sums_text(files: Iterable[Digested], folder: str | None = None) -> str:
    """The text of SHA256SUMS for those files, sorted by path; with `folder`, as it lies in that folder.

    Paths are relative to where the file lies. In a folder, what is outside it (the card at the root, which the
    folders of a repository share) is left out, and so is SHA256SUMS itself. So is the card wherever it lies: people
    edit it on the Hub, and a download must check out all the same.
    """
    prefix = f"{folder}/" if folder else ""
    lines: dict[str, str] = {}
    for file in files:
        path = file.path.removeprefix(prefix)
        if not file.path.startswith(prefix) or path in (SUMS_NAME, "README.md"):
            continue
        if fault := path_fault(path):
            raise ValueError(f"the path {file.path!r} {fault}")
        if not _DIGEST.fullmatch(file.sha256):
            raise ValueError(f"{file.sha256!r} is not a sha256 in lower-case hex ({file.path})")
        if path in lines:
            raise ValueError(f"{file.path!r} is listed twice")
        lines[path] = f"{file.sha256}  {path}\n"
    return "".join(lines[path] for path in sorted(lines))


def read_sums(text: str) -> Mapping[str, str]:
    """sha256 by path, as a SHA256SUMS lists them; ValueError names the line that is not as `sums_text` writes it."""
    found: dict[str, str] = {}
    if text and not text.endswith("\n"):
        raise ValueError("the last line is cut off")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not '<sha256>  <path>': {shown(line, 80)}")
        digest, path = match.groups()
        if fault := path_fault(path):
            raise ValueError(f"line {number}: the path {shown(path)} {fault}")
        if path in found:
            raise ValueError(f"line {number}: {path} is listed twice")
        found[path] = digest
    return found
