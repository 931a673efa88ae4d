"""A release on its way out: cards rendered, files laid out per repository, pushed, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from pydantic import ValidationError

from hubforge.assemble import artifact_files, assemble
from hubforge.errors import HubforgeError, PublishError
from hubforge.events import Finished, Note, Report, Started, Warned
from hubforge.front_matter import read_front_matter
from hubforge.publish._earlier import RELEASE_LIMIT
from hubforge.publish._journal import Journal, journal_path
from hubforge.publish._plan import PushPlan, plan_push
from hubforge.publish._release import publish_release
from hubforge.publish._remote import Remote, RemoteFile, Snapshot
from hubforge.publish._sending import git_blob_oid
from hubforge.publish._sums import sums_text
from hubforge.publisher import Hub, Upload, UploadFile
from hubforge.release import FILE_NAME, SUMS_NAME, CardRecord, File, Release, TargetRecord
from hubforge.run import Runner
from hubforge.sections import sections
from hubforge.sources import hash_bytes
from hubforge.store import disk_errors


@dataclass(frozen=True)
class Pages:
    """What is rendered for one target: path in the repository -> bytes, the release file and sums included."""

    target: TargetRecord
    files: Mapping[str, bytes]


def render(release: Release, name: str, *, siblings: Sequence[Release] = (), templates: Path | None = None) -> Pages:
    """The card, its pictures, the release file and SHA256SUMS of one target.

    A mask repository has a folder per model and one card for all: the card then lies outside what this release
    vouches for, since the next model's release rewrites it.
    """
    from hubforge.cards import render as render_card

    target = next(target for target in release.targets if target.name == name)
    pages = render_card(release, name, siblings=siblings, templates=templates)
    prefix = target.prefix
    own = {path: content for path, content in pages.items() if path.startswith(prefix)}
    listed = (*target.files, *(File(path=path, size=len(c), sha256=hash_bytes(c)) for path, c in own.items()))
    written = pages["README.md"].decode()
    wrote = CardRecord(front_matter=dict(read_front_matter(written)), sections=sections(written))
    target = target.model_copy(update={"files": tuple(sorted(listed, key=lambda file: file.path)), "card": wrote})
    targets = tuple(target if other.name == name else other for other in release.targets)
    named = release.model_copy(update={"targets": targets, "target": name})
    text = json.dumps(named.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False) + "\n"
    record = text.encode()
    listed = (*target.files, File(path=prefix + FILE_NAME, size=len(record), sha256=hash_bytes(record)))
    sums = sums_text(listed, target.folder).encode()
    return Pages(target, {**pages, prefix + FILE_NAME: record, prefix + SUMS_NAME: sums})


def write_pages(runner: Runner, pages: Pages) -> Path:
    """Write what was rendered for a target beside the store, to look at; returns the folder."""
    folder = runner.store.root / "releases" / runner.plan.recipe.name / pages.target.name
    with disk_errors(folder):
        for path, content in pages.files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
    return folder


def upload(runner: Runner, release: Release, pages: Pages) -> Upload:
    """What the repository of a target is to hold."""
    recipe = runner.plan.recipe
    target = pages.target
    prefix = target.prefix
    files = [
        UploadFile(prefix + file.path, located(runner, entry, file.path), file.size, file.sha256)
        for entry in target.entries
        for file in artifact_files(runner, entry)
    ]
    files += [UploadFile(path, content, len(content), hash_bytes(content)) for path, content in pages.files.items()]
    op = recipe.targets[target.name].op
    message = getattr(op, "message", None) or f"{release.name}: {recipe.path.name}"
    bare = Upload(
        target=target.name,
        repo=target.repo,
        files=tuple(sorted(files, key=lambda file: file.path)),
        message=message,
        folder=target.folder,
        tag=target.tag,
        private=target.private,
    )
    return _linked(bare, op)


def _linked(bare: Upload, op: object) -> Upload:
    """That upload with the collection and the pages that its op names, if it knows of such."""
    supersedes = tuple(getattr(op, "supersedes", None) or ())
    return replace(bare, collection=getattr(op, "collection", None), supersedes=supersedes)


def uploads_so_far(runner: Runner) -> tuple[Upload, ...]:
    """For each target what is made of it already, without the card: for a plan before the run. Fetches nothing."""
    found = []
    for name, target in runner.plan.recipe.targets.items():
        op: Any = target.op
        prefix = f"{op.folder.strip('/')}/" if op.folder else ""
        files = [
            UploadFile(prefix + file.path, located(runner, entry, file.path), file.size, file.sha256)
            for entry in target.entries
            if _is_here(runner, entry)
            for file in artifact_files(runner, entry)
        ]
        bare = Upload(name, op.repo, tuple(files), "", folder=op.folder, tag=op.tag, private=op.private)
        found.append(_linked(bare, op))
    return tuple(found)


def _is_here(runner: Runner, entry: str) -> bool:
    section, _, name = entry.partition(".")
    if section == "sources":
        return runner.plan.sources[name].path is not None
    return runner.plan.steps[entry].status == "cached"


def located(runner: Runner, entry: str, path: str) -> Path:
    """Where a file of a step or source lies on this machine."""
    section, _, name = entry.partition(".")
    if section == "sources":
        here = runner.source(name).path
        return here / path if here.is_dir() else here
    return runner.store.folder(runner.plan.steps[entry].key) / path


def siblings(release: Release, name: str, remote: Remote, seen: Snapshot, kept: Path | None = None) -> list[Release]:
    """The releases of the other folders of a mask repository, as the release files in it tell; [] when it is new.

    A release file that cannot be read is reported and left out: its folder stays as it is, only its row is missing.
    kept: a folder in which those that were read are kept by their digest, so that an unchanged one is read once.
    """
    target = next(target for target in release.targets if target.name == name)
    if target.folder is None or seen.head is None or seen.head.commit is None:
        return []
    found = []
    for path in sorted(seen.tree):
        folder, _, last = path.rpartition("/")
        if last != FILE_NAME or not folder or folder == target.folder.strip("/"):
            continue
        try:
            content = _read_kept(remote, seen.tree[path], seen.head.commit, kept)
            found.append(Release.model_validate_json(content))
        except (ValidationError, PublishError):
            text = f"{path} is not a release file that can be read; the card leaves it out"
            remote.report(Warned(remote.step, text))
    return found


def _read_kept(remote: Remote, file: RemoteFile, commit: str, kept: Path | None) -> bytes:
    """The bytes of that file: from the folder where what lies there has the digest that the Hub tells, else from it."""
    if kept is None or file.sha256 is not None:
        return remote.read(file.path, commit, RELEASE_LIMIT)
    place = kept / file.oid
    with disk_errors(kept):
        content = place.read_bytes() if place.is_file() else b""
        if content and git_blob_oid(content) == file.oid:
            return content
        content = remote.read(file.path, commit, RELEASE_LIMIT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return content


@dataclass(frozen=True)
class Prepared:
    """What is to be pushed, for each target in the order of the recipe, and what its repository held when looked at."""

    uploads: tuple[Upload, ...]
    seen: Mapping[str, Snapshot]


def prepare(
    runner: Runner, release: Release, hub: Hub, report: Report, *, templates: Path | None = None, write: bool = False
) -> Prepared:
    """Render every target against what the Hub holds. Each repository is looked at once; nothing is sent.

    write: leave the pages beside the store, to look at. Folders of one repository that are published together know of
    one another.
    """
    targets = runner.plan.recipe.targets
    seen: dict[str, Snapshot] = {}
    uploads = []
    together = {
        name: Release.model_validate_json(render(release, name, templates=templates).files[target.prefix + FILE_NAME])
        for name, target in ((target.name, target) for target in release.targets)
        if target.folder is not None
    }
    for name, target in targets.items():
        repo: str = target.op.repo  # type: ignore[attr-defined]
        try:
            with Remote(hub, repo, report=report, step=f"publish.{name}") as remote:
                if repo not in seen:
                    seen[repo] = remote.look()
                others = siblings(release, name, remote, seen[repo], runner.store.root / "publish" / "read")
            with_us = {one.name: one for one in release.targets if one.repo == repo and one.name != name}
            folders = {one.folder for one in with_us.values()}
            others = [one for one in others if _folder(one) not in folders] + [
                together[one] for one in with_us if one in together
            ]
            pages = render(release, name, siblings=others, templates=templates)
            if write:
                write_pages(runner, pages)
            uploads.append(upload(runner, release, pages))
        except HubforgeError as error:
            raise placed(error, target.where) from error
    return Prepared(tuple(uploads), seen)


def _folder(release: Release) -> str | None:
    """The folder that a release file in it speaks of."""
    return next((target.folder for target in release.targets if target.name == release.target), None)


def placed(error: HubforgeError, where: str) -> HubforgeError:
    """That error, with the line of the recipe where it has no place of its own."""
    return error if error.where else type(error)(error.what, where=where, mend=error.mend)


def publish(
    runner: Runner,
    release: Release,
    hub: Hub,
    report: Report,
    *,
    templates: Path | None = None,
    stage: bool = True,
    take: Literal["ours", "theirs"] | None = None,
    prune: Mapping[str, frozenset[str]] | None = None,
) -> list[dict[str, object]]:
    """Publish every target, each repository whole or not at all; the receipts, in the order of the recipe.

    stage: nothing is brought to main before all of it is on the Hub and verified; see `publish._release`. An op that
    knows no staging (of another package) pushes by itself, after all others. take: which card wins where people edited
    what hubforge wrote. prune: by target, paths of others that are deleted.
    """
    recipe = runner.plan.recipe
    targets = recipe.targets
    began = monotonic()
    journal = Journal(journal_path(runner.store.root, recipe.name, hub), hub)
    receipts: dict[str, dict[str, object]] = {}
    with (
        journal.held(hub.patience, lambda text: report(Note("publish", text))),
        Remote(hub, "", report=report, step="publish"),  # one client, and so one connection, for all that follows
    ):
        prepared = prepare(runner, release, hub, report, templates=templates, write=True)
        uploads = [
            replace(one, take=take, prune=(prune or {}).get(one.target, frozenset())) for one in prepared.uploads
        ]
        staged = [one for one in uploads if targets[one.target].op.staged]
        done = publish_release(staged, hub, report, journal, seen=prepared.seen, stage=stage)
        receipts |= {one.target: result for one, result in zip(staged, done, strict=True)}
        for one in uploads:
            if one not in staged:
                report(Started(f"publish.{one.target}", f"to {hub.endpoint}/{one.repo}"))
                receipts[one.target] = targets[one.target].op.push(one, hub, report)
    for name in targets:
        pushed = len(receipts[name]["pushed"])  # type: ignore[arg-type]
        summary = f"{pushed} file{'s' * (pushed != 1)} pushed" if pushed else "nothing to push"
        report(Finished(f"publish.{name}", monotonic() - began, f"{summary}, {receipts[name]['unchanged']} unchanged"))
    return [{"target": name, **receipts[name]} for name in targets]


def plan_pushes(
    runner: Runner,
    hub: Hub,
    report: Report,
    *,
    templates: Path | None = None,
    take: Literal["ours", "theirs"] | None = None,
    prune: bool = False,
) -> list[PushPlan]:
    """What `publish` would change, in the order of the recipe; sends nothing. prune: files of others go too.

    Where steps are not made yet, only what does not hang on them is told.
    """
    require_targets(runner)
    missing = [step.name for step in runner.plan.to_make()]
    if missing:
        uploads = uploads_so_far(runner)
    else:
        uploads = prepare(runner, assemble(runner), hub, report, templates=templates).uploads
    journal = Journal(journal_path(runner.store.root, runner.plan.recipe.name, hub), hub)
    coming = {one.repo for one in uploads}
    changes = []
    for one in uploads:
        unknown = _unmade(runner, one.target, missing)
        found = plan_push(replace(one, take=take), hub, report, unknown=unknown, journal=journal, coming=coming)
        if prune and not missing and found.prunable:
            bare = replace(found.upload, prune=frozenset(found.prunable), collection=None, supersedes=())
            again = plan_push(bare, hub, report)
            whole = replace(again.upload, collection=one.collection, supersedes=one.supersedes)
            found = replace(again, upload=whole, links=found.links)
        changes.append(found)
    return changes


def _unmade(runner: Runner, target: str, missing: list[str]) -> list[str]:
    """Of the steps that are not made, those a target's files hang on; all, where only its card waits for them."""
    plan = runner.plan
    entries = [entry for entry in plan.recipe.targets[target].entries if entry in plan.steps]
    needed = plan.only(entries).steps
    return [name for name in missing if name in needed] or missing


def require_targets(runner: Runner) -> None:
    if not runner.plan.recipe.targets:
        raise PublishError(
            "the recipe publishes nothing",
            where=str(runner.plan.recipe.path),
            mend="Add `publish:` with an entry such as `weights: {op: hub, repo: me/my-model, model: merged}`.",
        )
