"""`op: hub` in a recipe: what it takes, and what it says to what it does not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hubforge.catalog import find
from hubforge.op import MaskRef, ModelRef
from hubforge.publish.hub import HubPublisher


def op(**fields: Any) -> HubPublisher:
    return HubPublisher.model_validate({"repo": "me/model", **fields})


def test_the_module_is_the_op() -> None:
    assert find("publish", "hub") is HubPublisher


def test_the_contents_are_the_refs_of_the_one_field_given() -> None:
    weights = op(model="healed", tag="v1.0")
    assert weights.contents == {"model": ("healed",)} and isinstance(weights.model, ModelRef)
    masks = op(masks=["importance", "core"], folder="g4-e4b-it")
    assert masks.contents == {"masks": ("importance", "core")}
    assert masks.masks is not None and all(isinstance(mask, MaskRef) for mask in masks.masks)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "must name exactly one of model, adapter, gguf and masks, but has none of them"),
        (
            {"model": "a", "gguf": "b"},
            "must name exactly one of model, adapter, gguf and masks, but has model and gguf",
        ),
        ({"model": "a", "folder": "x"}, "has `folder`, which only goes with gguf and masks"),
        ({"masks": ["a"], "folder": "../x"}, "'../x' holds the part '..'"),
        ({"masks": ["a"], "folder": "/x"}, "'/x' is absolute"),
        ({"masks": []}, "is empty, but names one mask or more"),
        ({"masks": ["a", "a"]}, "names 'a' twice"),
        ({"model": "a", "tag": "main"}, "'main' is the name of a branch or ref"),
        ({"model": "a", "tag": "v 1"}, "'v 1' may hold only letters"),
        ({"model": "a", "repo": "model"}, "'model' must be written namespace/name"),
        ({"model": "a", "repo": "me/a--b"}, "'me/a--b' may not hold '--' or '..'"),
        ({"model": "a", "message": " "}, "is empty; leave it out"),
    ],
)
def test_wrong_fields_say_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        op(**fields)
    assert message in str(caught.value)


def test_every_field_is_described() -> None:
    assert all(field.description for field in HubPublisher.model_fields.values())
