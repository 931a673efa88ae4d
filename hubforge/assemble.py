"""From manifests to a Release: what went in, what was done, what was measured, and whether the gates hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hubforge import __version__, catalog
from hubforge.errors import GateError, StepError
from hubforge.evals import _compare as statistics
from hubforge.op import FileDigest
from hubforge.plan import Plan, Step, op_name
from hubforge.recipe import PlacedGate
from hubforge.release import (
    File,
    GateRecord,
    MetricRecord,
    Release,
    SourceRecord,
    StepRecord,
    TargetRecord,
)
from hubforge.run import Runner


def assemble(runner: Runner) -> Release:
    """The release of a plan whose steps are all made. Raises StepError when one is not."""
    plan = runner.plan
    for step in plan.steps.values():
        if step.status != "fused" and not plan.store.has(step.key):
            raise StepError(
                f"{step.name} is not made yet",
                where=step.node.where,
                mend=f"`hubforge run {plan.recipe.path}` makes it.",
            )
    recipe = plan.recipe
    metrics = tuple(measure(plan))
    return Release(
        hubforge=__version__,
        name=recipe.name,
        license=recipe.license,
        license_link=recipe.license_link,
        recipe_file=recipe.path.name,
        recipe=recipe.text,
        lock=plan.lock,
        sources=tuple(source_record(runner, name) for name in plan.sources),
        steps=tuple(step_record(plan, step) for step in plan.steps.values()),
        metrics=metrics,
        gates=tuple(judge(plan, gate, metrics) for gate in recipe.gates),
        targets=tuple(target_record(runner, name) for name in recipe.targets),
        card=recipe.card,
    )


def source_record(runner: Runner, name: str) -> SourceRecord:
    source = runner.plan.sources[name]
    here = runner.source(name)
    return SourceRecord(
        name=name,
        kind=source.kind,
        repo=here.repo,
        path=source.spec.value if source.spec.is_local else None,
        revision=source.spec.revision,
        commit=source.commit,
        license=source.license,
        split=source.spec.split,
        key=source.key,
        files=files(here.files),
        facts=here.facts,
    )


def step_record(plan: Plan, step: Step) -> StepRecord:
    fused = step.status == "fused"
    manifest = plan.store.manifest(plan.steps[step.fused_into[0]].key if fused else step.key)
    op, fields = type(step.op), step.material["fields"]
    return StepRecord(
        name=step.name,
        section=step.node.section,
        entry=step.node.entry,
        op=op_name(step.node).partition(".")[2],
        makes=op.makes,
        summary=catalog.summary(op),
        formula=op.formula,
        method_source=op.source,
        # As this recipe speaks of them: the manifest may be of another recipe with other names for the same keys.
        fields={name: fields[name] for name in catalog.field_names(op) if name in fields},
        meanings={name: field.description for name, field in op.model_fields.items() if field.description},
        key=step.key,
        inputs=dict(step.node.inputs),
        metrics=manifest.fused.get(step.key, {}).get("metrics", {}) if fused else manifest.metrics,
        files=() if fused else files(manifest.files),
        fused_into=step.fused_into,
        versions=manifest.versions,
        hardware=manifest.hardware,
        started=manifest.started,
        seconds=0.0 if fused else manifest.seconds,
        exact=op.exact,
        git=manifest.git,
    )


def files(digests: tuple[FileDigest, ...]) -> tuple[File, ...]:
    return tuple(File(path=file.path, size=file.size, sha256=file.sha256) for file in digests)


def target_record(runner: Runner, name: str) -> TargetRecord:
    """A target with the files of its artifacts; the card and pictures join them once rendered."""
    target = runner.plan.recipe.targets[name]
    op: Any = target.op
    record = TargetRecord(
        name=name,
        kind=runner.plan.kind(target.entries[0]),
        repo=op.repo,
        folder=op.folder,
        tag=op.tag,
        private=op.private,
        entries=target.entries,
    )
    found = tuple(
        File(path=record.prefix + file.path, size=file.size, sha256=file.sha256)
        for entry in target.entries
        for file in artifact_files(runner, entry)
    )
    paths = [file.path for file in found]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise StepError(
            f"publish.{name} would push two files named {twice}",
            where=target.where,
            mend="Publish them to two repositories, or to two folders.",
        )
    return record.model_copy(update={"files": found})


def artifact_files(runner: Runner, entry: str) -> tuple[FileDigest, ...]:
    """The files of a step or source given by its full name."""
    section, _, name = entry.partition(".")
    if section == "sources":
        return runner.source(name).files
    return runner.store.manifest(runner.plan.steps[entry].key).files


def measure(plan: Plan) -> Iterator[MetricRecord]:
    """Every metric of every eval step, with its interval, and against the baseline where there is one."""
    for step in plan.steps.values():
        if step.node.section != "evals":
            continue
        name, _, on = step.node.entry.partition("/")
        manifest = plan.store.manifest(step.key)
        samples = plan.store.folder(step.key) / "samples.jsonl"
        spread = statistics.intervals(samples)
        baseline = getattr(step.op, "baseline", None)
        against: dict[str, statistics.Comparison] = {}
        theirs: dict[str, Any] = {}
        if baseline is not None and baseline != on:
            other = plan.steps[f"evals.{name}/{baseline}"]
            theirs = plan.store.manifest(other.key).metrics.get("metrics", {})
            try:
                against = statistics.compare(samples, plan.store.folder(other.key) / "samples.jsonl")
            except ValueError as error:
                raise StepError(f"{step.name} and its baseline: {error}", where=step.node.where) from error
        for metric, found in manifest.metrics.get("metrics", {}).items():
            around, compared = spread.get(metric), against.get(metric)
            # A metric that is no mean over prompts (perplexity) has no interval, and still a baseline to gate on.
            base = compared.baseline if compared else theirs.get(metric, {}).get("value")
            yield MetricRecord(
                eval=name,
                on=on,
                metric=metric,
                value=found["value"],
                low=around.low if around else None,
                high=around.high if around else None,
                n=found.get("n", 0),
                samples=found.get("samples", 1),
                unit=found.get("unit", ""),
                higher_is_better=found.get("higher_is_better"),
                meaning=found.get("meaning", ""),
                baseline=str(baseline) if baseline is not None else None,
                baseline_value=base,
                difference=compared.difference if compared else None if base is None else found["value"] - base,
                difference_low=compared.low if compared else None,
                difference_high=compared.high if compared else None,
                significant=compared.significant if compared else None,
                method=compared.method if compared else "",
            )


def judge(plan: Plan, placed: PlacedGate, metrics: tuple[MetricRecord, ...]) -> GateRecord:
    """Whether a gate holds. Raises StepError when the eval has no such metric."""
    gate = placed.gate
    on = gate.on or gated_model(plan, gate.eval)
    here = {record.metric: record for record in metrics if record.eval == gate.eval and record.on == on}
    record = here.get(gate.metric)
    if record is None:
        raise StepError(
            f"the gate {placed.text!r} names no metric of {gate.eval}/{on}",
            where=placed.where,
            mend=f"It has: {', '.join(here) or 'none'}.",
        )
    try:
        holds, threshold, margin = gate.holds(record.value, record.baseline_value)
    except ValueError as error:
        raise StepError(f"the gate {placed.text!r}: {error}", where=placed.where) from error
    return GateRecord(text=placed.text, holds=holds, on=on, value=record.value, threshold=threshold, margin=margin)


def gated_model(plan: Plan, evaluation: str) -> str:
    """The model a gate speaks of when it names none: the first that the eval is run on and that is not its baseline."""
    entries = plan.recipe.groups[evaluation]
    models = [entry.partition("/")[2] for entry in entries]
    baseline = getattr(plan.recipe.nodes[f"evals.{entries[0]}"].op, "baseline", None)
    return next((model for model in models if model != baseline), models[0])


def check_gates(release: Release, plan: Plan) -> None:
    """Raise GateError when a gate did not hold, saying by how much. All that failed, at once."""
    failed = [(gate, placed) for gate, placed in zip(release.gates, plan.recipe.gates, strict=True) if not gate.holds]
    if failed:
        lines = [
            f"{placed.where}: the gate {gate.text!r} failed on {gate.on}: "
            f"{gate.value:.4g} against {gate.threshold:.4g}, short by {abs(gate.margin):.3g}"
            for gate, placed in failed
        ]
        raise GateError("\n".join(lines), mend="Nothing was pushed. Change the recipe or the gate, and run again.")
