"""The Hub of these tests."""

from __future__ import annotations

import pytest

from hubforge.publisher import Hub


@pytest.fixture
def hub(hub_of_me: Hub) -> Hub:
    return hub_of_me
