"""How it was made: every step that led to what is published, with its formula, its fields and what it found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hubforge.cards.components import source_link
from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import code, linkify, listed, prose, text
from hubforge.cards.numbers import big_count, count, share, short, size
from hubforge.cards.results import show_field
from hubforge.cards.training import leak, loss_path, loss_picture
from hubforge.release import StepRecord

Row = dict[str, str]
_LONGEST = 120  # letters of a text that a table shows: a chat template may be pages long
_SECTIONS = ("masks", "adapters", "stages", "quantize")


@dataclass(frozen=True)
class StepView:
    """One step as the page shows it. Every string is Markdown."""

    entry: str
    section: str
    op: str
    summary: str
    formula: str  # as it is: for a fence
    one_pass: str  # what was computed in one pass over the weights with it, a sentence; "" for nothing
    fields: tuple[Row, ...]
    facts: tuple[str, ...]
    gain: bool  # whether a fact is the effective gain, which needs a word of explanation
    leak: bool  # likewise the leak
    loss: str  # path of the picture of its loss; "" for none
    source: str


def step_views(lineage: Lineage) -> list[StepView]:
    """The masks, adapters and stages that led here, in the order they ran; the quants only on a GGUF page."""
    steps = [step for step in lineage.steps if step.section in _SECTIONS]
    views = [step_view(lineage, step) for step in steps if step.section != "quantize"]
    if lineage.target.kind == "gguf":
        heads = dict.fromkeys(step.entry.split("/", 1)[0] for step in steps if step.section == "quantize")
        quants = {head: [step for step in steps if step.entry.split("/", 1)[0] == head] for head in heads}
        views += [_quantize(lineage, quants[head]) for head in heads]
    return views


def _quantize(lineage: Lineage, steps: list[StepRecord]) -> StepView:
    """The quants of one recipe entry as one step: they differ only in their type, and their facts are in the table."""
    types = [item for step in steps for item in step.fields.get("types", ())]
    fields = {name: value for name, value in steps[0].fields.items() if name not in ("types", "unquantized")}
    together = steps[0].model_copy(update={"fields": fields | ({"types": types} if types else {}), "metrics": {}})
    return replace(step_view(lineage, together), entry=code(steps[0].entry.split("/", 1)[0]))


def step_view(lineage: Lineage, step: StepRecord) -> StepView:
    return StepView(
        entry=code(step.entry),
        section=step.section,
        op=code(step.op),
        summary=sentence(step.summary),
        formula=step.formula.strip(),
        one_pass=one_pass(lineage, step),
        fields=tuple(field_rows(lineage, step)),
        facts=tuple(step_facts(step)),
        gain=bool(step.metrics.get("gain")),
        leak=bool(leak(step.metrics.get("leak"))),
        loss=loss_path(lineage, step) if loss_picture(step.metrics, "") else "",
        source=linkify(step.method_source),
    )


def one_pass(lineage: Lineage, step: StepRecord) -> str:
    """Which steps were computed in one pass over the weights with this one: what `plan` says, on the page."""
    if step.fused_into:
        users = listed([code(name.partition(".")[2]) for name in lineage.passes_of(step)])
        return (
            f"Computed in one pass over the weights with {users}, in float32 and unrounded: it has no files of its own."
        )
    inner = [code(each.entry) for each in lineage.computed_in(step)]
    return f"Computed in one pass over the weights with {listed(inner)}." if inner else ""


def field_rows(lineage: Lineage, step: StepRecord) -> list[Row]:
    """The fields of a step that are set; what they refer to is linked where it is on the Hub."""
    rows: list[Row] = []
    for name, value in step.fields.items():
        if value is None or value == "" or value == [] or value == {} or value == ():
            continue
        if shown := _value(lineage, step, value):
            meaning = sentence(step.meanings.get(name, ""))
            rows.append({"Field": code(name), "Value": shown, "Meaning": meaning})
    return rows


def step_facts(step: StepRecord) -> list[str]:
    """What the step found out and the page has words for: "258 matrices". Markdown."""
    facts: list[str] = []
    for name, words, show in _FACTS:
        value = step.metrics.get(name)
        if value is not None and (shown := show(value)):
            facts.append(words.replace("{}", shown))
    return facts


def sentence(value: object) -> str:
    """The text with a capital first letter and a full stop; "" stays ""."""
    line = prose(value)
    if not line:
        return ""
    symbol = line[1:2] == ","  # "k, directions kept": a symbol of the formula keeps its case.
    line = line[0].upper() + line[1:] if not (line[:2].isupper() or line[0] == "`" or symbol) else line
    return line if line.endswith((".", "!", "?", ":")) else line + "."


def _some(value: object) -> str:
    """A count worth a word: "" for none."""
    return count(value) if value else ""


def _value(lineage: Lineage, step: StepRecord, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(lineage, step, item) for item in value if item is not None)
    if isinstance(value, str) and value in step.inputs:
        source = lineage.release.source(step.inputs[value])
        return f"{code(value)} ({source_link(source)})" if source and source.repo else code(value)
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{code(value[:_LONGEST])} … ({count(len(value))} letters; the recipe has all)"
    return show_field(value)


def _gate(value: object) -> str:
    return f"importance {short(value.get('mean'), 3)}" if isinstance(value, Mapping) else ""


def _spread(show: Callable[[object], str]) -> Callable[[object], str]:
    """Shows a number, or a mapping of mean, min and max as "0.93 on average (0.81 to 0.99)"."""

    def shown(value: object) -> str:
        if not isinstance(value, Mapping):
            return show(value)
        mean, median, low, high = (show(value.get(key)) for key in ("mean", "median", "min", "max"))
        middle = f"{mean} on average" if mean else f"{median} at the median" if median else ""
        return f"{middle} ({low} to {high})" if middle and low and high and low != high else middle

    return shown


# metric -> words on the page, {} being the value, and how to show that; in this order.
_FACTS: tuple[tuple[str, str, Callable[[object], str]], ...] = (
    ("parameters", "{} parameters", big_count),
    ("tensors", "{} tensors", count),
    ("changed", "{} of them changed", count),
    ("matrices", "{} matrices", lambda value: count(len(value)) if isinstance(value, (list, dict)) else count(value)),
    ("modules", "{} modules adapted", count),
    ("samples", "{} samples", count),
    ("truncated", "{} of them truncated", _some),
    ("skipped", "{} skipped", _some),
    ("tokens", "{} tokens", big_count),
    ("steps", "{} steps", count),
    ("loss", "loss {}", lambda value: text(short(value))),
    ("eval_loss", "loss {} on held-out rows", lambda value: text(short(value))),
    ("best_step", "kept from step {}", count),
    ("leak", "leak {}", leak),
    ("final_loss", "final loss {}", lambda value: text(short(value))),
    ("reliability", "split-half reliability {}", _spread(lambda value: text(short(value, 3)))),
    ("energy_captured", "energy captured {}", _spread(share)),
    ("rounding_share", "{} of it the rounding of the two checkpoints", share),
    ("gate", "{} on average (1: not changed)", _gate),
    ("dtype", "{}", text),
    ("bytes", "{}", size),
    ("gain", "effective gain {}", _spread(lambda value: text(short(value)))),
)
