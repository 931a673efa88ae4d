"""Code in colours, when Pygments is there (Rich brings it); plain and escaped otherwise."""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape
from importlib import import_module

_MAX = 200_000


def highlight(code: str, *, language: str = "", filename: str = "") -> str:
    """Spans of classes for one piece of code; its language by name or by the name of its file."""
    try:
        pygments, lexers = import_module("pygments"), import_module("pygments.lexers")
        formatter = import_module("pygments.formatters").HtmlFormatter(nowrap=True)
    except ModuleNotFoundError:
        return escape(code)
    if len(code) > _MAX:
        return escape(code)
    try:
        lexer = lexers.get_lexer_by_name(language) if language else lexers.get_lexer_for_filename(filename)
    except import_module("pygments.util").ClassNotFound:
        return escape(code)
    return str(pygments.highlight(code, lexer, formatter))


@lru_cache(maxsize=1)
def colour_classes() -> frozenset[str]:
    """The class names that `highlight` may give."""
    try:
        return frozenset(import_module("pygments.token").STANDARD_TYPES.values()) - {""}
    except ModuleNotFoundError:
        return frozenset()


@lru_cache(maxsize=1)
def colours() -> str:
    """The style sheet of those classes, for light and dark."""
    try:
        formatters = import_module("pygments.formatters")
    except ModuleNotFoundError:
        return ""

    def rules(style: str) -> str:
        sheet = str(formatters.HtmlFormatter(style=style).get_style_defs(".code"))
        # Backgrounds are the page's own, and bare rules would reach beyond code.
        kept = [line for line in sheet.splitlines() if line.startswith(".code .")]
        return "\n".join(re.sub(r"background-color: [^;}]+;?", "", line) for line in kept)

    return f"{rules('default')}\n@media (prefers-color-scheme: dark) {{\n{rules('github-dark')}\n}}\n"
