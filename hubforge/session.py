"""What a verb works with: one recipe, its store, the Hub, and the reporter; opened from the command's options."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hubforge import recipe as recipes
from hubforge.errors import HubforgeError, LockError, RecipeError
from hubforge.lock import lock_path, read_lock, resolve_online
from hubforge.op import Settings
from hubforge.places import default_store, open_hub, real_hub
from hubforge.plan import Plan, make, pinned
from hubforge.publisher import Hub
from hubforge.recipe import Recipe
from hubforge.release import Release
from hubforge.reporters import Reporter, choose
from hubforge.run import Runner, refreshed
from hubforge.sources import package_versions
from hubforge.store import LocalStore, write_json

if TYPE_CHECKING:
    from hubforge.publish._plan import PushPlan

Take = Literal["ours", "theirs"]
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*$", re.IGNORECASE)


@dataclass
class Outcome:
    """What a run came to: the plan as it stands, the release (when all was asked for), and where the cards lie."""

    plan: Plan
    made: tuple[str, ...]
    release: Release | None = None
    cards: dict[str, Path] = field(default_factory=dict)


@dataclass
class Session:
    recipe: Recipe
    store: LocalStore
    settings: Settings
    report: Reporter
    source_hub: Hub
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        store: Path | None,
        offline: bool,
        device: str,
        memory: str,
        llama_cpp: Path | None,
        quiet: bool,
        debug: bool,
        as_json: bool = False,
    ) -> Session:
        recipe = recipes.load(path)
        settings = Settings(device=device, offline=offline, memory=parse_size(memory), llama_cpp=llama_cpp)
        reporter = cls.reporter(as_json=as_json, quiet=quiet)
        return cls(recipe, LocalStore(store or default_store(path)), settings, reporter, real_hub())

    @staticmethod
    def reporter(*, as_json: bool, quiet: bool) -> Reporter:
        return choose(as_json=as_json, quiet=quiet)

    def __enter__(self) -> Session:
        self._stack.enter_context(library_noise(self.store.root / "log.txt"))
        self._stack.enter_context(self.report)
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()

    def pause(self) -> None:
        """Stop the live display, so that results can be printed."""
        self._stack.close()

    def resume(self) -> None:
        """Show what happens again, after a pause."""
        self.__enter__()

    def wait(self) -> None:
        """Wait for Ctrl-C."""
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return

    def plan(self, steps: Sequence[str] | None) -> Plan:
        plan = make(self.recipe, self.store)
        return plan.only(list(steps)) if steps else plan

    def check(self, *, online: bool) -> list[str]:
        """Notes on a recipe that is sound: what is not locked yet, licences that do not fit. Raises what is wrong."""
        from hubforge.cards.licenses import check_license

        notes: list[str] = []
        try:
            plan = make(self.recipe, self.store)
        except LockError:
            if read_lock(self.recipe.path) is not None:
                raise
            if not online:
                return [f"not locked yet: `hubforge lock {self.recipe.path}` pins its Hub sources"]
            plan = None
        if plan is not None:
            notes += check_license(draft(plan))
        if online:
            notes += self.check_online()
        return notes

    def check_online(self) -> list[str]:
        """What only the Hub can answer: whether the sources may be read, and the targets written."""
        notes = []
        for name, spec in self.recipe.sources.items():
            if not spec.is_local:
                entry = resolve_online(
                    name, spec, self.source_hub.endpoint, self.source_hub.token, self.recipe.where("sources", name)
                )
                size = sum(file["size"] for file in entry["files"])
                notes.append(f"sources.{name}: {spec.value} at {entry['commit'][:8]}, {size / 1e9:.2f} GB")
        return notes + self.check_targets(self.source_hub)

    def check_targets(self, hub: Hub) -> list[str]:
        """Whether all that the recipe publishes to may be written; PublishError names what may not."""
        from hubforge.publish._access import check_access

        ops: list[Any] = [target.op for target in self.recipe.targets.values()]
        repos = [repo for op in ops for repo in (op.repo, *(getattr(op, "supersedes", None) or ()))]
        collections = {op.repo: op.collection for op in ops if getattr(op, "collection", None)}
        return [
            f"publish: {access.repo} {'exists' if access.exists else 'is new'}: {access.reason}"
            for access in check_access(hub, repos, collections)
        ]

    def lock(self) -> tuple[Path, list[str]]:
        """Resolve every Hub source; returns the lock's path and a line for each change."""
        path = lock_path(self.recipe.path)
        try:
            before = read_lock(self.recipe.path) or {"sources": {}}
        except LockError:
            before = {"sources": {}}
        sources: dict[str, Any] = {}
        changes = []
        for name, spec in self.recipe.sources.items():
            if spec.is_local:
                continue
            where = self.recipe.where("sources", name)
            entry = resolve_online(name, spec, self.source_hub.endpoint, self.source_hub.token, where)
            old = before["sources"].get(name)
            if old != entry:
                came = f"{old['commit'][:8]} -> " if old and "commit" in old else ""
                changes.append(f"{name}: {spec.value} {came}{entry['commit'][:8]}, {len(entry['files'])} files")
            sources[name] = entry
        changes += [f"{name}: removed" for name in before["sources"] if name not in sources]
        packages = package_versions(pinned(self.recipe))
        for name, version in packages.items():
            if (old := (before.get("packages") or {}).get(name)) != version:
                changes.append(f"{name}: {f'{old} -> ' if old else ''}{version}")
        if changes or not path.exists():
            write_json(path, {"version": 1, "sources": sources, "packages": packages})
            changes = changes or ["nothing to pin: local sources are keyed by content"]
        return path, changes

    def runner(self, plan: Plan) -> Runner:
        return Runner(plan, self.source_hub, self.settings, self.report)

    def run(self, steps: Sequence[str] | None, *, templates: Path | None = None) -> Outcome:
        """Make what is missing; for a whole recipe also judge the gates and render the cards."""
        plan = self.plan(steps)
        todo = tuple(step.name for step in plan.to_make())
        runner = self.runner(plan)
        runner.run()
        outcome = Outcome(refreshed(plan), todo)
        if steps:
            return outcome
        from hubforge.assemble import assemble, check_gates

        outcome.release = assemble(runner)
        check_gates(outcome.release, plan)
        outcome.cards = self.render(runner, outcome.release, templates)
        return outcome

    def render(self, runner: Runner, release: Release, templates: Path | None) -> dict[str, Path]:
        from hubforge.publishing import render, write_pages

        return {
            name: write_pages(runner, render(release, name, templates=templates)) / "README.md"
            for name in self.recipe.targets
        }

    def cards(self, target: str | None, templates: Path | None) -> list[Path]:
        """Render the cards of what is made, without running anything."""
        from hubforge.assemble import assemble

        if target is not None and target not in self.recipe.targets:
            known = ", ".join(self.recipe.targets) or "none"
            raise RecipeError(f"publish has no entry {target!r}", where=str(self.recipe.path), mend=f"It has: {known}.")
        runner = self.runner(self.plan(None))
        rendered = self.render(runner, assemble(runner), templates)
        return [path for name, path in rendered.items() if target in (None, name)]

    @contextmanager
    def hub(self, to: str | None, patience: str = "30m") -> Iterator[Hub]:
        """The Hub to publish to. patience: all the waiting for it, such as "90s", "30m", "2h"."""
        seconds = parse_duration(patience)
        with open_hub(to) as hub:
            yield replace(hub, patience=seconds)

    def publish(
        self,
        outcome: Outcome,
        hub: Hub,
        templates: Path | None,
        *,
        stage: bool = True,
        take: Take | None = None,
        prune: Mapping[str, frozenset[str]] | None = None,
    ) -> list[dict[str, object]]:
        """Push what was made, and read it back. prune: by target, paths of others that go besides."""
        from hubforge.publishing import publish, require_targets

        runner = self.runner(outcome.plan)
        require_targets(runner)
        assert outcome.release is not None
        return publish(
            runner, outcome.release, hub, self.report, templates=templates, stage=stage, take=take, prune=prune
        )

    def plan_push(
        self,
        plan: Plan,
        hub: Hub,
        *,
        templates: Path | None = None,
        take: Take | None = None,
        prune: bool = False,
    ) -> list[PushPlan]:
        """What a push would change, per target; asks the Hub, uploads nothing. prune: files of others go too.

        Where steps are not made yet, only what does not hang on them is told.
        """
        from hubforge.publishing import plan_pushes

        return plan_pushes(self.runner(plan), hub, self.report, templates=templates, take=take, prune=prune)

    def path(self, step: str) -> Path:
        """The folder of an artifact; one that existed only in another's pass is made. RecipeError for another one."""
        plan = self.plan(None)
        section, _, name = step.partition(".")
        if section == "sources" and name in plan.sources:
            return self.runner(plan).source(name).path
        found = plan.steps[plan.find(step)]
        if found.status == "fused":  # Nothing has asked for its files before.
            with self:
                self.runner(plan.only([found.name])).run()
            return self.store.folder(found.key)
        if found.status != "cached":
            raise RecipeError(
                f"{found.name} is not made yet ({found.reason})",
                where=found.node.where,
                mend=f"`hubforge run {self.recipe.path} {found.name}` makes it.",
            )
        return self.store.folder(found.key)


