"""The interpreter of a plan: cached? -> fetch -> run -> digest -> commit. One step at a time, one artifact each."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib.util
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hubforge import __version__
from hubforge.errors import HubforgeError, LockError, SourceError, StepError, StoreError
from hubforge.events import Cached, Failed, Finished, Report, Started, silent
from hubforge.facts import SourceFacts, gather
from hubforge.machine import git_state, gpus, hardware, peak_memory
from hubforge.op import Artifact, Context, Fused, Metrics, Op, Settings, TensorOp
from hubforge.plan import Plan, Step, op_name
from hubforge.publisher import Hub
from hubforge.sources import package_versions
from hubforge.store import LocalStore, Manifest, digests, disk_errors
from hubforge.tensors.projection import worst_held

# A process that ends has no use for a walk over all of torch's objects: .4 s.
atexit.register(gc.freeze)

RECORDED = ("hubforge", "torch", "transformers", "safetensors")  # in every manifest of a step that computes


@dataclass
class Runner:
    """Runs the steps of one plan. `seeds` and threads are the ops' own; this only orders, checks and commits."""

    plan: Plan
    hub: Hub
    settings: Settings = field(default_factory=Settings)
    report: Report = silent

    @property
    def store(self) -> LocalStore:
        return self.plan.store

    def run(self) -> None:
        """Make every step that is not cached. Raises the first step's error; what was complete stays."""
        todo = self.plan.to_make()
        self.preflight(todo)
        number = 0
        for step in self.plan.steps.values():
            if step.status == "fused":
                continue
            if step.status == "cached":
                self.report(Cached(step.name, step.key))
                self.remember(step)
                continue
            number += 1
            self.report(Started(step.name, step.reason, number, len(todo)))
            began = time.monotonic()
            try:
                self.make(step)
            except BaseException as error:
                what = error.what if isinstance(error, HubforgeError) else "interrupted"
                self.report(Failed(step.name, what))
                raise
            self.report(Finished(step.name, time.monotonic() - began, self.summary(step)))

    def preflight(self, todo: list[Step]) -> None:
        """Whatever can be known before the first step: packages that are missing, and what the ops themselves check."""
        names = {step.name for step in todo}
        fused = [step for step in self.plan.steps.values() if names.intersection(step.fused_into)]
        for step in [*fused, *todo]:
            check_requirements(step.op, step.node.where)
            check_pins(step, self.plan.recipe.path)
        for step in [*fused, *todo]:
            inputs: dict[str, Artifact] = {}
            for ref, target in step.node.inputs.items():
                artifact = self.ready(ref, target)
                if artifact is not None:
                    inputs[ref] = artifact
            with located(step):
                step.op.preflight(self.context(step, Path(), inputs))

    def ready(self, ref: str, target: str) -> Artifact | None:
        """The artifact of an input that is there without any work: a local source, or a cached step."""
        section, _, name = target.partition(".")
        if section == "sources":
            source = self.plan.sources[name]
            if source.path is None:
                return None
            return Artifact(ref, source.kind, source.key, source.path, source.files, {}, {"license": source.license})
        step = self.plan.steps[target]
        return self.store.get(step.key, ref) if self.store.has(step.key) else None

    def artifact(self, ref: str, target: str) -> Artifact:
        """The artifact of an input; a Hub source is fetched, and every byte checked against the lock."""
        section, _, name = target.partition(".")
        if section != "sources":
            return self.store.get(self.plan.steps[target].key, ref)
        facts = self.source(name)
        source = self.plan.sources[name]
        origin = {"repo": facts.repo, "commit": source.commit, "license": source.license, "split": source.spec.split}
        return Artifact(ref, source.kind, source.key, facts.path, facts.files, facts.facts, origin)

    def source(self, name: str) -> SourceFacts:
        return gather(self.plan.sources[name], self.store, self.hub, offline=self.settings.offline, report=self.report)

    def remember(self, step: Step) -> None:
        """Keep what a step was made from, and what was computed in its pass."""
        for one in [*self.fused_steps(step).values(), step]:
            self.store.remember(self.plan.recipe.name, one.name, one.material)

    def fused_steps(self, step: Step) -> dict[str, Step]:
        """The steps that are computed in the pass of this one, by full name, each after those it uses."""
        found: dict[str, Step] = {}
        for target in step.unrounded.values():
            inner = self.plan.steps[target]
            found |= self.fused_steps(inner) | {target: inner}
        return found

    def whole_context(self, step: Step, out: Path, fused: dict[str, Fused]) -> Context:
        """The context of a step that is about to run. fused: the steps of its pass by full name, filled here."""
        for target in step.unrounded.values():
            if target not in fused:
                inner = self.plan.steps[target]
                assert isinstance(inner.op, TensorOp)
                fused[target] = Fused(inner.op, self.whole_context(inner, Path(), fused))
        inputs = {ref: self.artifact(ref, to) for ref, to in step.node.inputs.items() if ref not in step.unrounded}
        return replace(self.context(step, out, inputs), fused={ref: fused[to] for ref, to in step.unrounded.items()})

    def context(self, step: Step, out: Path, inputs: Mapping[str, Artifact]) -> Context:
        seed = getattr(step.op, "seed", 0)
        return Context(
            name=step.name,
            out=out,
            inputs=inputs,
            settings=self.settings,
            seed=seed if isinstance(seed, int) else 0,
            where=step.node.where,
            report=self.report,
        )

    def make(self, step: Step) -> None:
        """Run one step and commit its artifact."""
        store = self.store
        with store.locked(step.key):
            if store.has(step.key):  # made by another process since the plan
                self.remember(step)
                return
            out = store.begin(step.key, keep=step.op.resumable)
            fused: dict[str, Fused] = {}
            ctx = self.whole_context(step, out, fused)
            started, began = datetime.now(UTC), time.monotonic()
            with located(step), disk_errors(store.root):
                metrics = execute(step.op, ctx) or {}
            seconds = time.monotonic() - began
            store.commit(
                Manifest(
                    key=step.key,
                    name=step.name,
                    kind=step.op.makes,
                    op=op_name(step.node),
                    fields=dict(step.material["fields"]),
                    inputs=dict(step.material["inputs"]),
                    files=digests(out, ctx.sha256),
                    metrics=metrics,
                    versions=package_versions((*RECORDED, *step.op.pins, *step.op.requires)),
                    hardware=hardware() | {"gpus": gpus(), "peak_memory": peak_memory()},
                    started=started.isoformat(timespec="seconds"),
                    seconds=round(seconds, 2),
                    git=git_state(self.plan.recipe.path.resolve().parent),
                    hubforge=__version__,
                    fused={self.plan.steps[name].key: self.record(name, inner) for name, inner in fused.items()},
                )
            )
            self.remember(step)

    def record(self, name: str, fused: Fused) -> dict[str, Any]:
        """What the manifest says of a step that was computed in the same pass."""
        step = self.plan.steps[name]
        fields, inputs = dict(step.material["fields"]), dict(step.material["inputs"])
        return {"name": name, "op": op_name(step.node), "fields": fields, "inputs": inputs, "metrics": fused.metrics}

    def summary(self, step: Step) -> str:
        """One line about what came out, for the terminal."""
        manifest = self.store.manifest(step.key)
        values = manifest.metrics.get("metrics")
        if step.op.makes == "metrics" and isinstance(values, dict):
            shown = list(values.items())[:3]
            return ", ".join(f"{name} {value['value']:.3g}" for name, value in shown if "value" in value)
        size = sum(file.size for file in manifest.files)
        said = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        leak = manifest.metrics.get("leak")
        worst = worst_held(leak, leak.get("projection")) if isinstance(leak, dict) else None
        return said if worst is None else f"{said}, leak at worst {worst:.1e}"


