"""op: lm_eval. Any task of EleutherAI's lm-evaluation-harness, on a model or on a GGUF file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.evals._answers import FILE as ANSWERS
from hubforge.evals._answers import Answers
from hubforge.evals._results import (
    IFEVAL,
    clean_results,
    metric_name,
    metric_table,
    sample_lines,
    task_conditions,
    write_lines,
)
from hubforge.evals._subjects import (
    chat_or_not,
    check_template,
    dtype_for,
    gguf_type,
    special_tokens,
    weights_of,
    with_baseline,
)
from hubforge.op import Context, DatasetRef, Kind, Metrics, ModelOrGgufRef, Op

if TYPE_CHECKING:
    from hubforge.evals._tasks import Choice


class LmEval(Op):
    """Scores of a model on tasks of lm-evaluation-harness, document by document.

    IFEval and every other task are scored from the same random state each time, so that equal answers get equal scores.
    """

    makes: ClassVar[Kind] = "metrics"
    exact: ClassVar[bool] = False
    pins: ClassVar[tuple[str, ...]] = ("lm_eval",)
    requires: ClassVar[tuple[str, ...]] = ("lm_eval", "torch", "transformers", "datasets")
    extra: ClassVar[str] = "evals"
    each: ClassVar[str] = "on"
    unkeyed: ClassVar[tuple[str, ...]] = ("baseline", "batch_size")
    resumable: ClassVar[bool] = True
    source: ClassVar[str] = "https://github.com/EleutherAI/lm-evaluation-harness"

    on: list[ModelOrGgufRef] = Field(min_length=1, description="Models and GGUF files to evaluate; one step for each.")
    baseline: ModelOrGgufRef | None = Field(
        None, description="What the others are compared with, prompt by prompt; evaluated too where `on` lacks it."
    )
    tasks: list[str] = Field(min_length=1, description="Tasks, groups or tags by lm-eval's names, such as ifeval.")
    include: DatasetRef | None = Field(
        None, description="A local folder of task definitions (YAML, with its Python), searched before lm-eval's own."
    )
    data: DatasetRef | None = Field(
        None,
        description="Documents for the one task, in place of the data set it would download: pinned by the lock, and "
        "there without network.",
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; by default the task's own.")
    limit: int | None = Field(None, gt=0, description="Only the first so many documents of each task: for trying.")
    apply_chat_template: bool | None = Field(
        None, description="Put prompts through the model's chat template; by default where it has one."
    )
    system_prompt: str | None = Field(
        None, description="A system turn (or, without template, a text) before each prompt."
    )
    max_gen_toks: int | None = Field(None, gt=0, description="Tokens an answer may take; by default the task's own.")
    max_length: int = Field(
        4096, gt=1, description="Tokens that prompt and answer may take together, at most what the model was made for."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What a model computes in; auto is its own type, but float32 on a CPU."
    )
    batch_size: int = Field(8, gt=0, description="Prompts at once; a GGUF takes one at a time.")
    seed: int = Field(1234, ge=0, description="Draws the few-shot examples (as lm-eval by default), and any sampling.")

    @model_validator(mode="after")
    def _check(self) -> LmEval:
        if len(set(self.on)) < len(self.on):
            raise ValueError("`on` names a model twice")
        if self.data is not None and len(self.tasks) > 1:
            raise ValueError(f"`data` goes with one task, and there are {len(self.tasks)}")
        return self

    def expand(self, name: str) -> dict[str, Op]:
        return super(LmEval, with_baseline(self)).expand(name)

    def known_metrics(self) -> set[str] | None:
        """The metrics it will have, where the tasks tell."""
        if self.include is not None or set(self.tasks) != {"ifeval"}:
            return None
        return {metric_name("ifeval", metric, "none", False) for metric in IFEVAL}

    def preflight(self, ctx: Context) -> None:
        import lm_eval.tasks  # noqa: F401 - before `quiet`, which silences what is loaded

        from hubforge.evals._quiet import quiet
        from hubforge.evals._tasks import check_names, check_scorers

        check_template(self.apply_chat_template, ctx.inputs.get(str(self.on[0])), ctx.where)
        include = ctx.inputs.get(str(self.include)) if self.include is not None else None
        if self.include is not None and include is None:
            return
        with quiet(ctx.warn):
            check_scorers(check_names(self.tasks, self._include(ctx)), self.tasks)

    def run(self, ctx: Context) -> Metrics:
        from lm_eval.evaluator import evaluate

        from hubforge.evals._quiet import offline, quiet
        from hubforge.evals._tasks import load_tasks, scorer_seeds, seeded_langdetect
        from hubforge.seeding import repeatable

        with (
            quiet(ctx.warn),
            offline(ctx.settings.offline),
            repeatable(self.seed, ctx.device),
            seeded_langdetect(),
        ):
            loaded = load_tasks(self._choice(ctx), ctx.warn)
            with self._subject(ctx) as (lm, conditions):
                chat = chat_or_not(self.apply_chat_template, lm.template, self.on[0], ctx.where)
                self._check_lengths(loaded["tasks"], lm.max_length, ctx)
                results = evaluate(
                    lm=lm,
                    task_dict=loaded,
                    limit=self.limit,
                    bootstrap_iters=0,  # lm-eval's own forks a pool and prints; our errors come from the samples
                    system_instruction=self.system_prompt,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                )
                template = lm.template if chat else None
        several = len(results["configs"]) > 1
        lines = sample_lines(results, several)
        table = metric_table(results, lines, several)
        write_lines(ctx.out / "samples.jsonl", lines)
        text = json.dumps(clean_results(results), indent=2, ensure_ascii=False, allow_nan=False)
        (ctx.out / "results.json").write_text(text + "\n", encoding="utf-8")
        (ctx.out / ANSWERS).unlink(missing_ok=True)
        return {
            "metrics": table,
            "conditions": conditions
            | {
                "tasks": task_conditions(results),
                "limit": self.limit,
                "chat_template": chat,
                "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
                "system_prompt": self.system_prompt,
                "scorer_seeds": scorer_seeds(),
                "seed": self.seed,
            },
        }

    def _choice(self, ctx: Context) -> Choice:
        from hubforge.evals._tasks import Choice
        from hubforge.rows import rows

        documents = None
        if self.data is not None:
            artifact = ctx.artifact(self.data)
            documents = rows(artifact.path, files=[file.path for file in artifact.files] or None)
        return Choice(
            names=tuple(self.tasks),
            include=self._include(ctx),
            documents=documents,
            num_fewshot=self.num_fewshot,
            max_gen_toks=self.max_gen_toks,
            seed=self.seed,
        )

    def _include(self, ctx: Context) -> Path | None:
        """The folder of task definitions. They are code (Python, and Jinja that is not sandboxed): only one's own."""
        if self.include is None:
            return None
        artifact = ctx.artifact(self.include)
        if repo := artifact.origin.get("repo"):
            raise StepError(
                f"the tasks in {self.include!r} come from {repo}, and a task definition is code",
                where=ctx.where,
                mend="Download them, read them, and name the local folder as the source.",
            )
        if not artifact.path.is_dir():
            raise StepError(f"{self.include!r} is a file, but `include` takes a folder of tasks", where=ctx.where)
        return artifact.path

    @contextmanager
    def _subject(self, ctx: Context) -> Iterator[tuple[Any, dict[str, Any]]]:
        """What lm-eval is to ask, and what is to be said of it."""
        artifact = ctx.artifact(self.on[0])
        if artifact.kind == "gguf":
            from hubforge.evals._gguf_lm import GgufLM
            from hubforge.evals._subjects import open_gguf

            answers = self._answers(ctx, batch_size=1)
            with open_gguf(artifact, ctx, self.max_length, self.seed) as (model, header):
                tokens = special_tokens(model, header.metadata)
                yield (
                    GgufLM(
                        model,
                        special_tokens=tokens,
                        max_length=model.context,
                        answers=answers,
                        seed=self.seed,
                        warn=ctx.warn,
                    ),
                    weights_of(artifact)
                    | {"type": gguf_type(header), "runtime": model.library, "max_length": model.context},
                )
            return
        from hubforge.evals._hf_lm import HfLM
        from hubforge.evals._subjects import context_of
        from hubforge.models import load_model, load_tokenizer

        dtype = dtype_for(self.dtype, ctx.device)
        model = load_model(artifact.path, device=ctx.device, dtype=dtype)
        max_length = min(self.max_length, context_of(model.config))
        tokenizer = load_tokenizer(artifact.path)
        penalty = getattr(model.generation_config, "repetition_penalty", None)
        if penalty not in (None, 1.0):
            ctx.warn(
                f"{self.on[0]}: its generation_config sets repetition_penalty {penalty}, which changes what it writes "
                "here and is not in a GGUF"
            )
        answers = self._answers(ctx, self.batch_size)
        lm = HfLM(model, tokenizer, batch_size=self.batch_size, max_length=max_length, answers=answers)
        yield (
            lm,
            weights_of(artifact)
            | {"type": str(model.dtype).removeprefix("torch."), "runtime": "transformers", "max_length": max_length},
        )

    def _answers(self, ctx: Context, batch_size: int) -> Answers:
        what = ", ".join(self.tasks)
        return Answers(ctx.out / ANSWERS, batch_size, lambda done, total: ctx.progress(done, total, "answers", what))

    def _check_lengths(self, tasks: dict[str, Any], max_length: int, ctx: Context) -> None:
        """Raise StepError when an answer may take all the context, and leave none for the question."""
        from lm_eval.models.utils import normalize_gen_kwargs

        for name, task in tasks.items():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            longest = normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))["max_gen_toks"]
            if longest >= max_length:
                raise StepError(
                    f"{name} lets an answer take {longest} tokens, and {self.on[0]!r} holds {max_length} in all",
                    where=ctx.where,
                    mend=f"Set `max_gen_toks` to {max_length // 2} or so"
                    + (", or `max_length` higher." if max_length == self.max_length else "."),
                )
