"""Licences: what is inherited, and each way in which a release's own does not fit."""

from __future__ import annotations

import pytest

from hubforge.cards import check_license
from hubforge.cards.licenses import family, inherited_license
from hubforge.release import Release, SourceRecord, StepRecord, TargetRecord


def release(ours: str | None, *theirs: str | None) -> Release:
    sources = tuple(
        SourceRecord(name=f"m{index}", kind="model", repo=f"big/m{index}", license=license)
        for index, license in enumerate(theirs)
    )
    step = StepRecord(
        name="stages.s", section="stages", entry="s", op="slerp", makes="model",
        inputs={source.name: f"sources.{source.name}" for source in sources},
    )  # fmt: skip
    target = TargetRecord(name="out", kind="model", repo="me/out", entries=("stages.s",))
    return Release(
        hubforge="0", name="x", license=ours, recipe_file="x.yaml", recipe="", sources=sources, steps=(step,),
        targets=(target,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("gemma", ["gemma"]), ("gemma", ["gemma", "apache-2.0"]), ("apache-2.0", ["mit", "apache-2.0"]),
        ("agpl-3.0", ["gpl-3.0"]), ("cc-by-nc-4.0", ["cc-by-nc-4.0", "mit"]), ("other", ["acme-1.0"]),
        ("llama3.1", ["llama3.1", "apache-2.0"]),
    ],
)  # fmt: skip
def test_what_fits_raises_no_word(ours: str, theirs: list[str]) -> None:
    assert check_license(release(ours, *theirs)) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ("apache-2.0", "gemma", "The recipe says apache-2.0, but big/m0 is under gemma, which binds"),
        ("mit", "llama3.1", "big/m0 is under llama3.1, which binds those who pass the weights on to its own terms."),
        ("apache-2.0", "cc-by-nc-4.0", "forbids commercial use. Write `license: cc-by-nc-4.0`"),
        ("mit", "gpl-3.0", "asks that what is made from it keep the same licence"),
        ("apache-2.0", "cc-by-nd-4.0", "forbids sharing what is made from it. Ask its owner first."),
        ("cc-by-nd-4.0", "cc-by-nd-4.0", "forbids sharing what is made from it"),
        ("mit", "acme-1.0", "has terms that hubforge does not know"),
        ("mit", None, "big/m0 states no licence, so nobody may share"),
        (None, "gemma", "The recipe names no licence; its inputs carry gemma. Write `license: gemma`"),
        (None, None, "names no licence, and neither do its inputs"),
    ],
)
def test_what_does_not_fit_is_said(ours: str | None, theirs: str | None, says: str) -> None:
    assert any(says in problem for problem in check_license(release(ours, theirs))), check_license(
        release(ours, theirs)
    )


def test_two_inputs_with_terms_of_their_own() -> None:
    problems = check_license(release("gemma", "gemma", "llama3.1"))
    assert any("big/m0 (gemma) and big/m1 (llama3.1)" in problem for problem in problems)


@pytest.mark.parametrize(
    ("ours", "theirs", "inherited"),
    [
        ("mit", ["gemma"], "mit"),
        (None, ["gemma", "apache-2.0"], "gemma"),
        (None, ["apache-2.0", "apache-2.0"], "apache-2.0"),
        (None, ["apache-2.0", "mit"], ""),
        (None, ["gemma", "llama3.1"], ""),
        (None, [None], ""),
    ],
)
def test_inherited(ours: str | None, theirs: list[str | None], inherited: str) -> None:
    assert inherited_license(release(ours, *theirs)) == inherited


def test_a_mask_source_or_data_set_that_shaped_no_weights_does_not_bind(rich_release: Release) -> None:
    assert check_license(rich_release) == []
    mine = rich_release.model_copy(update={"license": "apache-2.0"})
    weights = check_license(mine, "weights")
    assert len(weights) == 1
    assert "google/gemma-4-E4B-it is under gemma" in weights[0]
    assert any("gemma-4-E4B-pt" in problem for problem in check_license(mine, "adapter"))


def test_training_data_that_forbids_commerce_is_named(rich_release: Release) -> None:
    sources = tuple(
        source.model_copy(update={"license": "cc-by-nc-4.0"}) if source.name == "chats" else source
        for source in rich_release.sources
    )
    (problem,) = check_license(rich_release.model_copy(update={"sources": sources}))
    assert problem == "me/chats, on which an adapter was trained, is under cc-by-nc-4.0, which forbids commercial use."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Apache-2.0", "permissive"), ("cc0-1.0", "permissive"), ("gemma", "terms"), ("llama2", "terms"),
        ("creativeml-openrail-m", "terms"), ("cc-by-nc-sa-4.0", "noncommercial"), ("cc-by-nc-nd-4.0", "noderivatives"),
        ("cc-by-sa-4.0", "copyleft"), ("lgpl-3.0", "copyleft"), ("other", "unsure"), ("acme", "unsure"),
    ],
)  # fmt: skip
def test_families(name: str, expected: str) -> None:
    assert family(name) == expected
