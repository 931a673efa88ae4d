"""Hostile input: no traceback, no hang over 5 s, no memory over 1 GiB, nothing written or run outside the store.

`pytest tests/hostile -m slow` runs 10,000 inputs; `python -m tests.hostile 10000` the same with a table. An input is
known by its kind and number, and comes out the same every time: `python -m tests.hostile --only card:17`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.attacks import ATTACKS
from tests.hostile.spoiling import SpoilingHub
from tests.hostile.watching import Verdict, judge
from tests.hostile.world import build

FEW, MANY = 12, 600  # inputs of each kind: by default, and in the slow run

Run = Callable[[str, int], Verdict]


def prepare(root: Path) -> tuple[Path, SpoilingHub]:
    """The good world with its steps made, and a Hub that holds its release."""
    world = build(root / "good")
    hub = SpoilingHub(root / "hub")
    hub.publish(world)
    return world, hub


def run(kind: str, number: int, good: Path, hub: SpoilingHub, folder: Path) -> Verdict:
    """One input against a fresh copy of the good world, under `folder`."""
    chance = random.Random(f"{kind}:{number}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        return judge(lambda: ATTACKS[kind](chance, folder, hub), folder, (hub.folder,))


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("hostile")
    good, hub = prepare(root)
    yield lambda kind, number: run(kind, number, good, hub, root / "work")
    hub.close()


@pytest.mark.parametrize("kind", ATTACKS)
def test_hostile_input_is_refused_or_harmless(attack: Run, kind: str) -> None:
    found = {number: verdict.faults for number in range(FEW) if (verdict := attack(kind, number)).faults}
    assert not found, report(kind, found)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ATTACKS)
def test_ten_thousand_hostile_inputs(attack: Run, kind: str) -> None:
    found = {number: verdict.faults for number in range(MANY) if (verdict := attack(kind, number)).faults}
    assert not found, report(kind, found)


def report(kind: str, found: dict[int, tuple[str, ...]]) -> str:
    first = next(iter(found))
    return f"{len(found)} of {kind}, the first number {first}: " + "\n".join(found[first])
