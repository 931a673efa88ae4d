"""Nothing here downloads into the user's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from hubforge.hub import LocalHub

disable_progress_bars()


@pytest.fixture
def api(local_hub: LocalHub) -> HfApi:
    return local_hub.api()


@pytest.fixture
def repo(api: HfApi) -> str:
    """An empty model repository, `me/model`."""
    return api.create_repo("me/model").repo_id


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
