"""lm_eval: what lm-eval finds, found again and kept whole; and silence on the terminal."""

import json
import logging
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from hubforge.errors import StepError
from hubforge.evals._answers import FILE, Answers
from hubforge.evals._compare import compare, intervals
from hubforge.evals.lm_eval import LmEval
from hubforge.events import Progress, Warned
from hubforge.op import Context
from tests.evals.conftest import SHARED, artifact

IFEVAL = SHARED / "ifeval" / "input_data.jsonl"
needs_ifeval = pytest.mark.skipif(not IFEVAL.is_file(), reason="../shared/data/ifeval/input_data.jsonl is not here")


def op(*tasks: str, **fields: Any) -> LmEval:
    return LmEval(
        **{"on": ["m"], "tasks": list(tasks), "include": "tasks", "batch_size": 2, "max_length": 256} | fields
    )


def test_scores_are_those_of_the_samples_by_hand(run_on, tiny_llama, tasks_folder):
    found, lines, _ = run_on(op("writes"), m=tiny_llama, tasks=tasks_folder)
    replies = [line["response"] for line in lines]
    each = [[any(letter in "aeiou" for letter in reply), " " in reply] for reply in replies]
    metrics = found["metrics"]
    assert len(replies) == 5
    assert metrics["all"]["value"] == pytest.approx(sum(map(all, each)) / 5)
    assert metrics["each"]["value"] == pytest.approx(sum(map(sum, each)) / 10)
    assert metrics["all"] | {"value": 0, "stderr": 0} == {
        "value": 0,
        "stderr": 0,
        "n": 5,
        "samples": 1,
        "unit": "",
        "higher_is_better": True,
        "meaning": "all of lm-eval's task writes.",
        "task": "writes",
    }
    assert [line["metrics"]["each"] for line in lines] == [sum(pair) / 2 for pair in each]
    assert all(line["weights"] == {"each": 2.0} for line in lines)


