"""A handful of the drawn schedules of faults and kills.

`python -m tests.publish.schedules --faults 1000 --kills 100` runs them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.publish.kills import run_kills
from tests.publish.schedules import run_schedule


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch, lfs_transport: None) -> None:
    monkeypatch.setattr("hubforge.publish._retry.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("seed", range(4))
def test_a_release_under_drawn_faults_and_deaths(tmp_path: Path, seed: int) -> None:
    assert run_schedule(seed, tmp_path)["faults"] > 0


@pytest.mark.slow
def test_kill_minus_nine_and_then_once_more(tmp_path: Path) -> None:
    counts = run_kills(1, tmp_path)
    assert counts["killed"] == 1 and counts["broken"] == 0


@pytest.mark.slow
def test_a_hundred_moments_of_kill_minus_nine(tmp_path: Path) -> None:
    assert run_kills(100, tmp_path, seed=1)["broken"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4, 1000, 83))
def test_a_thousand_releases_under_drawn_faults_and_deaths(tmp_path: Path, block: int) -> None:
    for seed in range(block, block + 83):
        run_schedule(seed, tmp_path / str(seed))
