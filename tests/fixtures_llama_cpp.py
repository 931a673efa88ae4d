"""Session fixtures: llama.cpp's converter, and a tiny model as GGUF files. Made once for all workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hubforge.llama_cpp.tree import Tree


@pytest.fixture(scope="session")
def converter_tree() -> Tree:
    """The pinned converter, in the user's cache: fetched at most once on a machine (36 MB)."""
    from hubforge.llama_cpp.tree import get_tree

    return get_tree(None)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama_256: Path, converter_tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tiny_llama_256` as BF16, Q8_0, Q6_K and Q4_K_M; by type."""
    from filelock import FileLock

    from hubforge.llama_cpp.converter import convert
    from hubforge.llama_cpp.quantizer import quantize

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-gguf"
    folder.mkdir(exist_ok=True)
    paths = {type_: folder / f"tiny-{type_}.gguf" for type_ in ("BF16", "Q8_0", "Q6_K", "Q4_K_M")}
    with FileLock(folder / "lock"):
        if not paths["BF16"].is_file():
            card, general = {"license": "mit", "tags": ["tiny"]}, {"author": "someone"}
            convert(tiny_llama_256, paths["BF16"], tree=converter_tree, name="tiny", card=card, general=general)
        for type_, path in paths.items():
            if not path.is_file():
                quantize(paths["BF16"], path, type_)
    return paths