@pytest.mark.parametrize("template", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("task", ["writes", "chooses", "reads"])
def test_same_as_lm_evals_own_simple_evaluate(run_on, tiny_llama, tasks_folder, task, template):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = simple_evaluate(
        HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", batch_size=2),
        tasks=[task],
        task_manager=TaskManager(include_path=str(tasks_folder), include_defaults=False),
        apply_chat_template=template,
        bootstrap_iters=0,
    )
    found, lines, _ = run_on(op(task, apply_chat_template=template), m=tiny_llama, tasks=tasks_folder)
    values = {key: value for key, value in theirs["results"][task].items() if key.endswith(",none")}
    for name, metric in found["metrics"].items():
        assert metric["value"] == values[f"{name},none"]
    assert [line["doc_hash"] for line in lines] == [sample["doc_hash"] for sample in theirs["samples"][task]]
    if task == "writes":
        assert [line["prompt"] for line in lines] == [sample["arguments"][0][0] for sample in theirs["samples"][task]]
        assert [line["response"] for line in lines] == [sample["resps"][0][0] for sample in theirs["samples"][task]]


def test_standard_errors(run_on, tiny_llama, tasks_folder):
    found, lines, _ = run_on(op("writes", "chooses", "reads"), m=tiny_llama, tasks=tasks_folder)
    metrics = found["metrics"]
    values = [line["metrics"]["chooses/acc"] for line in lines if line["task"] == "chooses"]
    mean = sum(values) / 5
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
    assert metrics["chooses/acc"]["stderr"] == pytest.approx(spread / math.sqrt(5))
    # Bits per byte is a ratio of sums over documents, so it has an error and can be compared; a perplexity is neither.
    assert metrics["reads/bits_per_byte"]["stderr"] > 0
    assert metrics["reads/word_perplexity"]["stderr"] is None
    assert {"reads/bits_per_byte"} == {name for line in lines if line["task"] == "reads" for name in line["metrics"]}
    assert metrics["reads/bits_per_byte"]["higher_is_better"] is False
    around = intervals(lines)["reads/bits_per_byte"]
    assert around.value == pytest.approx(metrics["reads/bits_per_byte"]["value"], rel=1e-12)


def test_a_group_has_metrics_of_its_own(run_on, tiny_llama, tasks_folder):
    found, lines, _ = run_on(op("all_of_it"), m=tiny_llama, tasks=tasks_folder)
    metrics = found["metrics"]
    assert set(metrics) == {"all_of_it/acc", "writes/all", "writes/each", "chooses/acc"}
    assert metrics["all_of_it/acc"]["value"] == metrics["chooses/acc"]["value"]
    assert metrics["all_of_it/acc"]["stderr"] is None
    assert len(lines) == 10


def test_a_model_compared_with_itself_differs_in_nothing(run_on, tiny_llama, tiny_llama_other, tasks_folder):
    _, mine, _ = run_on(op("writes"), m=tiny_llama, tasks=tasks_folder)
    _, again, _ = run_on(op("writes"), m=tiny_llama, tasks=tasks_folder)
    _, other, _ = run_on(op("writes"), m=tiny_llama_other, tasks=tasks_folder)
    assert mine == again
    assert all(one.difference == 0 and not one.significant for one in compare(mine, again).values())
    assert [line["doc_hash"] for line in mine] == [line["doc_hash"] for line in other]


def test_what_lm_eval_does_not_record(run_on, tiny_llama, tasks_folder, tmp_path):
    given = artifact("m", tiny_llama)
    found, _, _ = run_on(op("writes", limit=3), m=given, tasks=tasks_folder)
    conditions = found["conditions"]
    assert conditions["weights"] == {f.path: f.sha256 for f in given.files if f.path.endswith(".safetensors")}
    assert (conditions["type"], conditions["max_length"], conditions["limit"]) == ("float32", 256, 3)
    assert conditions["chat_template"] is True
    assert len(conditions["chat_template_sha256"]) == 64
    task = conditions["tasks"]["writes"]
    assert (task["version"], task["documents"], task["of"], task["num_fewshot"]) == (2, 3, 5, 0)
    assert task["generation_kwargs"] == {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    whole, _, _ = run_on(op("writes"), m=given, tasks=tasks_folder)
    assert whole["conditions"]["tasks"]["writes"]["config_sha256"] == task["config_sha256"]
    assert whole["conditions"]["tasks"]["writes"]["documents_sha256"] != task["documents_sha256"]
    kept = (tmp_path / "out" / "results.json").read_text()
    assert "def score" in kept  # the scorer's own code is part of the definition
    assert str(tasks_folder) not in kept and str(tiny_llama) not in kept
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]


def test_nothing_is_printed_and_everything_is_put_back(run_on, tiny_llama, tasks_folder, capfd):
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    state = random.getstate()
    _, _, events = run_on(op("writes", "reads"), m=tiny_llama, tasks=tasks_folder)
    assert capfd.readouterr() == ("", "")
    assert [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers] == before
    assert random.getstate() == state
    assert not (tasks_folder / "__pycache__").exists()
    counts = [event.done for event in events if isinstance(event, Progress)]
    assert counts == sorted(counts) and counts[-1] == 10
    assert not [event for event in events if isinstance(event, Warned)]


def test_a_cut_prompt_is_said(run_on, tiny_llama, tasks_folder):
    _, _, events = run_on(op("writes", max_length=20), m=tiny_llama, tasks=tasks_folder)
    (warned,) = [event.text for event in events if isinstance(event, Warned)]
    assert "Left truncation applied" in warned


def test_a_killed_eval_goes_on_where_it_was(run_on, tiny_llama, tasks_folder, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    whole, lines, _ = run_on(op("writes"), m=tiny_llama, tasks=tasks_folder)
    asked: list[int] = []
    generate = HFLM._model_generate

    def counted(self: Any, context: Any, **more: Any) -> Any:
        asked.append(len(context))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(self, context=context, **more)

    monkeypatch.setattr(HFLM, "_model_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_on(op("writes"), m=tiny_llama, tasks=tasks_folder)
    kept = tmp_path / "out" / FILE
    assert len(kept.read_text().splitlines()) == 4
    kept.write_text(kept.read_text()[:-5])  # and the kill cut the last line short: its batch is asked again
    again, lines_again, _ = run_on(op("writes"), m=tiny_llama, tasks=tasks_folder)
    assert asked == [2, 2, 1, 2, 1]
    assert (again, lines_again) == (whole, lines)
    assert not kept.exists()


def test_sampled_answers_are_never_kept(tmp_path):
    answers = Answers(tmp_path / FILE, 1, lambda done, total: None)
    answers.add_partial("generate_until", ("a", {"do_sample": True}), "x")
    answers.add_partial("generate_until", ("a", {"do_sample": False}), "y")
    assert list(Answers(tmp_path / FILE, 1, lambda done, total: None).kept.values()) == ["y"]


def test_documents_of_ones_own(run_on, tiny_llama, tasks_folder, tmp_path):
    data = tmp_path / "words.jsonl"
    data.write_text('{"word": "boat"}\n{"word": "sail"}\n')
    _, lines, _ = run_on(op("writes", data="words"), m=tiny_llama, tasks=tasks_folder, words=data)
    assert ["Tell of the boat." in lines[0]["prompt"], "Tell of the sail." in lines[1]["prompt"]] == [True, True]


def test_one_step_for_each_model_and_the_baseline():
    steps = LmEval(on=["healed", "gguf/Q6_K"], baseline="instruct", tasks=["ifeval"]).expand("ifeval")
    assert {name: step.on for name, step in steps.items()} == {  # type: ignore[attr-defined]
        "ifeval/healed": ["healed"],
        "ifeval/gguf/Q6_K": ["gguf/Q6_K"],
        "ifeval/instruct": ["instruct"],
    }
    among = LmEval(on=["healed", "instruct"], baseline="instruct", tasks=["ifeval"])
    assert list(among.expand("e")) == ["e/healed", "e/instruct"]


def test_metrics_known_before_a_run():
    assert LmEval(on=["m"], tasks=["ifeval"]).known_metrics() == {
        "prompt_level_strict_acc",
        "inst_level_strict_acc",
        "prompt_level_loose_acc",
        "inst_level_loose_acc",
    }
    assert LmEval(on=["m"], tasks=["mmlu"]).known_metrics() is None
    assert op("ifeval").known_metrics() is None  # the folder may have an ifeval of its own


@pytest.mark.parametrize(
    ("fields", "what", "mend"),
    [
        ({"tasks": ["wriets"]}, "lm-eval knows no task 'wriets'", "Did you mean 'writes'?"),
        ({"max_length": 12}, "writes lets an answer take 12 tokens, and 'm' holds 12 in all", "`max_length` higher"),
        ({"max_gen_toks": 300}, "take 300 tokens, and 'm' holds 256 in all", "Set `max_gen_toks` to 128 or so"),
    ],
)
def test_wrong_input(run_on, tiny_llama, tasks_folder, monkeypatch, fields, what, mend):
    from lm_eval import tasks

    full = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **given: full(**given | {"include_defaults": False}))
    with pytest.raises(StepError) as error:
        run_on(op(*fields.pop("tasks", ["writes"]), **fields), m=tiny_llama, tasks=tasks_folder)
    assert what in error.value.what
    assert mend in error.value.mend


def test_no_chat_template_though_asked(run_on, tiny_llama, tasks_folder, tmp_path):
    plain = shutil.copytree(tiny_llama, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(StepError, match="'m' has no chat template, and `apply_chat_template` is true"):
        run_on(op("writes", apply_chat_template=True), m=plain, tasks=tasks_folder)
    found, lines, _ = run_on(op("writes"), m=plain, tasks=tasks_folder)
    assert found["conditions"]["chat_template"] is False
    assert lines[0]["prompt"] == "Tell of the sea."


def test_a_task_that_vanished_is_found(run_on, tiny_llama, tmp_path, monkeypatch):
    from lm_eval import tasks

    full = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **given: full(**given | {"include_defaults": False}))
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "mine.yaml").write_text("include: base.yaml\ntask: mine\n")
    with pytest.raises(StepError, match=r"no task 'mine': mine.yaml cannot be read: .*base.yaml"):
        run_on(op("mine"), m=tiny_llama, tasks=folder)


def test_tasks_of_a_stranger_are_not_run(run_on, tiny_llama, tasks_folder):
    stranger = artifact("tasks", tasks_folder, origin={"repo": "them/tasks"})
    with pytest.raises(StepError, match="the tasks in 'tasks' come from them/tasks, and a task definition is code"):
        run_on(op("writes"), m=tiny_llama, tasks=stranger)


def test_a_recipe_says_what_cannot_be():
    with pytest.raises(ValueError, match="`on` names a model twice"):
        LmEval(on=["m", "m"], tasks=["ifeval"])
    with pytest.raises(ValueError, match="`data` goes with one task, and there are 2"):
        LmEval(on=["m"], tasks=["a", "b"], data="d")


def test_preflight_finds_what_a_run_would(tiny_llama, tasks_folder, tmp_path, capfd, monkeypatch):
    import lm_eval.tasks

    from hubforge.evals import _tasks

    some = lm_eval.tasks.TaskManager(
        include_path=str(Path(lm_eval.tasks.__file__).parent / "ifeval"), include_defaults=False
    )
    monkeypatch.setattr(_tasks, "_own_tasks", lambda: some)  # all of them take seconds to read
    plain = shutil.copytree(tiny_llama, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    given = {"m": artifact("m", tiny_llama), "tasks": artifact("tasks", tasks_folder)}

    def check(fields: dict[str, Any], **inputs: Any) -> None:
        op("writes", **fields).preflight(Context("evals.e/m", tmp_path, inputs))

    check({}, **given)
    check({"apply_chat_template": True}, **given)
    check({})  # nothing is made yet
    with pytest.raises(StepError, match="no chat template"):
        check({"apply_chat_template": True}, **given | {"m": artifact("m", plain)})
    with pytest.raises(StepError, match="come from them/tasks"):
        check({}, **given | {"tasks": artifact("tasks", tasks_folder, origin={"repo": "them/tasks"})})
    with pytest.raises(StepError, match="lm-eval knows no task 'ifevla'") as error:
        LmEval(on=["m"], tasks=["ifevla"]).preflight(Context("evals.e/m", tmp_path, given))
    assert "Did you mean 'ifeval'?" in error.value.mend
    assert capfd.readouterr() == ("", "")


@needs_ifeval
def test_ifeval_scores_equal_text_equally():
    """Of the stock scorer two documents draw a letter, and langdetect answers by chance on short text."""
    from hubforge.evals._quiet import offline, quiet
    from hubforge.evals._tasks import Choice, load_tasks, seeded_langdetect
    from hubforge.rows import rows

    drawn = 1122  # its letter is none of the alphabet's, so the scorer takes one at random
    lower = [row for row in rows(IFEVAL) if row["instruction_id_list"] == ["change_case:english_lowercase"]][:4]
    documents = [*lower, *(row for row in rows(IFEVAL) if row["key"] == drawn)]
    with quiet(print), offline(True):
        task = load_tasks(Choice(("ifeval",), documents=documents), print)["tasks"]["ifeval"]
    docs = list(task.test_docs())
    replies = ["boat on de it", "as it no ser", "aabcdefghhiijjk lmnoopq rstuvvwxyyz e t a o i n abcdefghijklm nopq"]

    def scores(process: Any) -> list[Any]:
        return [process(doc, [reply]) for doc in docs for reply in replies]

    with seeded_langdetect():
        found = []
        for seed in range(8):
            random.seed(seed)
            found.append(scores(task.process_results))
        assert found == [found[0]] * 8
    stock = task.process_results.__wrapped__
    assert any(scores(stock) != found[0] for _ in range(8))  # or this test could not fail


@needs_ifeval
def test_ifeval_runs_offline_on_given_documents(run_on, tiny_llama, capfd):
    found, lines, _ = run_on(
        op("ifeval", include=None, data="prompts", limit=3, max_gen_toks=8), m=tiny_llama, prompts=IFEVAL
    )
    assert capfd.readouterr() == ("", "")
    assert found["metrics"]["prompt_level_strict_acc"]["n"] == 3
    assert found["conditions"]["tasks"]["ifeval"]["of"] == 541
    assert set(found["metrics"]) == LmEval(on=["m"], tasks=["ifeval"]).known_metrics()
    assert all(metric["unit"] == "share" for metric in found["metrics"].values())
    assert lines[0]["weights"]["inst_level_strict_acc"] == 3.0


def test_a_missing_sentence_model_is_said_before_anything_is_generated(run_on, tiny_llama, monkeypatch, tmp_path):
    import nltk

    from hubforge.evals import _tasks

    monkeypatch.setattr(_tasks, "NLTK_DATA", tmp_path / "none")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(StepError, match="punkt_tab") as error:
        run_on(op("ifeval", include=None), m=tiny_llama)
    assert "nltk.downloader punkt_tab" in error.value.mend


def test_documents_that_cannot_be_had(run_on, tiny_llama):
    with pytest.raises(StepError, match="ifeval cannot be loaded") as error:
        run_on(op("ifeval", include=None), m=tiny_llama)
    assert "give it as `data`" in error.value.mend


def test_results_are_json_throughout(run_on, tiny_llama, tasks_folder, tmp_path):
    run_on(op("chooses", "reads"), m=tiny_llama, tasks=tasks_folder)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["results"]) == {"chooses", "reads"}
    assert not {"date", "samples", "config"} & set(results)
