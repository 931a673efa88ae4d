"""Parameters by layer and module: by hand, which pattern wins, and what is refused."""

import pytest
from pydantic import TypeAdapter, ValidationError

from hubforge.tensors.schedule import PerModel, Schedule, depth_of, fits, value_at, values_of

UP = "model.layers.3.mlp.up_proj.weight"


def test_a_number_is_the_same_everywhere():
    assert value_at(0.2, UP, 0.7) == 0.2


@pytest.mark.parametrize(
    ("layer", "expected"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.75), (4, 0.5), (None, 0.0)], ids=str
)
def test_a_gradient_goes_in_straight_lines_over_the_layers(layer, expected):
    # Five layers: 0, 1 and 0.5 stand at layers 0, 2 and 4. What is outside the layers takes the first.
    assert value_at([0.0, 1.0, 0.5], UP, depth_of(layer, 5)) == expected


def test_a_gradient_of_one_value_and_a_model_of_one_layer():
    assert value_at([0.3], UP, 1.0) == 0.3
    assert value_at([0.3, 0.9], UP, depth_of(0, 1)) == 0.3


def test_the_longest_pattern_that_fits_wins_whatever_the_order():
    one = {"default": 0.1, "mlp.*": 0.3, "mlp.up_proj": [0.5, 0.7], "self_attn": 0.9}
    for schedule in (one, dict(reversed(one.items()))):
        assert value_at(schedule, UP, 1.0) == 0.7
        assert value_at(schedule, UP.replace("up", "down"), 1.0) == 0.3
        assert value_at(schedule, "model.norm.weight", 1.0) == 0.1


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("mlp", True),
        ("mlp.*", True),
        ("layers.3", True),
        ("layers.[0-5].mlp", True),
        ("model.layers.3.mlp.up_proj.weight", True),
        ("*", True),
        ("up", False),
        ("layers.33", False),
        ("self_attn", False),
    ],
)
def test_patterns_fit_whole_parts_of_the_name(pattern, expected):
    assert fits(pattern, UP) is expected


def test_every_value_of_a_schedule():
    schedule = TypeAdapter(PerModel).validate_python([0.1, [0.2, 0.3], {"mlp": [0.4], "default": 0.5}])
    assert list(values_of(schedule)) == [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"mlp": 0.3}, "needs an entry 'default'"), ([], "at least 1 item"), (float("nan"), "finite")],
    ids=["no default", "no values", "nan"],
)
def test_wrong_schedules(wrong, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Schedule).validate_python(wrong)
