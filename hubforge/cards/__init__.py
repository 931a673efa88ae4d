"""Model cards: from a release to README.md and its pictures. Needs jinja2, pydantic and pyyaml, nothing heavier."""

from hubforge.cards.licenses import check_license
from hubforge.cards.render import render, templates_folder

__all__ = ["check_license", "render", "templates_folder"]
