"""Make a published release again from its own release file, and say file by file whether the same bytes came."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from hubforge import marks
from hubforge.errors import HubforgeError, SourceError, VerifyError
from hubforge.events import Report
from hubforge.publish._earlier import RELEASE_LIMIT, release_path
from hubforge.publish._remote import Remote
from hubforge.publisher import Hub
from hubforge.release import Release, SourceRecord, StepRecord
from hubforge.store import write_json

if TYPE_CHECKING:
    from hubforge.session import Session


@dataclass(frozen=True)
class Compared:
    """One file of the release and of what was made here."""

    step: str
    path: str
    same: bool
    exact: bool  # False: the op does not promise equal bytes on another machine


def fetch_release(repo: str, hub: Hub, *, revision: str | None, folder: str | None, report: Report) -> Release:
    """The release file of a repository. Raises VerifyError when there is none, or it cannot be read."""
    with Remote(hub, repo, report=report, step="reproduce") as remote:
        head = remote.head(revision or "main")
        path = release_path(folder)
        where = f"{repo} on {hub.endpoint}"
        if head is None or head.commit is None or path not in remote.tree(head.commit):
            raise VerifyError(f"there is no {path}", where=where, mend="hubforge did not publish it.")
        try:
            return Release.model_validate_json(remote.read(path, head.commit, RELEASE_LIMIT))
        except ValidationError as error:
            raise VerifyError(f"{path} is not a release file: {error.error_count()} errors", where=where) from error


def write_recipe(release: Release, folder: Path, replaced: Mapping[str, str]) -> Path:
    """Write the recipe and lock of a release into a folder. replaced: a path for each local source, by its name.

    Raises SourceError for a local source that the release does not carry and nobody replaced.
    """
    marked = marks.parse(release.recipe, release.recipe_file)
    if marked.errors or not isinstance(marked.data, dict):
        raise VerifyError("the recipe in the release file cannot be read", where=release.recipe_file)
    missing = [source for source in release.sources if source.repo is None and source.name not in replaced]
    if missing:
        names = " ".join(f"--source {source.name}=PATH" for source in missing)
        raise SourceError(
            f"these sources were local to whoever published it: {', '.join(source.name for source in missing)}",
            mend=f"Give each a path to the same files: {names}",
        )
    for name, path in replaced.items():
        source = next((source for source in release.sources if source.name == name), None)
        if source is None:
            raise SourceError(f"the release has no source {name!r}", where=release.recipe_file)
        marked.data["sources"][name][source.kind] = _relative(Path(path), folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(marked.data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if release.lock is not None:
        write_json(folder / "recipe.lock.json", release.lock)
    return recipe


def _relative(path: Path, folder: Path) -> str:
    return "./" + Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def check_sources(release: Release, sources: Mapping[str, SourceRecord]) -> None:
    """Raise SourceError when a source here is not, byte for byte, the one that the release was made of."""
    for source in release.sources:
        here = sources.get(source.name)
        if here is None or here.key == source.key:
            continue
        theirs = {file.path: file.sha256 for file in source.files}
        ours = {file.path: file.sha256 for file in here.files}
        differ = sorted(path for path in theirs.keys() | ours.keys() if theirs.get(path) != ours.get(path))
        what = f"{len(differ)} files differ, first {differ[0]}" if differ else "its key differs"
        raise SourceError(f"the source {source.name!r} is not the one that was published: {what}")


def compare(release: Release, steps: Mapping[str, StepRecord]) -> Iterator[Compared]:
    """Every file of every step of a release, against what the same step made here."""
    for step in release.steps:
        here = steps.get(step.name)
        made = {file.path: file.sha256 for file in here.files} if here else {}
        for file in step.files:
            yield Compared(step.name, file.path, made.get(file.path) == file.sha256, step.exact)


def check(compared: list[Compared]) -> None:
    """Raise VerifyError when a step that promises equal bytes made others."""
    wrong = [one for one in compared if one.exact and not one.same]
    if wrong:
        lines = "\n  ".join(f"{one.step}: {one.path}" for one in wrong)
        raise VerifyError(f"{len(wrong)} files did not come out the same\n  {lines}")


def read_sources(pairs: list[str]) -> dict[str, str]:
    """{"prose": "./out/prose"} of ["prose=./out/prose"]."""
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise HubforgeError(f"--source is {pair!r}", mend="Write --source NAME=PATH.")
        found[name] = path
    return found


def reproduce(session: Session, release: Release, *, everything: bool) -> list[Compared]:
    """Run the recipe of a release and compare. everything: its evals too, not only what its repository holds.

    Raises SourceError when an input is not the published one, and what a run raises.
    """
    from hubforge.assemble import source_record, step_record

    target = next((target for target in release.targets if target.name == release.target), None)
    names = None if everything or target is None else [name for name in target.entries if "sources." not in name]
    plan = session.plan(names)
    runner = session.runner(plan)
    check_sources(release, {name: source_record(runner, name) for name in plan.sources})
    runner.run()
    made = {step.name: step_record(plan, step) for step in plan.steps.values()}
    return [one for one in compare(release, made) if one.step in made]
