"""A card's Markdown as HTML that is safe to show: sanitised, its pictures and links kept inside the repository."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hubforge.hub.pages.highlight import colour_classes, highlight

# fmt: off
_TAGS: Final = {
    "a", "abbr", "b", "blockquote", "br", "caption", "center", "cite", "code", "col", "colgroup", "dd", "del",
    "details", "div", "dl", "dt", "em", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img",
    "ins", "kbd", "li", "mark", "ol", "p", "picture", "pre", "q", "s", "samp", "small", "span", "strong", "sub",
    "summary", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "tt", "u", "ul", "var", "video",
}
# fmt: on
_ATTRIBUTES: Final = {
    "*": {"align", "class", "dir", "id", "lang", "title"},
    "a": {"href"},
    "abbr": {"title"},
    "details": {"open"},
    "img": {"src", "alt", "width", "height"},
    "li": {"value"},
    "ol": {"start", "type"},
    "td": {"colspan", "rowspan", "valign"},
    "th": {"colspan", "rowspan", "valign", "scope"},
    "video": {"src", "controls", "width", "height"},
}
_CLASS: Final = re.compile(r"code|away|al-(?:left|center|right)|alert(?:-[a-z]+)?|language-[\w+-]+")
_ALERT: Final = re.compile(r"\[!(NOTE|TIP|IMPORTANT|WARNING|CAUTION)\][ \t]*(?:\n|$)", re.IGNORECASE)
_DATA_IMAGE: Final = re.compile(r"data:image/(?:png|jpeg|gif|webp|svg\+xml);base64,[A-Za-z0-9+/=]+")
_MAX: Final = 1 << 20  # Characters of a card that are rendered.


def render(text: str, repo: str, revision: str, folder: str = "", *, remote_images: bool = False) -> str:
    """HTML of a Markdown file, safe to put on a page.

    repo: the id with its prefix. folder: where in the repository the file is; relative addresses start there.
    remote_images: False leaves out the address of pictures elsewhere, so that only their text is shown.
    """
    keep = _Addresses(repo, revision, folder, remote_images)
    html = _markdown(keep).render(text[:_MAX])
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=keep,
        url_schemes={"http", "https", "mailto", "data"},
        link_rel="noopener noreferrer nofollow ugc",
        clean_content_tags={"script", "style", "iframe", "object", "noscript", "template", "title", "textarea"},
    )


class _Addresses:
    """Decides about each attribute of a card: kept, changed, or (None) left out."""

    def __init__(self, repo: str, revision: str, folder: str, remote_images: bool) -> None:
        self.repo, self.revision, self.folder, self.remote_images = (
            repo,
            quote(revision, safe=""),
            folder,
            remote_images,
        )

    def __call__(self, tag: str, attribute: str, value: str) -> str | None:
        if attribute == "class":
            kept = [name for name in value.split() if _CLASS.fullmatch(name) or name in colour_classes()]
            return " ".join(kept) or None
        if attribute == "id":  # Ours; others could stand in for parts of the page.
            return value if value.startswith("h-") else None
        if attribute == "src":
            return self._picture(value)
        if attribute == "href":
            return self._link(value)
        return value

    def _picture(self, address: str) -> str | None:
        if address.startswith("data:"):
            return address if _DATA_IMAGE.fullmatch(address) else None
        if self._is_elsewhere(address):
            return address if self.remote_images and address.startswith("https://") else None
        return self._inside(address, "resolve")

    def _link(self, address: str) -> str | None:
        if address.startswith("#"):
            return f"#h-{slug(unquote(address[1:]))}"
        if address.startswith("data:"):
            return None
        return address if self._is_elsewhere(address) else self._inside(address, "blob")

    def _is_elsewhere(self, address: str) -> bool:
        try:
            parts = urlsplit(address)
        except ValueError:
            return True
        return bool(parts.scheme or parts.netloc or address.startswith("/"))

    def _inside(self, address: str, view: str) -> str | None:
        path, _, fragment = address.partition("#")
        path = posixpath.normpath(posixpath.join(self.folder, unquote(path.partition("?")[0])))
        if path.startswith(("..", "/")):
            return None
        return f"/{self.repo}/{view}/{self.revision}/{quote(path)}" + (f"#{quote(fragment)}" if fragment else "")


def slug(heading: str) -> str:
    """The anchor of a heading, as people write it in links: lower case, hyphens for blanks."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _markdown(keep: _Addresses) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": True, "highlight": _fence}).enable(["table", "strikethrough"])
    parser.core.ruler.push("headings", _each(_heading))
    parser.core.ruler.push("cells", _each(_cell))
    parser.core.ruler.push("alerts", _each(_alert))
    parser.core.ruler.push("pictures", _each(lambda tokens, index: _pictures(tokens[index], keep)))
    return parser


def _fence(code: str, language: str, _: object) -> str:
    # markdown-it takes a result that begins with <pre as it is.
    return f'<pre class="code"><code>{highlight(code, language=language)}</code></pre>'


def _each(change: Callable[[Sequence[Token], int], None]) -> Callable[..., None]:
    def rule(state: object) -> None:
        tokens: Sequence[Token] = state.tokens  # type: ignore[attr-defined]
        for index in range(len(tokens)):
            change(tokens, index)

    return rule


def _heading(tokens: Sequence[Token], index: int) -> None:
    if tokens[index].type == "heading_open":
        text = "".join(
            child.content for child in tokens[index + 1].children or () if child.type in ("text", "code_inline")
        )
        tokens[index].attrSet("id", f"h-{slug(text)}")


def _cell(tokens: Sequence[Token], index: int) -> None:
    """Alignment as a class: the pages' policy allows no style attributes."""
    style = tokens[index].attrs.pop("style", None)
    if isinstance(style, str) and style.startswith("text-align:"):
        tokens[index].attrSet("class", f"al-{style.removeprefix('text-align:')}")


def _pictures(token: Token, keep: _Addresses) -> None:
    """A picture that will not be fetched is shown as its text."""
    for child in token.children or ():
        if child.type == "image" and keep("img", "src", str(child.attrs.get("src", ""))) is None:
            child.type, child.children = "html_inline", None
            child.content = (
                f'<span class="away" title="A picture elsewhere">{escape(child.content or "picture")}</span>'
            )


def _alert(tokens: Sequence[Token], index: int) -> None:
    """`> [!NOTE]` becomes a coloured box, as on GitHub and the Hub."""
    if tokens[index].type != "blockquote_open" or index + 2 >= len(tokens) or tokens[index + 2].type != "inline":
        return
    inline = tokens[index + 2]
    match = _ALERT.match(inline.content)
    if not match or not inline.children:
        return
    kind = match.group(1).lower()
    tokens[index].attrSet("class", f"alert alert-{kind}")
    rest = inline.children[1:]  # The first child is the text `[!NOTE]`; a line break may follow.
    if rest and rest[0].type == "softbreak":
        rest = rest[1:]
    label = Token("text", "", 0, content=kind.capitalize())
    bold = [Token("strong_open", "strong", 1), label, Token("strong_close", "strong", -1)]
    inline.children = [*bold, Token("hardbreak", "br", 0), *rest]
