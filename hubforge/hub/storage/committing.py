"""Changes of files become one commit, or none at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hubforge.hub.refusal import Refusal, no_entry
from hubforge.hub.storage.front_matter import check_card
from hubforge.hub.storage.gitids import blob_id, parent_of, pointer
from hubforge.hub.storage.repository import PULLS, Commit, Repository
from hubforge.hub.storage.tree import Entry


@dataclass(frozen=True)
class Put:
    """A file added or replaced; its content is already stored."""

    entry: Entry


@dataclass(frozen=True)
class Delete:
    path: str


@dataclass(frozen=True)
class DeleteFolder:
    path: str


Change = Put | Delete | DeleteFolder


def lfs_entry(repo: Repository, path: str, sha256: str, size: int | None) -> Entry:
    """The entry of an LFS file that was uploaded before; refused when it was not, or has another size."""
    stored = repo.objects.keep_lfs(sha256)
    if stored is None:
        raise Refusal(400, f"Your push was rejected: the LFS object {sha256} of {path} was not uploaded")
    if size is not None and size != stored:
        raise Refusal(400, f"{path}: the LFS object {sha256} has {stored} bytes, not {size}")
    return Entry(path, stored, blob_id(pointer(sha256, stored)), sha256)


def apply(files: dict[str, Entry], changes: Sequence[Change], head: str) -> dict[str, Entry]:
    """The files after all changes, in order. Refuses deleting what is not there, and a file that is also a folder."""
    files = dict(files)
    for change in changes:
        if isinstance(change, Put):
            files[change.entry.path] = change.entry
        elif isinstance(change, Delete):
            if change.path not in files:
                missing = no_entry(change.path, head)
                missing.message = f"A file with this name doesn't exist: {change.path}"
                raise missing
            del files[change.path]
        else:
            inside = [path for path in files if path.startswith(change.path + "/")]
            if not inside:
                missing = no_entry(change.path, head)
                missing.message = f"A folder with this name doesn't exist: {change.path}"
                raise missing
            for path in inside:
                del files[path]
    for path in files:
        folder = parent_of(path)
        while folder:
            if folder in files:
                raise Refusal(400, f"{folder} cannot be a file and the folder of {path}")
            folder = parent_of(folder)
    return files


def commit(
    repo: Repository,
    revision: str,
    changes: Sequence[Change],
    *,
    author: str,
    title: str,
    message: str = "",
    expected: str | None = None,
) -> Commit:
    """Commit changes to a branch or pull request; the head itself when they change nothing.

    expected: the commit (or its first 7 or more digits) that the caller saw as head; 412 when it no longer is.
    """
    with repo.lock():
        ref = repo.branch(revision)
        head = repo.commit(repo.refs()[ref])
        check_head(head, expected)
        new = commit_on(repo, head, changes, author, title, message)
        if new != head:
            repo.set_refs({ref: new.id})
        return new


def check_head(head: Commit, expected: str | None) -> None:
    if expected is not None and not (len(expected) >= 7 and head.id.startswith(expected)):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")


def commit_on(
    repo: Repository, head: Commit, changes: Sequence[Change], author: str, title: str, message: str
) -> Commit:
    """Record a commit on top of `head`, or give `head` back when nothing changes. No reference is moved."""
    before = repo.tree(head)
    files = apply(before.files, changes, head.id)
    if files == before.files:
        return head
    for path, entry in files.items():
        if entry != before.files.get(path) and not repo.path_of(entry).exists():
            raise Refusal(409, f"The contents of {path} are no longer here: send them again")
    card = files.get("README.md")
    if card is not None and card != before.files.get("README.md"):
        check_card(repo.read(card, 1 << 20))
    return repo.record(files, (head.id,), author, title, message)


def squash(repo: Repository, branch: str, author: str, message: str | None) -> Commit:
    """Replace a branch's history by one commit with the same files."""
    with repo.lock():
        ref = repo.branch(branch)
        if ref.startswith(PULLS):
            raise Refusal(400, "Only a branch can be squashed")
        head = repo.commit(repo.refs()[ref])
        new = repo.record(repo.tree(head).files, (), author, message or "Super-squash branch using huggingface_hub")
        repo.set_refs({ref: new.id})
        return new
