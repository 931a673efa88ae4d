"""All repositories of a Hub, on one folder: found, made, moved, copied and removed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hubforge.errors import StoreError
from hubforge.hub.disk import locked, sync_folder, write_whole
from hubforge.hub.names import KINDS, RESERVED, Kind, check_name, is_name
from hubforge.hub.refusal import Refusal, no_repository
from hubforge.hub.storage.repository import MAIN, Repository
from hubforge.hub.storage.tree import Entry
from hubforge.hub.storage.uploadmode import GITATTRIBUTES

FORMAT = 1
_MOVES = 8  # That are followed from an old name to the present one.


class Shelf:
    """`repos/<kind>/<namespace>/<name>`, locks beside them, and the secret that signs upload addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            self.scratch = self.folder / "scratch"
            self.scratch.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / "locks" / "hub.lock"):
                self.about = self._open()
        except OSError as error:
            raise StoreError(
                f"the Hub's folder cannot be used: {error.strerror or error}",
                where=str(folder),
                mend="Name a folder that you may write to.",
            ) from error
        self.sweep()

    def _open(self) -> dict[str, Any]:
        path = self.folder / "hub.json"
        try:
            about = json.loads(path.read_bytes())
        except FileNotFoundError:
            strangers = [
                entry.name for entry in self.folder.iterdir() if not entry.name.startswith((".", "scratch", "locks"))
            ]
            if strangers:
                raise StoreError(
                    f"the folder holds {strangers[0]!r} and is not a Hub's",
                    where=str(self.folder),
                    mend="Name an empty folder, or one that was served before.",
                ) from None
            about = {"format": FORMAT, "id": secrets.token_hex(8), "secret": secrets.token_hex(32)}
            write_whole(path, json.dumps(about).encode())
            path.chmod(0o600)
        except ValueError as error:
            raise StoreError(f"hub.json is damaged: {error}", where=str(path)) from error
        if about.get("format") != FORMAT:
            raise StoreError(
                f"the folder has format {about.get('format')}, and this hubforge reads format {FORMAT}",
                where=str(path),
                mend="Serve it with the hubforge that wrote it.",
            )
        found: dict[str, Any] = about
        return found

    def sweep(self, older: float = 86400.0) -> None:
        """Remove what uploads and deletions left behind so many seconds ago; another server may be at work now."""
        limit = time.time() - older
        for path in [*self.scratch.iterdir(), *self.folder.glob("repos/*/*/*/incoming/*")]:
            try:
                if path.stat().st_mtime < limit:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            except FileNotFoundError:
                continue

    def _repository(self, kind: Kind, id: str) -> Repository:
        namespace, _, name = id.partition("/")
        if kind not in KINDS or not is_name(namespace) or not is_name(name):
            raise no_repository()
        lock = self.folder / "locks" / kind / f"{namespace}--{name}.lock"
        return Repository(self.folder / "repos" / kind / namespace / name, lock, kind, id)

    def get(self, kind: Kind, id: str) -> Repository:
        """The repository of that id, or the one that moved away from it and is now named otherwise."""
        repo = self._repository(kind, id)
        for _ in range(_MOVES):
            if (repo.folder / "repo.json").exists():
                return repo
            try:
                repo = self._repository(kind, self._forwarding(repo).read_text())
            except FileNotFoundError:
                break
        raise no_repository()

    def _forwarding(self, repo: Repository) -> Path:
        """Where it is written what a repository that moved away is named now."""
        return self.folder / "moved" / repo.kind / repo.namespace / repo.id.partition("/")[2]

    def all(self, kind: Kind | None = None) -> Iterator[Repository]:
        for each in KINDS if kind is None else (kind,):
            root = self.folder / "repos" / each
            for path in sorted(root.glob("*/*/repo.json")):
                yield self._repository(each, f"{path.parent.parent.name}/{path.parent.name}")

    def create(self, kind: Kind, id: str, author: str, visibility: str, sdk: str | None = None) -> Repository:
        """A repository with one commit, like the real Hub's; 409 when the id is taken."""
        self._check_new(id)
        repo = self._repository(kind, id)
        draft = Repository(self.scratch / secrets.token_hex(8), repo._lock, kind, id)
        attributes = GITATTRIBUTES.encode()
        try:
            draft.folder.mkdir()
            draft.write_json(
                "repo.json", {"visibility": visibility, "gated": False, "created": int(time.time()), "sdk": sdk}
            )
            entry = Entry(".gitattributes", len(attributes), draft.objects.add_blob(attributes))
            first = draft.record({entry.path: entry}, (), author, "initial commit")
            draft.write_json("refs.json", {MAIN: first.id})
            with repo.lock():
                self._put(draft.folder, repo)
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)
        return repo

    def _check_new(self, id: str) -> None:
        namespace, _, name = id.partition("/")
        check_name(namespace, "namespace")
        check_name(name, "repository name")
        if namespace.lower() in RESERVED:
            raise Refusal(400, f"The namespace {namespace!r} is reserved")

    def _put(self, folder: Path, repo: Repository) -> None:
        """Give a finished folder its place, unless it is taken. The caller holds the lock."""
        self._check_free(repo)
        repo.folder.parent.mkdir(parents=True, exist_ok=True)
        if repo.folder.exists():  # An upload that outlived its repository left this.
            repo.folder.rename(self.scratch / secrets.token_hex(8))
        folder.rename(repo.folder)
        sync_folder(repo.folder.parent)
        self._forwarding(repo).unlink(missing_ok=True)  # The name is somebody's again.

    def _check_free(self, repo: Repository) -> None:
        if (repo.folder / "repo.json").exists():
            raise Refusal(409, f"You already created this {repo.kind[:-1]} repo")

    def delete(self, repo: Repository) -> None:
        grave = self.scratch / secrets.token_hex(8)
        with repo.lock():
            try:
                repo.folder.rename(grave)  # Gone at once; the files follow.
            except FileNotFoundError:
                raise no_repository() from None
            sync_folder(repo.folder.parent)
            self._forwarding(repo).unlink(missing_ok=True)
        shutil.rmtree(grave, ignore_errors=True)

    def move(self, repo: Repository, to: str) -> Repository:
        self._check_new(to)
        target = self._repository(repo.kind, to)
        first, second = sorted((repo, target), key=lambda each: str(each._lock))  # One order, so no deadlock.
        if first.id == second.id:
            return target
        with first.lock(), second.lock():
            self._check_free(target)
            # Written first: killed in between, the repository is still found where it is.
            write_whole(self._forwarding(repo), to.encode())
            self._put(repo.folder, target)
        return target

    def duplicate(self, repo: Repository, to: str, visibility: str) -> Repository:
        """A copy with the whole history; contents are hard links where the file system has them."""
        self._check_new(to)
        target = self._repository(repo.kind, to)
        draft = self.scratch / secrets.token_hex(8)
        try:
            with repo.lock():
                shutil.copytree(
                    repo.folder,
                    draft,
                    copy_function=_link_or_copy,
                    ignore=shutil.ignore_patterns("incoming", "discussions", "*.part"),
                )
            copy = Repository(draft, target._lock, repo.kind, to)
            refs = {name: id for name, id in copy.refs().items() if not name.startswith("refs/pr/")}
            copy.write_json("refs.json", refs)
            copy.write_json("repo.json", {**copy.about(), "visibility": visibility, "created": int(time.time())})
            with target.lock():
                self._put(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target


def _link_or_copy(source: str, target: str) -> None:
    # Whatever is in these folders is never written again, only replaced, so a link is as good as a copy.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
