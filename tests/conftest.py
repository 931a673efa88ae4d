"""Fixtures of the whole test suite; each plugin file says what its fixtures are."""

import os
from pathlib import Path

# Before anything imports torch: steps on tiny models are many times slower on two threads than on one, above all with
# as many workers as cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_here = Path(__file__).parent
pytest_plugins = [f"tests.{path.stem}" for path in sorted(_here.glob("fixtures_*.py"))]
