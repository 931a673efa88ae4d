"""The plan: the fastest way that fits, and what it says when none does."""

from dataclasses import replace

import pytest

from hubforge.errors import StepError
from hubforge.masks._memory import Room, Work, choose, work_of

GB = 1_000_000_000
# Ten layers with 4 GB of sums each; one token takes 1 MB of activations per layer, and 1 MB in the head.
WORK = Work(
    weights=20 * GB,
    sums={f"model.layers.{n}.mlp.up_proj.weight": 4 * GB for n in range(10)},
    itemsize=2,
    layers=dict.fromkeys(range(10), 1e6),
    head=1e6,
    hidden=10_000,
    length=100,
    tokens=1000,
    examples=10,
    cuts=frozenset(range(10)),
)


@pytest.mark.parametrize(
    ("device", "host", "disk", "engine", "batch"),
    [
        (90, 50, 1, "device", 8),  # 20 + 40 of sums, 12 for one mean, 8.8 of activations
        (79, 50, 1, "device", 2),
        (60, 50, 1, "groups", 8),
        (38.6, 50, 60, "groups", 4),  # 20, 12, and one layer: 4 and 0.4
        (38.2, 70, 60, "groups", 1),
    ],
)
def test_the_first_that_fits(device: float, host: float, disk: float, engine: str, batch: int) -> None:
    plan = choose(WORK, Room(device * GB, host * GB, disk * GB))
    assert (plan.engine, plan.batch) == (engine, batch)


@pytest.mark.parametrize(("host", "disk", "engine"), [(60, 1, "host"), (20, 60, "disk")])
def test_layers_that_cannot_be_parted_have_their_sums_elsewhere(host: float, disk: float, engine: str) -> None:
    work = replace(WORK, cuts=frozenset({0}))
    assert choose(work, Room(50 * GB, host * GB, disk * GB)).engine == engine


def test_groups_cover_the_layers_from_the_top_without_gaps() -> None:
    plan = choose(WORK, Room(60 * GB, 50 * GB, GB))
    assert plan.groups[0][1] == 10 and plan.groups[-1][0] == 0
    assert all(above[0] == below[1] for above, below in zip(plan.groups, plan.groups[1:], strict=False))
    sizes = [last - first for first, last in plan.groups]
    assert max(sizes) - min(sizes) <= 2 and len(sizes) == 2


def test_layers_below_the_lowest_target_belong_to_no_group() -> None:
    sums = {name: held for name, held in WORK.sums.items() if int(name.split(".")[2]) >= 6}
    plan = choose(replace(WORK, sums=sums), Room(60 * GB, 50 * GB, GB), "groups")
    assert plan.groups == ((6, 10),)


def test_nothing_fits() -> None:
    with pytest.raises(StepError, match=r"of the device's memory are needed \(groups\), and 5 GB are free"):
        choose(WORK, Room(5 * GB, 50 * GB, GB))


def test_on_a_cpu_there_is_one_memory() -> None:
    assert choose(WORK, Room(90 * GB, None, GB)).engine == "device"
    assert choose(WORK, Room(60 * GB, None, GB)).engine == "groups"
    assert choose(replace(WORK, cuts=frozenset()), Room(60 * GB, None, 60 * GB)).engine == "disk"


def test_the_sums_of_a_checkpoint_are_counted_by_layer() -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (6, 4), "model.layers.0.norm.weight": (4,), "lm_head.weight": (9, 4)}
    work = work_of(shapes, ["model.layers.0.mlp.up_proj.weight"], {"vocab_size": 9, "hidden_size": 4}, [3, 5], 2, {0})
    assert (work.weights, work.sums) == (2 * (24 + 4 + 36), {"model.layers.0.mlp.up_proj.weight": 96})
    assert (work.length, work.tokens, work.hidden, work.layers) == (5, 8, 8, {0: 3.0 * 2 * 10})
    assert work_of(shapes, ["lm_head.weight"], {}, [3], 2, {0}).cuts == frozenset()
