"""Strings made safe for Markdown: text, inline code, links, tables and fences.

A card quotes what others wrote: adapter configs, file names, metric meanings. None of it may end a table row, open a
tag, start a link or close a fence. What the author of the recipe wrote is Markdown and passes untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
# Where a backslash keeps a line from opening a list, a heading or a rule.
_BLOCK_START = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=#{1,6}(?:\s|$)|[-+](?:\s|$)|=+$|-+$))")
# Controls and line breaks; marks that turn the direction of writing, and with it what a reader sees; half characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
_REPO = re.compile(r"^(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}$")
_ADDRESS = re.compile(
    r"arXiv:\s?(\d{4}\.\d{4,5}(?:v\d+)?)|doi:(10\.\d{4,9}/[^\s<>\"'`|]*[^\s<>\"'`|.,;:)\]])"
    r"|https?://[^\s<>\"'`|]+[^\s<>\"'`|.,;:)\]]"
)
HUB = "https://huggingface.co"


def one_line(value: object) -> str:
    """The value as one line of text: runs of control characters and line breaks become a space. None becomes ""."""
    return "" if value is None else _CONTROL.sub(" ", str(value)).strip()


def text(value: object) -> str:
    """The value as plain words: shows exactly its characters, in running text and in a table cell alike."""
    line = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(r"\\\1", line)
    # An underscore or a tilde inside a word opens nothing; `prompt_level` stays readable in the source.
    line = re.sub(r"(?<=\w)\\_(?=\w)", "_", line)
    line = re.sub(r"\\~(?!\\?~)(?<!~\\~)", "~", line)
    return _BLOCK_START.sub(r"\1\\", line)


def code(value: object) -> str:
    """The value as inline code; safe in a table cell too. "" stays ""."""
    line = one_line(value)
    if not line:
        return ""
    if "|" not in line and "`" not in line:
        return f"`{line}`"
    # A pipe ends a table cell even inside backticks, so such a value becomes HTML, every mark an entity.
    return "<code>" + re.sub(r"[&<>|`*_\[\]\\~$]", lambda match: f"&#{ord(match[0])};", line) + "</code>"


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: "a, b and c"; no mark in them is touched."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def prose(value: object) -> str:
    """The value as plain words, but for what stands between backticks, which stays code: docstrings are so written."""
    pieces = re.split(r"(?<!`)`([^`]+)`(?!`)", one_line(value))
    shown = []
    for index, piece in enumerate(pieces):
        if index % 2:
            shown.append(code(piece))
            continue
        # text() strips; a space at a seam has to stay.
        before = " " if index and piece[:1].isspace() else ""
        after = " " if index < len(pieces) - 1 and piece[-1:].isspace() and piece.strip() else ""
        shown.append(before + text(piece) + after)
    return "".join(shown).strip()


def url(address: object) -> str:
    """The address, percent-encoded for a link; "" when it is neither http(s) nor a path inside the repository."""
    line = one_line(address)
    parts = urlsplit(line)
    if parts.scheme not in ("", "http", "https") or (parts.scheme == "" and parts.netloc):
        return ""
    if "@" in parts.netloc:  # never show credentials that came with a remote
        line = line.replace(parts.netloc, parts.netloc.rsplit("@", 1)[1], 1)
    return quote(line, safe="/:?#&=+,;@%~.-_!")


def link(label: object, address: object) -> str:
    """`[label](address)`, or only the label when the address is none that a page should link to."""
    target = url(address)
    return f"[{text(label)}]({target})" if target else text(label)


def is_repo(name: object) -> bool:
    """Whether the name can be a Hub repository: `owner/name` of the characters the Hub allows."""
    return isinstance(name, str) and "/" in name and bool(_REPO.match(name)) and ".." not in name and "--" not in name


def repo_link(repo: object, kind: str = "model", commit: str | None = None) -> str:
    """A link to a Hub repository (at that commit); inline code when the name cannot be one."""
    if not is_repo(repo):
        return code(repo)
    prefix = "datasets/" if kind == "dataset" else ""
    tail = f"/tree/{commit}" if commit else ""
    return link(repo, f"{HUB}/{prefix}{repo}{tail}")


def fence(content: object, language: str = "") -> str:
    """The content as a fenced block; the fence is longer than any in it."""
    body = str(content).replace("\r\n", "\n").strip("\n")
    longest = max((len(run) for run in re.findall(r"`{3,}", body)), default=2)
    marks = "`" * (longest + 1)
    return f"{marks}{language}\n{body}\n{marks}"


def linkify(value: object) -> str:
    """The value as text, with each `arXiv:2306.01708`, `doi:10.1145/...` and https address in it a link."""
    parts: list[str] = []
    line = one_line(value)
    end = 0
    for match in _ADDRESS.finditer(line):
        parts.append(text(line[end : match.start()]))
        address = match[0]
        if match[1] or match[2]:
            address = f"https://arxiv.org/abs/{match[1]}" if match[1] else f"https://doi.org/{match[2]}"
        # A space that text() strips at the seam would glue the link to the word before it.
        if parts[-1] and line[end : match.start()][-1:].isspace():
            parts[-1] += " "
        parts.append(link(match[0], address))
        end = match.end()
    tail = line[end:]
    parts.append((" " if tail[:1].isspace() and parts else "") + text(tail))
    return "".join(parts).strip()


def table(rows: Sequence[Mapping[str, Any]], right: Sequence[str] = (), keep: Sequence[str] = ()) -> str:
    """A table of rows (column -> Markdown). A column that is blank in every row is left out, unless it is in `keep`.

    The columns come in the order of the rows' keys; those in `right` are aligned to the right. No rows: "".
    """
    columns: list[str] = []
    for row in rows:
        columns += [column for column in row if column not in columns]
    columns = [column for column in columns if column in keep or any(_cell(row.get(column)) for row in rows)]
    if not columns:
        return ""
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(" ---: " if column in right else " --- " for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return one_line(value)
