"""A handful of the drawn schedules of faults; `python -m tests.publish.schedules` runs a thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.publish.schedules import run_schedule


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch, lfs_transport: None) -> None:
    monkeypatch.setattr("hubforge.publish._retry.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("seed", range(4))
def test_a_release_under_drawn_faults_and_deaths(tmp_path: Path, seed: int) -> None:
    assert run_schedule(seed, tmp_path)["faults"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4, 1000, 83))
def test_a_thousand_releases_under_drawn_faults_and_deaths(tmp_path: Path, block: int) -> None:
    for seed in range(block, block + 83):
        run_schedule(seed, tmp_path / str(seed))
