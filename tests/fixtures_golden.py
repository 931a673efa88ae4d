"""Golden files: `golden(name, content)` compares with tests/golden/NAME; `pytest --update-golden` rewrites them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden; read the diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, bytes], None]:
    """Fails when the content is not that of tests/golden/NAME, and says how to accept it."""
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, content: bytes) -> None:
        path = FOLDER / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return
        assert path.is_file(), f"{path} is missing: run pytest --update-golden and read the diff"
        expected = path.read_bytes()
        if content != expected:
            # Lines, so that pytest shows which differ.
            assert content.decode().splitlines() == expected.decode().splitlines(), "pytest --update-golden accepts it"
            pytest.fail(f"{name} differs only in line ends or the final newline")

    return check