def execute(op: Op, ctx: Context) -> Metrics | None:
    """Run an op: a TensorOp through the streaming engine, any other by itself."""
    if isinstance(op, TensorOp):
        with _seldom_collecting():
            from hubforge.tensors.engine import run_tensor_op

            return run_tensor_op(op, ctx)
    return op.run(ctx)


@contextmanager
def _seldom_collecting() -> Iterator[None]:
    """For a TensorOp, which leaves no tensors in cycles; a quarter of torch's import went to looking for such."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def check_requirements(op: Op, where: str) -> None:
    """Raise StepError when a package the op needs is not installed, naming the extra that brings it."""
    missing = [name for name in op.requires if importlib.util.find_spec(name) is None]
    if missing:
        extra = f"`pip install 'hubforge[{op.extra}]'`" if op.extra else f"`pip install {' '.join(missing)}`"
        raise StepError(
            f"this step needs {', '.join(missing)}, not installed here", where=where, mend=f"{extra} adds it."
        )


def check_pins(step: Step, recipe: Path) -> None:
    """Raise LockError when a package that is part of the step's key is here in another version than the lock's."""
    for name, version in package_versions(step.op.pins).items():
        if step.material["pins"][name] != version:
            raise LockError(
                f"{step.name} is locked to {name} {step.material['pins'][name]}, and {version} is installed",
                where=step.node.where,
                mend=f"Install that version, or pin this one with `hubforge lock {recipe}`.",
            )


@contextmanager
def located(step: Step) -> Iterator[None]:
    """Gives an error of a step its recipe line, and makes one of ours out of anything else it raises."""
    try:
        yield
    except HubforgeError as error:
        if not error.where:
            raise type(error)(error.what, where=step.node.where, mend=error.mend) from error
        if isinstance(error, SourceError | StepError) and _file(error.where) != _file(step.node.where):
            # It names a file; where in the recipe that file is asked for is told too.
            what = f"{error.where}: {error.what}"
            raise type(error)(what, where=step.node.where, mend=error.mend) from error
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StoreError(
                "the disk is full", where=step.node.where, mend="Free some space, then run again."
            ) from error
        raise unexpected(step, error) from error
    except MemoryError as error:
        raise StepError(
            f"{step.name} ran out of memory", where=step.node.where, mend="`--memory` bounds streaming steps."
        ) from error
    except Exception as error:
        raise unexpected(step, error) from error


def _file(where: str) -> str:
    """The file of `recipes/x.yaml:41`."""
    return where.rpartition(":")[0]


def unexpected(step: Step, error: Exception) -> StepError:
    """A library's error as ours; the traceback goes to the log, for a bug report, not to the terminal."""
    logging.getLogger("hubforge").error("%s failed\n%s", step.name, traceback.format_exc())
    text = " ".join(str(error).split()) or type(error).__name__
    return StepError(
        f"{step.name} failed: {type(error).__name__}: {text[:500]}",
        where=step.node.where,
        mend="`--debug` shows the traceback, which is also in the log.",
    )


def refreshed(plan: Plan) -> Plan:
    """The plan with the status of each step as the store has it now."""
    steps = {
        name: replace(step, status="cached", reason="") if step.status != "fused" and plan.store.has(step.key) else step
        for name, step in plan.steps.items()
    }
    return replace(plan, steps=steps)
