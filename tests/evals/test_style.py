"""style: texts drawn from seeds of their own, measured, and compared text by text."""

import json
import math
from typing import Any

import pytest
import torch

from hubforge.errors import StepError
from hubforge.evals._answers import FILE
from hubforge.evals._compare import compare
from hubforge.evals._prose import measure, slop_list
from hubforge.evals._storytellers import gumbel_noise, seed_of
from hubforge.evals.style import PROMPTS, Style
from hubforge.events import Progress, Warned


def op(**fields: Any) -> Style:
    return Style(**{"on": ["m"], "limit": 3, "samples": 2, "max_new_tokens": 10} | fields)


def test_each_text_is_measured(run_on, tiny_llama, capfd):
    found, lines, events = run_on(op(slop=["boat"]), m=tiny_llama)
    assert capfd.readouterr() == ("", "")
    assert [(line["doc_id"], line["sample"]) for line in lines] == [(i, k) for i in range(3) for k in range(2)]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS[:3] for _ in range(2)]
    assert all(line["metrics"] == measure(line["response"], slop_list(("boat",))) for line in lines)
    metric = found["metrics"]["word_count"]
    means = [(lines[2 * i]["metrics"]["word_count"] + lines[2 * i + 1]["metrics"]["word_count"]) / 2 for i in range(3)]
    assert metric["value"] == pytest.approx(sum(means) / 3)
    assert (metric["n"], metric["samples"], metric["unit"], metric["task"]) == (3, 2, "words", "style")
    assert set(found["metrics"]) == op().known_metrics()
    counts = [event.done for event in events if isinstance(event, Progress)]
    assert counts == sorted(counts) and counts[-1] == 6


def test_texts_do_not_depend_on_the_batch(run_on, tiny_llama):
    _, one, _ = run_on(op(batch_size=1), m=tiny_llama)
    _, many, _ = run_on(op(batch_size=4), m=tiny_llama)
    assert [line["response"] for line in one] == [line["response"] for line in many]


def test_samples_differ_and_a_seed_repeats_them(run_on, tiny_llama):
    _, lines, _ = run_on(op(limit=1, samples=4), m=tiny_llama)
    _, again, _ = run_on(op(limit=1, samples=4), m=tiny_llama)
    _, other, _ = run_on(op(limit=1, samples=4, seed=1), m=tiny_llama)
    assert len({line["response"] for line in lines}) == 4
    assert lines == again
    assert not {line["response"] for line in lines} & {line["response"] for line in other}


def test_temperature_zero_is_greedy(run_on, tiny_llama):
    _, lines, _ = run_on(op(temperature=0, limit=1), m=tiny_llama)
    assert lines[0]["response"] == lines[1]["response"]


def test_models_are_compared_text_by_text(run_on, tiny_llama, tiny_llama_other):
    _, lines, _ = run_on(op(), m=tiny_llama)
    _, other, _ = run_on(op(), m=tiny_llama_other)
    assert all(one.difference == 0 for one in compare(lines, lines).values())
    assert {one.n for one in compare(lines, other).values()} == {3}


def test_gumbel_noise_draws_from_the_softmax():
    """2000 draws at temperature 2: each share within four standard errors of its probability."""
    logits, temperature, n = torch.tensor([2.0, 0.0, -1.0]), 2.0, 2000
    noise = gumbel_noise(range(n), temperature, torch.device("cpu"), lambda step: None)
    drawn = noise(None, logits.expand(n, 3)).argmax(dim=1)
    for token, p in enumerate(torch.softmax(logits / temperature, dim=0).tolist()):
        assert (drawn == token).sum().item() / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_seeds_of_texts():
    seeds = {seed_of(0, prompt, k) for prompt in PROMPTS for k in range(100)}
    assert len(seeds) == 1000
    assert seed_of(0, "a", 0) == seed_of(0, "a", 0) != seed_of(1, "a", 0)
    assert max(seeds) < 2**31


def test_a_killed_run_goes_on(run_on, tiny_llama, tmp_path, monkeypatch):
    from hubforge.evals._storytellers import ModelStoryteller

    whole, lines, _ = run_on(op(batch_size=2), m=tiny_llama)
    batches: list[int] = []
    write = ModelStoryteller._write

    def counted(self: Any, prompts: Any, *more: Any) -> Any:
        batches.append(len(prompts))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return write(self, prompts, *more)

    monkeypatch.setattr(ModelStoryteller, "_write", counted)
    with pytest.raises(KeyboardInterrupt):
        run_on(op(batch_size=2), m=tiny_llama)
    assert (tmp_path / "out" / FILE).is_file()
    again, lines_again, events = run_on(op(batch_size=2), m=tiny_llama)
    assert batches == [2, 2, 2, 2]
    assert (again, lines_again) == (whole, lines)
    assert next(event for event in events if isinstance(event, Progress)).done == 2
    assert not (tmp_path / "out" / FILE).exists()


def test_prompts_of_ones_own(run_on, tiny_llama, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "Tell of the sea."}\n{"instruction": "Tell of Mara."}\n')
    _, lines, _ = run_on(op(prompts="p", samples=1), m=tiny_llama, p=path)
    assert [line["prompt"] for line in lines] == ["Tell of the sea.", "Tell of Mara."]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"question": "?"}', "the prompts in 'p' have none of the columns prompt, text, instruction"),
        ('{"prompt": "a"}\n{"prompt": null}', "row 2 of 'p' has no text under 'prompt'"),
    ],
)
def test_prompts_that_are_none(run_on, tiny_llama, tmp_path, rows, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(rows)
    with pytest.raises(StepError, match=message):
        run_on(op(prompts="p"), m=tiny_llama, p=path)


def test_no_room_for_a_text(run_on, tiny_llama):
    with pytest.raises(StepError, match="a text may take 400 tokens, and 'm' holds 256 in all") as error:
        run_on(op(max_new_tokens=400), m=tiny_llama)
    assert "`max_new_tokens` to 128" in error.value.mend
    with pytest.raises(ValueError, match="max_new_tokens 400 leaves no room in max_length 300"):
        op(max_new_tokens=400, max_length=300)


def test_a_system_prompt_takes_a_template(run_on, tiny_llama):
    with pytest.raises(StepError, match="`system_prompt` takes a chat template, and none is applied"):
        run_on(op(system_prompt="Be brief.", apply_chat_template=False), m=tiny_llama)


def test_empty_texts_are_said(run_on, tiny_llama, monkeypatch):
    from hubforge.evals._storytellers import ModelStoryteller

    monkeypatch.setattr(ModelStoryteller, "_write", lambda self, prompts, *more: [""] * len(prompts))
    found, _, events = run_on(op(), m=tiny_llama)
    assert found["metrics"]["slop"]["value"] == 0
    assert ["6 of 6 texts are empty" in event.text for event in events if isinstance(event, Warned)] == [True]


def test_a_gguf_writes_too(run_on, tiny_llama_256, tiny_gguf):
    found, lines, _ = run_on(op(), m=tiny_gguf)
    _, again, _ = run_on(op(), m=tiny_gguf)
    assert lines == again
    assert len({line["response"] for line in lines}) > 1
    assert found["conditions"]["type"] == "F32"
    _, greedy, _ = run_on(op(temperature=0, limit=2), m=tiny_gguf)
    _, model, _ = run_on(op(temperature=0, limit=2), m=tiny_llama_256)
    assert [line["response"] for line in greedy] == [line["response"] for line in model]


def test_results_are_kept(run_on, tiny_llama, tmp_path):
    found, _, _ = run_on(op(limit=1), m=tiny_llama)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]
