"""A release on its way out: cards rendered, files laid out per repository, pushed, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hubforge.assemble import artifact_files
from hubforge.errors import HubforgeError, PublishError
from hubforge.events import Finished, Report, Started, Warned
from hubforge.op import Hub, Upload, UploadFile
from hubforge.publish._plan import RELEASE_LIMIT
from hubforge.publish._remote import Remote
from hubforge.publish._sums import sums_text
from hubforge.release import FILE_NAME, SUMS_NAME, File, Release, TargetRecord
from hubforge.run import Runner
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
    target = target.model_copy(update={"files": tuple(sorted(listed, key=lambda file: file.path))})
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
    message = getattr(recipe.targets[target.name].op, "message", None) or f"{release.name}: {recipe.path.name}"
    return Upload(
        target=target.name,
        repo=target.repo,
        files=tuple(sorted(files, key=lambda file: file.path)),
        message=message,
        folder=target.folder,
        tag=target.tag,
        private=target.private,
    )


def located(runner: Runner, entry: str, path: str) -> Path:
    """Where a file of a step or source lies on this machine."""
    section, _, name = entry.partition(".")
    if section == "sources":
        here = runner.source(name).path
        return here / path if here.is_dir() else here
    return runner.store.folder(runner.plan.steps[entry].key) / path


def siblings(release: Release, name: str, hub: Hub, report: Report) -> list[Release]:
    """The releases of the other folders of a mask repository, as the release files in it tell; [] when it is new.

    A release file that cannot be read is reported and left out: its folder stays as it is, only its row is missing.
    """
    target = next(target for target in release.targets if target.name == name)
    if target.folder is None:
        return []
    found = []
    with Remote(hub, target.repo, report=report, step=f"publish.{name}") as remote:
        head = remote.head()
        if head is None or head.commit is None:
            return []
        for path in sorted(remote.tree(head.commit)):
            folder, _, last = path.rpartition("/")
            if last != FILE_NAME or not folder or folder == target.folder.strip("/"):
                continue
            try:
                found.append(Release.model_validate_json(remote.read(path, head.commit, RELEASE_LIMIT)))
            except (ValidationError, PublishError):
                report(
                    Warned(f"publish.{name}", f"{path} is not a release file that can be read; the card leaves it out")
                )
    return found


def publish(
    runner: Runner, release: Release, hub: Hub, report: Report, *, templates: Path | None = None
) -> list[dict[str, object]]:
    """Push every target, one commit per repository, each read back; the receipts, in the order of the recipe."""
    from time import monotonic

    receipts: list[dict[str, object]] = []
    targets = runner.plan.recipe.targets
    for number, (name, target) in enumerate(targets.items(), 1):
        step = f"publish.{name}"
        report(Started(step, f"to {hub.endpoint}/{target.op.repo}", number, len(targets)))  # type: ignore[attr-defined]
        began = monotonic()
        try:
            pages = render(release, name, siblings=siblings(release, name, hub, report), templates=templates)
            write_pages(runner, pages)
            receipt = target.op.push(upload(runner, release, pages), hub, report)
        except HubforgeError as error:
            if not error.where:
                raise type(error)(error.what, where=target.where, mend=error.mend) from error
            raise
        receipts.append({"target": name, **receipt})
        pushed = len(receipt["pushed"])
        summary = f"{pushed} file{'s' * (pushed != 1)} pushed" if pushed else "nothing to push"
        report(Finished(step, monotonic() - began, f"{summary}, {receipt['unchanged']} unchanged"))
    return receipts


def require_targets(runner: Runner) -> None:
    if not runner.plan.recipe.targets:
        raise PublishError(
            "the recipe publishes nothing",
            where=str(runner.plan.recipe.path),
            mend="Add `publish:` with an entry such as `weights: {op: hub, repo: me/my-model, model: merged}`.",
        )
