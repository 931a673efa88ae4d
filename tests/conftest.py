"""Fixtures of the whole test suite; each plugin file says what its fixtures are."""

from pathlib import Path

_here = Path(__file__).parent
pytest_plugins = [f"tests.{path.stem}" for path in sorted(_here.glob("fixtures_*.py"))]
