"""A small SVG builder: shapes and text in a picture that stands alone, readable on light and dark pages.

It is shown through <img>: no scripts, no fonts from elsewhere, styles inside. Colours follow the reader's scheme.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from xml.sax.saxutils import escape, quoteattr

FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', 'Noto Sans', Helvetica, Arial, sans-serif"

# GitHub's and the Hub's page colours; blue and orange stay apart for colour-blind readers too.
STYLE = """
svg { font-family: FONT; font-size: 13px; }
.page { fill: #ffffff; stroke: #d0d7de; }
.ink { fill: #1f2328; } .dim { fill: #59636e; } .strong { font-weight: 600; }
.line { stroke: #d0d7de; stroke-width: 1; fill: none; } .axis { stroke: #818b98; stroke-width: 1; fill: none; }
.good { fill: #0550ae; stroke: #0550ae; } .bad { fill: #bc4c00; stroke: #bc4c00; }
.plain { fill: #59636e; stroke: #59636e; } .hollow { fill: #ffffff; stroke: #59636e; }
.bar { fill: #218bff; } .bar2 { fill: #8250df; } .whisker { stroke-width: 2; }
.over { stroke: #1f2328; stroke-width: 1.5; } .curve { stroke: #0550ae; stroke-width: 1.8; fill: none; }
.box { fill: #f6f8fa; stroke: #d0d7de; } .made { fill: #ddf4ff; stroke: #54aeff; }
.end { fill: #0969da; stroke: #0969da; } .onend { fill: #ffffff; }
.edge { stroke: #818b98; stroke-width: 1.4; fill: none; }
.small { font-size: 11px; } .title { font-size: 14px; font-weight: 600; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d; }
.ink { fill: #f0f6fc; } .dim { fill: #9198a1; }
.line { stroke: #3d444d; } .axis { stroke: #656c76; }
.good { fill: #79c0ff; stroke: #79c0ff; } .bad { fill: #ffa657; stroke: #ffa657; }
.plain { fill: #9198a1; stroke: #9198a1; } .hollow { fill: #0d1117; stroke: #9198a1; }
.bar { fill: #388bfd; } .bar2 { fill: #8957e5; } .over { stroke: #f0f6fc; }
.curve { stroke: #79c0ff; }
.box { fill: #151b23; stroke: #3d444d; } .made { fill: #121d2f; stroke: #1f6feb; }
.end { fill: #1f6feb; stroke: #1f6feb; } .edge { stroke: #656c76; }
}""".replace("FONT", FONT)


class Picture:
    """Shapes on a page of `width` by `height` pixels; `render` gives the file."""

    def __init__(self, width: float, title: str, description: str) -> None:
        self.width, self.height = width, 0.0
        self.title, self.description = title, description
        self._parts: list[str] = []

    def text(self, x: float, y: float, words: str, style: str = "ink", anchor: str = "start") -> None:
        """Words with their baseline at y; anchor: start, middle or end."""
        where = f'x="{number(x)}" y="{number(y)}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        self._parts.append(f'<text {where} class="{style}">{escape(_printable(words))}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "line") -> None:
        ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
        self._parts.append(f'<line {ends} class="{style}"/>')

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        style: str,
        radius: float = 0,
        hint: str = "",
        dashed: bool = False,
    ) -> None:
        """A rectangle; hint is what a pointer over it shows where the file is opened by itself."""
        size = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        rounded = (f' rx="{number(radius)}"' if radius else "") + (' stroke-dasharray="4 3"' if dashed else "")
        body = f"><title>{escape(_printable(hint))}</title></rect>" if hint else "/>"
        self._parts.append(f'<rect {size}{rounded} class="{style}"{body}')

    def circle(self, x: float, y: float, radius: float, style: str) -> None:
        self._parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" class="{style}"/>')

    def path(self, data: str, style: str) -> None:
        self._parts.append(f'<path d="{data}" class="{style}"/>')

    def render(self) -> str:
        """The picture as an SVG file."""
        width, height = number(self.width), number(self.height)
        inside = f'width="{number(self.width - 1)}" height="{number(self.height - 1)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label={quoteattr(_printable(self.title))}>'
        )
        lines = [
            head,
            f"<title>{escape(_printable(self.title))}</title>",
            f"<desc>{escape(_printable(self.description))}</desc>",
            f"<style>{STYLE}</style>",
            f'<rect x="0.5" y="0.5" {inside} rx="6" class="page"/>',
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """At most two decimals: the same text on every machine."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def text_width(words: str, size: float = 13, *, bold: bool = False) -> float:
    """Width of the words in pixels, a little more than a common sans-serif face would take."""
    total = 0.0
    for letter in words:
        if unicodedata.east_asian_width(letter) in "WF":
            total += 1.0
        elif letter in "iljI|.,:;'!()[]/ ft":
            total += 0.36
        elif letter in "mwMW@%—":
            total += 0.92
        elif letter.isupper() or letter in "_+=<>−×→↑↓":
            total += 0.72
        else:
            total += 0.585
    return total * size * (1.06 if bold else 1.0)


def fit(words: str, width: float, size: float = 13, *, bold: bool = False) -> str:
    """The words, cut with an ellipsis in the middle where they are wider than `width`; both ends tell names apart."""
    if text_width(words, size, bold=bold) <= width:
        return words
    for keep in range(len(words) - 1, 1, -1):
        left = (keep + 1) // 2
        cut = words[:left].rstrip() + "…" + words[len(words) - (keep - left) :].lstrip()
        if text_width(cut, size, bold=bold) <= width:
            return cut
    return "…"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover low to high, `about` of them or fewer."""
    if not low < high:
        span = abs(low) * 0.1 or 1.0
        low, high = low - span, high + span
    raw = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_labels(values: Sequence[float], unit: str = "") -> list[str]:
    """The ticks with as many decimals as tell them apart."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    for places in range(0, 7):
        if abs(round(step, places) - step) < step * 1e-6:
            break
    return [f"{value:.{places}f}".replace("-", "−") + unit for value in values]


def _printable(words: str) -> str:
    """Without characters that XML 1.0 forbids."""
    return "".join(letter if letter.isprintable() else " " for letter in words)
