"""Hostile input out of good input: bytes, text, JSON and names, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
import string
from typing import Any

PATHS = (
    "../outside",
    "../../../../tmp/outside",
    "/etc/passwd",
    "a/../../outside",
    "..\\outside",
    "C:\\outside",
    "a//b",
    "./a",
    "a/.",
    ".",
    "..",
    "",
    " ",
    "a\x00b",
    "a\nb",
    "CON",
    "nul.txt",
    "a:b",
    ".git/config",
    ".git/hooks/post-checkout",
    "~/outside",
    "$HOME/outside",
    "%2e%2e/outside",
    "a" * 300,
    "/".join("a" * 200),
    "\u202egnp.exe",
    "e\u0301/é",
    "\ud800",
    "-rf",
    "file://etc/passwd",
    "http://127.0.0.1:9/x",
)
WORDS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[x](javascript:alert(1))",
    "`rm -rf /`; $(reboot)",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202eevil",
    "\x00",
    "---\nlicense: other\n---\n",
    "!!python/object/apply:os.system ['true']",
    "%s%s%n",
    "../" * 40,
    "a" * 5000,
    "0" * 400,
    "é" * 300,
    "\ud83d",
    "null",
    "true",
    "NaN",
)
NUMBERS = (0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
FLOATS = (0.0, -0.0, 1e-320, 1e308, -1.5, 0.3, float("nan"), float("inf"), float("-inf"))


def scalar(chance: random.Random) -> Any:
    """A value that no schema expects."""
    return chance.choice(
        (
            lambda: chance.choice(NUMBERS),
            lambda: chance.choice(FLOATS),
            lambda: chance.choice(PATHS),
            lambda: chance.choice(WORDS),
            lambda: chance.choice((None, True, False, [], {}, [[]], {"": ""}, [None], {"a": {"a": {"a": []}}})),
            lambda: "".join(chance.choices(string.printable, k=chance.randrange(1, 12))),
        )
    )()


def value(chance: random.Random, data: Any, changes: int | None = None) -> Any:
    """The JSON value with one to four of its parts replaced, removed, renamed, doubled or nested."""
    data = json.loads(json.dumps(data))
    for _ in range(changes or chance.randrange(1, 5)):
        holders = [holder for holder in _walk(data) if holder]
        if not holders:
            return scalar(chance)
        holder = chance.choice(holders)
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        what = chance.randrange(8)
        if what <= 2:
            holder[key] = scalar(chance)
        elif what == 3:
            del holder[key]
        elif what == 4 and isinstance(holder, dict):
            holder[chance.choice([*PATHS, *WORDS, "extra"])] = holder.pop(key)
        elif what == 5 and isinstance(holder, dict):
            holder[chance.choice([*PATHS, "extra"])] = scalar(chance)
        elif what == 6:
            deep: Any = holder[key]
            for _ in range(chance.choice((1, 3, 60, 3000))):
                deep = [deep]
            holder[key] = deep if _depth_is_sane(deep) else "deep"
        else:
            holder[key] = [holder[key]] * chance.choice((0, 2, 50))
    return data


def _depth_is_sane(deep: Any) -> bool:
    """Whether the json module can write it; what it cannot is written by `text` below as raw brackets."""
    depth = 0
    while isinstance(deep, list) and deep:
        deep, depth = deep[0], depth + 1
    return depth < 500


def _walk(data: Any) -> list[Any]:
    found, todo = [], [data]
    while todo:
        one = todo.pop()
        if isinstance(one, dict | list):
            found.append(one)
            todo += one.values() if isinstance(one, dict) else one
    return found


def as_json(chance: random.Random, data: Any) -> bytes:
    """A mutated JSON document; one in four is broken as a text besides."""
    made = json.dumps(value(chance, data), allow_nan=True).encode("utf-8", "surrogatepass")
    return raw(chance, made) if chance.random() < 0.25 else made


def raw(chance: random.Random, data: bytes) -> bytes:
    """The bytes cut, flipped, doubled, padded, or replaced by something rude."""
    what = chance.randrange(9)
    place = chance.randrange(len(data) + 1)
    if what == 0:
        return data[:place]
    if what == 1:
        return data[:place] + chance.randbytes(chance.randrange(1, 40)) + data[place:]
    if what == 2:
        flipped = bytearray(data or b"\0")
        for _ in range(chance.randrange(1, 8)):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    if what == 3:
        return data + data
    if what == 4:
        return data[:place] + data[min(len(data), place + chance.randrange(1, 64)) :]
    if what == 5:
        return chance.choice((b"", b"\0" * 64, b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, b"[" * 100_000, b"{" * 5000))
    if what == 6:
        number = chance.choice(NUMBERS[:13]) % 2**64
        width = chance.choice((4, 8))
        return data[:place] + (number % 2 ** (8 * width)).to_bytes(width, "little") + data[place + width :]
    if what == 7:
        return data[:place] + b"\n" * 3000 + data[place:]
    return chance.randbytes(chance.randrange(0, 4096))


def text(chance: random.Random, data: str) -> bytes:
    """A YAML or Markdown text with lines swapped, cut, doubled, indented, or with rude words put into it."""
    lines = data.split("\n")
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(lines)) if lines else 0
        what = chance.randrange(9)
        if what == 0:
            lines.insert(at, chance.choice(WORDS))
        elif what == 1 and lines:
            del lines[at]
        elif what == 2 and lines:
            lines.insert(at, lines[chance.randrange(len(lines))])
        elif what == 3 and lines:
            lines[at] = " " * chance.choice((1, 2, 200)) + lines[at]
        elif what == 4 and lines and ":" in lines[at]:
            word = chance.choice((*PATHS, *WORDS, *map(str, NUMBERS), *map(str, FLOATS)))
            lines[at] = lines[at].split(":")[0] + ": " + word
        elif what == 5 and lines and ":" in lines[at]:
            lines[at] = chance.choice((*PATHS, *WORDS)) + ":" + lines[at].split(":", 1)[1]
        elif what == 6:
            lines[at:at] = yaml_bomb(chance)
        elif what == 7 and lines:
            words = lines[at].split(" ")
            words[chance.randrange(len(words))] = str(scalar(chance))[:5000]
            lines[at] = " ".join(words)
        elif lines:
            lines[at] = lines[at].replace(chance.choice("{}[]:,"), chance.choice("{}[]:,&*!|>%@`"))
    made = "\n".join(lines).encode("utf-8", "surrogatepass")
    return raw(chance, made) if chance.random() < 0.15 else made


def yaml_bomb(chance: random.Random) -> list[str]:
    """Lines that ask a YAML reader for more than they hold: aliases, merges, depth, width."""
    what = chance.randrange(5)
    if what == 0:
        bomb = ["l0: &l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
        return bomb + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    if what == 1:
        return ["m0: &m0 {a: 1}"] + [
            f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}], b{n}: *m{n - 1}}}" for n in range(1, 30)
        ]
    if what == 2:
        return ["deep: " + "[" * chance.choice((50, 2000, 20_000))]
    if what == 3:
        return ["self: &self [*self]"]
    return ["wide: {" + ", ".join(f"k{n}: {n}" for n in range(60_000)) + "}"]
