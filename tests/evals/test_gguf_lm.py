"""A GGUF under lm-eval gives what its model gives: the same prompts, tokens, scores and replies."""

import pytest

from hubforge.evals.lm_eval import LmEval


def both(run_on, task, tiny_llama_256, tiny_gguf, tasks_folder, **fields):
    op = LmEval(on=["m"], tasks=[task], include="tasks", max_length=256, **fields)
    mine = run_on(op, m=tiny_llama_256, tasks=tasks_folder)
    return mine, run_on(op, m=tiny_gguf, tasks=tasks_folder)


@pytest.mark.parametrize("fields", [{}, {"apply_chat_template": False}, {"system_prompt": "Be brief."}])
def test_prompts_and_replies(run_on, tiny_llama_256, tiny_gguf, tasks_folder, fields):
    mine, gguf = both(run_on, "writes", tiny_llama_256, tiny_gguf, tasks_folder, **fields)
    assert [line["prompt"] for line in gguf[1]] == [line["prompt"] for line in mine[1]]
    assert [line["response"] for line in gguf[1]] == [line["response"] for line in mine[1]]
    assert gguf[0]["metrics"] == mine[0]["metrics"]


def test_what_is_recorded(run_on, tiny_llama_256, tiny_gguf, tasks_folder, capfd):
    (mine, _, _), (gguf, _, events) = both(run_on, "writes", tiny_llama_256, tiny_gguf, tasks_folder)
    assert capfd.readouterr() == ("", "")
    assert gguf["conditions"]["type"] == "F32"
    assert "llama" in gguf["conditions"]["runtime"]
    assert gguf["conditions"]["chat_template_sha256"] == mine["conditions"]["chat_template_sha256"]
    assert list(gguf["conditions"]["weights"]) == [tiny_gguf.name]
    assert events


def test_choices(run_on, tiny_llama_256, tiny_gguf, tasks_folder):
    mine, gguf = both(run_on, "chooses", tiny_llama_256, tiny_gguf, tasks_folder)
    for ours, theirs in zip(gguf[1], mine[1], strict=True):
        for (score, greedy), (other, other_greedy) in zip(
            [choice[0] for choice in ours["response"]], [choice[0] for choice in theirs["response"]], strict=True
        ):
            assert score == pytest.approx(other, abs=5e-3)  # llama.cpp keeps keys and values in half precision
            assert greedy == other_greedy


def test_whole_texts(run_on, tiny_llama_256, tiny_gguf, tasks_folder):
    mine, gguf = both(run_on, "reads", tiny_llama_256, tiny_gguf, tasks_folder)
    bits = [found["metrics"]["bits_per_byte"]["value"] for found, _, _ in (mine, gguf)]
    assert bits[1] == pytest.approx(bits[0], rel=1e-4)
