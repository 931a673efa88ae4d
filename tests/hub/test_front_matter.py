"""The YAML of a card: read without trust, checked as the Hub checks it."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import get_session

from hubforge.hub import LocalHub
from hubforge.hub.storage.front_matter import BadFrontMatter, check_front_matter, read_card


def card(yaml: str) -> str:
    return f"---\n{yaml}\n---\n# Title\n"


def test_a_card_is_its_metadata_and_its_text():
    read = read_card(card("license: mit\ntags: [a, b]\ndate: 2026-01-02"))
    assert read.data == {"license": "mit", "tags": ["a", "b"], "date": "2026-01-02"}
    assert read.body == "# Title\n"


@pytest.mark.parametrize("text", ["# Title\n---\nnot: this\n---\n", "", "text", "--- x\n---\n"])
def test_without_a_block_all_is_text(text: str):
    assert (read_card(text).data, read_card(text).body) == ({}, text)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("tags: [a", "expected ',' or ']'"),
        ("a: 1\na: 2", "duplicated mapping key 'a' (3)"),
        ("- a\n- b", "must be a mapping"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: &a [*a]", "contains itself"),
        ("a: 2026-13-45", "month must be"),
        ("a: !!bool perhaps", "a value is not of the type that its tag names"),
        ("a: " + "[" * 100 + "]" * 100, "64 deep"),
    ],
)
def test_yaml_that_cannot_be_taken_is_said_so(yaml: str, message: str):
    with pytest.raises(BadFrontMatter) as error:
        read_card(card(yaml))
    assert message in str(error.value)


def test_a_yaml_bomb_is_refused_at_once():
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    started = time.monotonic()
    with pytest.raises(BadFrontMatter, match="more than"):
        read_card(card("\n".join(lines)))
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("yaml", "error"),
    [
        ("license: [1]", '"license" must be a string or a list of strings'),
        ("language: no", '"language" is a boolean'),
        ("base_model: not a model", '"base_model" with value "not a model" is not valid'),
        ("pipeline_tag: [x]", '"pipeline_tag" must be a string'),
        ("model-index: x", '"model-index" must be an array'),
        ("model-index: [{name: x, results: [{metrics: []}]}]", '"model-index[0].results[0].task.type" is required'),
        ("model-index: [{results: []}]", '"model-index[0].name" is required'),
    ],
)
def test_metadata_of_the_wrong_shape_is_an_error(yaml: str, error: str):
    errors, _ = check_front_matter(card(yaml))
    assert any(error in each for each in errors), errors


def test_good_metadata_is_neither_error_nor_warning():
    yaml = "license: apache-2.0\nlanguage: [en, zh-Hans]\nbase_model: a/b\nmodel-index:\n- name: x\n  results:\n"
    yaml += "  - task: {type: t}\n    dataset: {type: d, name: D}\n    metrics: [{type: acc, value: 0.5}]"
    assert check_front_matter(card(yaml)) == ([], [])


def test_the_client_hears_errors_and_warnings(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", local_hub.endpoint)
    ModelCard(card("license: mit")).validate()
    answer = get_session().post(
        f"{local_hub.endpoint}/api/validate-yaml", json={"content": card("tags: 3"), "repoType": "model"}
    )
    assert answer.status_code == 400
    assert answer.json()["errors"] == [{"message": '"tags" must be a string or a list of strings'}]
    with pytest.raises(ValueError, match="must be a string"):
        ModelCard(card("tags: x\npipeline_tag: 3")).validate()


def test_merge_keys_are_refused_before_they_multiply():
    lines = ["m0: &m0 {a: 1}", *(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}], b{n}: 1}}" for n in range(1, 40))]
    errors, _ = check_front_matter("---\n" + "\n".join(lines) + "\n---\n")
    assert "merge keys" in errors[0]