def draft(plan: Plan) -> Release:
    """A release with the sources alone, for what can be said before anything is made."""
    from hubforge import __version__
    from hubforge.release import SourceRecord

    return Release(
        hubforge=__version__,
        name=plan.recipe.name,
        license=plan.recipe.license,
        license_link=plan.recipe.license_link,
        recipe_file=plan.recipe.path.name,
        recipe=plan.recipe.text,
        sources=tuple(
            SourceRecord(
                name=name,
                kind=source.kind,
                repo=None if source.spec.is_local else source.spec.value,
                path=source.spec.value if source.spec.is_local else None,
                license=source.license,
                commit=source.commit,
            )
            for name, source in plan.sources.items()
        ),
    )


def parse_size(text: str) -> int:
    """Bytes in "2GiB", "500MB", "1.5 g". Raises HubforgeError."""
    match = _SIZE.match(text)
    if not match:
        raise HubforgeError(f"--memory is {text!r}", mend="Write a size such as 2GiB or 500MB.")
    unit = match.group(2).lower()
    power = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}[unit.rstrip("b").rstrip("i")]
    return int(float(match.group(1)) * (1024 if "i" in unit or unit in "kmgt" else 1000) ** power)


def parse_duration(text: str) -> float:
    """Seconds in "90", "90s", "30m", "1.5h". Raises HubforgeError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", text)
    if not match:
        raise HubforgeError(f"--patience is {text!r}", mend="Write a time such as 90s, 30m or 2h.")
    return float(match.group(1)) * {"m": 60.0, "min": 60.0, "h": 3600.0}.get(match.group(2) or "s", 1.0)


@contextmanager
def library_noise(log: Path) -> Iterator[None]:
    """Send what libraries log and warn to a file while steps run: the terminal is for what the user needs."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log, mode="w", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


def write_import(config: Path, recipe: Path | None, *, force: bool, must_write: bool) -> tuple[str, list[str]]:
    """The recipe of a mergekit configuration, and what it does not carry; written when a path is given."""
    from hubforge import marks
    from hubforge.mergekit import import_mergekit

    if must_write and recipe is None:
        raise RecipeError("--run needs a recipe to write", mend="Name it: hubforge import mergekit.yml my-merge.yaml")
    if recipe is not None and recipe.exists() and not force:
        raise RecipeError("is there already", where=str(recipe), mend="--force overwrites it.")
    folder = recipe.parent if recipe is not None else Path()
    made, notes = import_mergekit(marks.text_of(config, str(config)), str(config), folder)
    if recipe is not None:
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(made, encoding="utf-8")
    return made, notes


def build_lab(folder: Path, seed: int, *, quiet: bool) -> None:
    import sys

    from hubforge.lab import build

    def say(text: str) -> None:
        if not quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the training libraries deprecate is no business of the user's
        build(folder, seed=seed, report=say)
