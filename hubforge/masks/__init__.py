"""Masks: what a merge or a training run should spare. One file each: `op: fisher` is `hubforge/masks/fisher.py`.

To use a published one: `hubforge.masks.load("me/gemma-4-masks", "g4-31b-it")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hubforge.masks._published import Mask

__all__ = ["load"]


def load(
    repo_or_folder: str | Path, name: str | None = None, *, revision: str | None = None, endpoint: str | None = None
) -> Mask:
    """The masks of one model: those in a local folder, or in a repository on the Hub (only what is needed is fetched).

    name: the folder inside it that belongs to the model, such as "g4-31b-it". endpoint: of another Hub than the
    client's own. Tensors are read when asked for, and the files of a kind fetched when one of it is first asked for: a
    subspace costs no download of the Fisher beside it.
    Raises SourceError, naming the folders there are, when there is no mask.
    """
    from hubforge.masks._published import open_mask

    return open_mask(repo_or_folder, name, revision, endpoint)
