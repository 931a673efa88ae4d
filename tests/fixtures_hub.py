"""`local_hub`: a Hub on this test's own folder, spoken to by the real client over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hubforge.hub import LocalHub


@pytest.fixture
def lfs_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files go through LFS, as HF_HUB_DISABLE_XET=1 would have it; the client reads that only when imported."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def local_hub(tmp_path: Path, lfs_transport: None) -> Iterator[LocalHub]:
    """A running Hub: `.endpoint` is its address, `.api()` the real client pointed at it."""
    with LocalHub(tmp_path / "hub") as hub:
        yield hub
