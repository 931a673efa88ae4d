"""Which files go to LFS, and which are left out by .gitignore."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal

# What the real Hub writes into a new repository, with images and documents, which it keeps out of git as well.
# fmt: off
LFS_ENDINGS: Final = (
    "7z", "arrow", "avi", "bin", "bmp", "bz2", "ckpt", "flac", "ftz", "gguf", "gif", "gz", "h5", "ico", "jpeg",
    "jpg", "joblib", "lfs.*", "mlmodel", "mkv", "model", "mov", "mp3", "mp4", "msgpack", "npy", "npz", "ogg", "onnx",
    "ot", "parquet", "pb", "pdf", "pickle", "pkl", "png", "pt", "pth", "rar", "safetensors", "tar", "tflite", "tgz",
    "tif", "tiff", "wasm", "wav", "webm", "webp", "woff", "woff2", "xz", "zip", "zst",
)
# fmt: on
GITATTRIBUTES: Final = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS) + (
    "saved_model/**/* filter=lfs diff=lfs merge=lfs -text\n*tfevents* filter=lfs diff=lfs merge=lfs -text\n"
)
_LFS_NAME: Final = re.compile(
    r".*\.(?:" + "|".join(ending.replace(".*", r"\..*") for ending in LFS_ENDINGS) + r")|.*tfevents.*", re.IGNORECASE
)


def upload_mode(path: str, size: int, sample: bytes, lfs_from: int) -> Literal["lfs", "regular"]:
    """Where a file belongs, from its name, its size and its first 512 bytes."""
    if size >= lfs_from or _LFS_NAME.fullmatch(path.rpartition("/")[2]) or path.startswith("saved_model/"):
        return "lfs"
    return "regular" if is_text(sample, whole=len(sample) >= size) else "lfs"


def is_text(sample: bytes, *, whole: bool) -> bool:
    """Whether bytes are UTF-8 without NUL; unless they are the whole file, a letter cut at their end is forgiven."""
    if b"\0" in sample:
        return False
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        return not whole and error.end == len(sample) and len(sample) - error.start < 4
    return True


def ignored(path: str, rules: str) -> bool:
    """Whether .gitignore rules leave a path out. As git: the last matching rule wins, `!` brings back."""
    verdict = False
    for negated, pattern in _compile(rules):
        if pattern.fullmatch(path):
            verdict = not negated
    return verdict


@lru_cache(maxsize=16)
def _compile(rules: str) -> Sequence[tuple[bool, re.Pattern[str]]]:
    compiled = []
    for line in rules.splitlines()[:2000]:
        line = line.rstrip()
        # More stars than anyone needs would let one rule keep the regular expressions busy for minutes.
        if not line or line.startswith("#") or len(line) > 500 or len(re.findall(r"\*+", line)) > 4:
            continue
        negated = line.startswith("!")
        rule = line[1:] if negated else line
        anchored = "/" in rule.rstrip("/")
        folder_only = rule.endswith("/")
        body = _translate(rule.strip("/"))
        head = "" if anchored else "(?:.*/)?"
        tail = "/.*" if folder_only else "(?:/.*)?"
        try:
            compiled.append((negated, re.compile(head + body + tail)))
        except re.error:
            continue
    return compiled


def _translate(rule: str) -> str:
    """A glob as a regular expression, for one whole path."""
    out = ""
    at = 0
    while at < len(rule):
        letter = rule[at]
        if rule.startswith("**/", at):
            out += "(?:.*/)?"
            at += 3
            while rule.startswith("**/", at):
                at += 3
            continue
        if letter == "*":
            run = len(rule[at:]) - len(rule[at:].lstrip("*"))
            out += ".*" if run > 1 else "[^/]*"
            at += run
            continue
        if letter == "[" and (end := rule.find("]", at + 2)) > 0:
            inside = rule[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out += "[" + ("^" + inside[1:] if inside.startswith("!") else inside) + "]"
            at = end + 1
            continue
        out += "[^/]" if letter == "?" else re.escape(letter)
        at += 1
    return out
