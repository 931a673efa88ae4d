"""op: style. How a model writes: over-used phrases, repetition, dialogue and length, over short stories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hubforge.errors import StepError
from hubforge.evals._answers import FILE as ANSWERS
from hubforge.evals._answers import Answers
from hubforge.evals._compare import weighted_mean
from hubforge.evals._prose import METRICS, measure, slop_list
from hubforge.evals._results import write_lines
from hubforge.evals._subjects import chat_or_not, check_template, render_chat, weights_of, with_baseline
from hubforge.op import Context, DatasetRef, Kind, Metrics, ModelOrGgufRef, Op

if TYPE_CHECKING:
    from hubforge.evals._storytellers import Storyteller

PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter that was meant for somebody else.",
    "Write a short story about two sisters who sell their mother's house and disagree about one thing in it.",
    "Write a short story about a bus driver on the last run of a line that closes tomorrow.",
    "Write a short story about a beekeeper in a dry summer and the neighbour who owes him money.",
    "Write a short story about a piano tuner who is asked to tune an instrument nobody may play.",
    "Write a short story about a night at a mountain hut when one guest more arrives than there are beds.",
    "Write a short story about a boy who repairs radios and hears a voice he knows on one of them.",
    "Write a short story about a cook in a ship's galley on the day the storm comes.",
    "Write a short story about a translator who finds a mistake in her most famous book.",
    "Write a short story about a chess club whose oldest member has not lost for a year, until tonight.",
)
_COLUMNS = ("prompt", "text", "instruction")


class Style(Op):
    """Style of the short stories a model writes: over-used phrases, repetition, dialogue and length.

    Each prompt and sample has a random seed of its own, the same for every model, so that models are compared text by
    text whatever the batch size.
    """

    makes: ClassVar[Kind] = "metrics"
    version: ClassVar[int] = 2  # Units are per 1,000 words, as they were counted; "tokens" said otherwise.
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    extra: ClassVar[str] = "evals"
    each: ClassVar[str] = "on"
    unkeyed: ClassVar[tuple[str, ...]] = ("baseline", "batch_size")
    resumable: ClassVar[bool] = True
    source: ClassVar[str] = "word lists: github.com/sam-paech/antislop-sampler, github.com/sam-paech/slop-score"

    on: list[ModelOrGgufRef] = Field(min_length=1, description="Models and GGUF files that write; one step for each.")
    baseline: ModelOrGgufRef | None = Field(
        None, description="What the others are compared with, text by text; it writes too where `on` lacks it."
    )
    prompts: DatasetRef | None = Field(
        None, description="Prompts, in a column prompt, text or instruction; by default ten for short stories."
    )
    limit: int | None = Field(None, gt=0, description="Only the first so many prompts.")
    samples: int = Field(3, gt=0, description="Texts on each prompt.")
    max_new_tokens: int = Field(400, gt=0, description="Tokens a text may take.")
    temperature: float = Field(1.0, ge=0, description="Of sampling; 0 takes the likeliest token each time.")
    apply_chat_template: bool | None = Field(
        None, description="Put prompts through the model's chat template; by default where it has one."
    )
    system_prompt: str | None = Field(None, description="A system turn before each prompt; it takes a chat template.")
    slop: list[str] = Field([], description="Phrases to count as over-used besides the published ones.")
    max_length: int = Field(
        4096, gt=1, description="Tokens that prompt and text may take together, at most what the model was made for."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What a model computes in; auto is its own type, but float32 on a CPU."
    )
    batch_size: int = Field(8, gt=0, description="Texts at once; a GGUF writes one at a time.")
    seed: int = Field(0, ge=0, description="Of the sampling.")

    @model_validator(mode="after")
    def _check(self) -> Style:
        if len(set(self.on)) < len(self.on):
            raise ValueError("`on` names a model twice")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} leaves no room in max_length {self.max_length}")
        return self

    def expand(self, name: str) -> dict[str, Op]:
        return super(Style, with_baseline(self)).expand(name)

    def known_metrics(self) -> set[str]:
        return set(METRICS)

    def preflight(self, ctx: Context) -> None:
        check_template(self.apply_chat_template, ctx.inputs.get(str(self.on[0])), ctx.where)

    def run(self, ctx: Context) -> Metrics:
        from hubforge.evals._quiet import quiet
        from hubforge.evals._storytellers import Settings, open_storyteller

        prompts = self._prompts(ctx)
        artifact = ctx.artifact(self.on[0])
        settings = Settings(
            max_new_tokens=self.max_new_tokens,
            max_length=self.max_length,
            temperature=self.temperature,
            batch_size=1 if artifact.kind == "gguf" else self.batch_size,
            dtype=self.dtype,
        )
        with quiet(ctx.warn), open_storyteller(artifact, ctx, settings) as teller:
            chat = chat_or_not(self.apply_chat_template, teller.template, artifact.name, ctx.where)
            texts = self._write(ctx, teller, settings, prompts, chat)
            facts = teller.facts | {
                "chat_template": chat,
                "chat_template_sha256": _sha256(teller.template) if chat and teller.template else None,
            }
        table = slop_list(tuple(self.slop))
        lines = [
            {
                "task": "style",
                "doc_id": number,
                "doc_hash": _sha256(prompts[number]),
                "sample": sample,
                "prompt": prompts[number],
                "response": text,
                "metrics": measure(text, table),
                "numbers": list(METRICS),
            }
            for (number, sample), text in texts.items()
        ]
        write_lines(ctx.out / "samples.jsonl", lines)
        if empty := sum(not text.strip() for text in texts.values()):
            ctx.warn(f"{empty} of {len(texts)} texts are empty; in them nothing is over-used and nothing repeated")
        found: Metrics = {
            "metrics": {name: self._metric(name, lines) for name in METRICS},
            "conditions": weights_of(artifact)
            | facts
            | {
                "prompts_sha256": _sha256("\n".join(prompts)),
                "system_prompt": self.system_prompt,
                "temperature": self.temperature,
                "max_new_tokens": self.max_new_tokens,
                "slop_sha256": _sha256(json.dumps(table, sort_keys=True)),
                "seed": self.seed,
            },
        }
        (ctx.out / "results.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (ctx.out / ANSWERS).unlink(missing_ok=True)
        return found

    def _write(
        self, ctx: Context, teller: Storyteller, settings: Any, prompts: Sequence[str], chat: bool
    ) -> dict[tuple[int, int], str]:
        """The texts by number of prompt and sample; what a killed run had written is not written again."""
        from dataclasses import replace

        from jinja2 import TemplateError

        from hubforge.evals._storytellers import seed_of

        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        wanted = [(number, sample) for number in range(len(prompts)) for sample in range(self.samples)]
        rendered = list(prompts)
        if chat and teller.template:
            try:
                rendered = [
                    render_chat(teller.template, [*system, {"role": "user", "content": prompt}], teller.special_tokens)
                    for prompt in prompts
                ]
            except TemplateError as error:
                mend = "Leave `system_prompt` out: not every template takes one." if system else ""
                raise StepError(f"the chat template fails: {error}", where=ctx.where, mend=mend) from error
        elif system:
            raise StepError("`system_prompt` takes a chat template, and none is applied", where=ctx.where)

        shown = 0.0

        def progress(done: float, total: float) -> None:
            nonlocal shown
            shown = max(shown, done)  # a batch nearly done is more than its first text
            ctx.progress(shown, total, "texts", "writing")

        answers = Answers(ctx.out / ANSWERS, settings.batch_size, progress)
        requests = {(number, sample): (rendered[number], {"sample": sample}) for number, sample in wanted}
        texts = {which: kept for which, request in requests.items() if (kept := answers.get(request)) is not None}
        asked = [which for which in wanted if which not in texts]
        answers.expect(len(wanted))
        answers.count(len(texts))
        begun = len(texts)
        told = teller.tell(
            [rendered[number] for number, _ in asked],
            [seed_of(self.seed, prompts[number], sample) for number, sample in asked],
            replace(settings, has_special_tokens=chat),
            lambda done: progress(begun + done, len(wanted)),
        )
        for which, text in zip(asked, told, strict=True):
            answers.add_partial("generate_until", requests[which], text)
            texts[which] = text
        return {which: texts[which] for which in wanted}

    def _metric(self, name: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The mean over prompts of the mean over their samples."""
        by_prompt: dict[int, list[float]] = {}
        for line in lines:
            by_prompt.setdefault(line["doc_id"], []).append(line["metrics"][name])
        means = [sum(values) / len(values) for values in by_prompt.values()]
        value, stderr = weighted_mean(means, [1.0] * len(means))
        unit, higher_is_better, meaning = METRICS[name]
        return {
            "value": value,
            "stderr": stderr,
            "n": len(means),
            "samples": self.samples,
            "unit": unit,
            "higher_is_better": higher_is_better,
            "meaning": meaning,
            "task": "style",
        }

    def _prompts(self, ctx: Context) -> list[str]:
        if self.prompts is None:
            return list(PROMPTS[: self.limit])
        from hubforge.rows import rows

        artifact = ctx.artifact(self.prompts)
        found = rows(artifact.path, files=[file.path for file in artifact.files] or None, limit=self.limit)
        column = next((name for name in _COLUMNS if name in found[0]), None)
        if column is None:
            raise StepError(
                f"the prompts in {self.prompts!r} have none of the columns {', '.join(_COLUMNS)}",
                where=ctx.where,
                mend=f"They have: {', '.join(map(str, found[0]))}.",
            )
        for number, row in enumerate(found, 1):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise StepError(f"row {number} of {self.prompts!r} has no text under {column!r}", where=ctx.where)
        return [row[column] for row in found]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
