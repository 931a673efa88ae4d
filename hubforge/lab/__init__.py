"""The lab: tiny real models trained on the spot, so that the demo and the tests have something true to work on.

It stands apart: it imports nothing of hubforge but its errors; only the command line, the tests and the demo use it.
"""

from .build import Family, build
from .corpora import Budget

__all__ = ["Budget", "Family", "build"]
