"""verify: what a repository holds, against the release file it carries. Needs nothing else, and downloads little.

The release file is held against itself as well: recipe, lock and versions must give the keys that it records, and what
it lists must be what its steps made (`keys`).

Read: `hubforge.release.json`, `SHA256SUMS`, the card and the other small files, and the Hub's list of the tree. Large
files are compared by the sha256 that the Hub keeps of them; `deep` downloads and hashes those as well. Nothing is
written to disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubforge.errors import PublishError, VerifyError, shown
from hubforge.events import Progress, Report, silent
from hubforge.keys import artifact_faults, key_faults
from hubforge.publish._access import is_local
from hubforge.publish._card import CARD_LIMIT
from hubforge.publish._earlier import RELEASE_LIMIT, find_target, release_path
from hubforge.publish._explain import HubError
from hubforge.publish._front_matter import front_matter_faults
from hubforge.publish._paths import path_fault, repo_fault
from hubforge.publish._remote import Remote, RemoteFile
from hubforge.publish._sums import read_sums
from hubforge.publish._vouched import by_hand_notes, table_faults, vouched_faults
from hubforge.publisher import Hub
from hubforge.release import FILE_NAME, SUMS_NAME, File, Release, TargetRecord
from hubforge.sections import is_by_hand, keys_by_hand

SUMS_LIMIT = 8 << 20  # bytes
_CARD = "README.md"
_SHOWN_FAULTS = 200


@dataclass(frozen=True)
class FolderReport:
    """One release in the repository: what was compared, and how. Sizes in bytes.

    by_hub: files whose sha256 the Hub told; downloaded: files that were read and hashed here.
    """

    folder: str | None
    name: str
    files: int
    bytes: int
    by_hub: int
    downloaded: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """A repository that holds exactly what its release files say. unlisted: other files, which nobody vouches for."""

    repo: str
    revision: str
    commit: str
    deep: bool
    folders: tuple[FolderReport, ...]
    unlisted: tuple[str, ...] = ()

    @property
    def files(self) -> int:
        return sum(folder.files for folder in self.folders)

    @property
    def bytes(self) -> int:
        return sum(folder.bytes for folder in self.folders)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "repo": self.repo,
            "revision": self.revision,
            "commit": self.commit,
            "deep": self.deep,
            "files": self.files,
            "bytes": self.bytes,
            "folders": [
                {
                    "folder": one.folder,
                    "name": one.name,
                    "files": one.files,
                    "bytes": one.bytes,
                    "by_hub": one.by_hub,
                    "downloaded": one.downloaded,
                    "notes": list(one.notes),
                }
                for one in self.folders
            ],
            "unlisted": list(self.unlisted),
        }


def verify(
    repo: str,
    hub: Hub,
    *,
    revision: str | None = None,
    folder: str | None = None,
    deep: bool | None = None,
    report: Report = silent,
) -> VerifyReport:
    """What was compared, when everything is as the release files in that repository say.

    revision: branch, tag or commit; None is main. folder: only that folder's release; None is every release there.
    deep: download and hash the large files too; None does so on a Hub of this machine, where it costs nothing.
    Raises VerifyError, naming every file that is missing or differs and how, or the release file that cannot be read;
    PublishError when the Hub does not answer or hides the repository.
    """
    if (fault := repo_fault(repo)) or (folder and (fault := path_fault(folder))):
        raise VerifyError(f"{shown(repo if repo_fault(repo) else str(folder))!r} {fault}")
    where = f"{repo}@{revision or 'main'} on {hub.endpoint}"
    deep = is_local(hub) if deep is None else deep
    with Remote(hub, repo, report=report, step="verify") as remote:
        head = remote.head(revision or "main")
        if head is None or head.commit is None:
            raise VerifyError(
                "there is nothing to verify: the repository is empty, or not there, or hidden from this token",
                where=where,
                mend="Check the spelling, and with `hf auth whoami` who you are there.",
            )
        tree = remote.tree(head.commit)
        folders = _folders(tree, folder)
        if not folders:
            raise VerifyError(
                f"there is no {release_path(folder)}, so nothing says what should be there",
                where=where,
                mend="Only what `hubforge publish` put on a Hub can be verified.",
            )
        checks = [_Check(remote, head.commit, tree, one, deep) for one in folders]
        meter = _Meter(sum(check.to_download for check in checks), report)
        for check in checks:
            check.compare(meter)
        faults = [fault for check in checks for fault in check.faults]
        faults += _card_faults(checks, whole=folder is None)
        if faults:
            more = [f"... and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
            count = "1 thing is" if len(faults) == 1 else f"{len(faults)} things are"
            raise VerifyError(
                "\n  ".join([f"{count} not as the release file says:", *faults[:_SHOWN_FAULTS], *more]),
                where=f"{where} ({head.commit})",
                mend="Publish it again, or take the commit that was tagged: `hubforge verify REPO@TAG`.",
            )
    vouched = {path for check in checks for path in check.vouched}
    if None not in folders:
        vouched.add(_CARD)  # the card that the folders share: each release rewrites it, and may leave it unlisted
    unlisted = sorted(
        path
        for path in tree
        if path not in vouched
        and path.rpartition("/")[2] != ".gitattributes"
        and (folder is None or path.startswith(f"{folder}/"))
    )
    return VerifyReport(
        repo,
        revision or "main",
        head.commit,
        deep,
        tuple(check.result() for check in checks),
        tuple(shown(path) for path in unlisted),
    )


def _folders(tree: Mapping[str, RemoteFile], folder: str | None) -> list[str | None]:
    """The folders that carry a release file; None is the root."""
    if folder is not None:
        return [folder] if release_path(folder) in tree else []
    found = sorted(path for path in tree if path == FILE_NAME or path.endswith(f"/{FILE_NAME}"))
    return [path.rpartition("/")[0] or None for path in found]


class _Meter:
    """Bytes downloaded, of those that must be."""

    def __init__(self, total: int, report: Report) -> None:
        self.total, self.report, self._done = total, report, 0

    def of(self, file: File) -> Callable[[int], None]:
        before = self._done

        def count(done: int) -> None:
            self._done = before + done
            self.report(Progress("verify", shown(file.path), self._done, self.total, "B"))

        return count


class _Check:
    """One release file and the files it lists, against the tree at one commit."""

    def __init__(
        self, remote: Remote, commit: str, tree: Mapping[str, RemoteFile], folder: str | None, deep: bool
    ) -> None:
        self.remote, self.commit, self.tree, self.folder, self.deep = remote, commit, tree, folder, deep
        self.prefix = f"{folder}/" if folder else ""
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.by_hub = self.downloaded = 0
        self.card_differs: str | None = None
        self.release, self.release_bytes = self._read_release()
        self.target = self._find_target(self.release)
        self.files = {file.path: file for file in self.target.files}
        self._judge_paths()

    @property
    def vouched(self) -> set[str]:
        return {*self.files, release_path(self.folder), self.prefix + SUMS_NAME}

    @property
    def to_download(self) -> int:
        return sum(file.size for file in self.files.values() if self._must_download(file))

    def result(self) -> FolderReport:
        return FolderReport(
            self.folder,
            shown(self.release.name),
            len(self.files),
            sum(file.size for file in self.files.values()),
            self.by_hub,
            self.downloaded,
            tuple(self.notes),
        )

    def compare(self, meter: _Meter) -> None:
        """Fill `faults` with a line for everything that is not as the release says."""
        for file in self.files.values():
            if file.path == _CARD and self.target.card is not None:
                continue  # people may have written on it: its sections are compared
            fault = self._file_fault(file, meter)
            if fault and self.folder and file.path == _CARD:
                self.card_differs = fault  # shared by the folders: judged once all were seen
            elif fault:
                self.faults.append(fault)
        self._compare_sums()
        self._compare_card()
        path = release_path(self.folder)
        faults, notes = key_faults(self.release)
        faults += artifact_faults(self.release, self.target)
        self.faults += [f"{path}: {fault}" for fault in faults]
        self.notes += notes

    def _read_release(self) -> tuple[Release, bytes]:
        from pydantic import ValidationError

        path = release_path(self.folder)
        data = _bounded(self.remote, path, self.commit, RELEASE_LIMIT)
        try:
            return Release.model_validate_json(data), data
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise VerifyError(
                f"{path} is not a release file: {shown(f'{place}: ' if place else '')}{shown(first['msg'])}",
                where=self._where(),
                mend="It was changed by hand, or is of a newer hubforge: publish again, or update hubforge.",
            ) from error

    def _find_target(self, release: Release) -> TargetRecord:
        target = find_target(release, self.remote.repo, self.folder)
        if target is None:
            raise VerifyError(
                f"{release_path(self.folder)} says nothing of this {'folder' if self.folder else 'repository'}",
                where=self._where(),
                mend="It belongs to another repository, and was copied here alone.",
            )
        if target.repo != self.remote.repo:
            self.notes.append(f"was published to {shown(target.repo)}; this is a copy")
        return target

    def _judge_paths(self) -> None:
        seen: set[str] = set()
        for file in self.target.files:
            path = shown(file.path)
            if fault := path_fault(file.path):
                self.faults.append(f"{path}: the release file lists it, but it {fault}")
            elif self.folder and file.path != _CARD and not file.path.startswith(self.prefix):
                self.faults.append(f"{path}: the release file lists it, but it lies outside {self.folder}")
            elif file.path in seen:
                self.faults.append(f"{path}: the release file lists it twice")
            seen.add(file.path)

    def _must_download(self, file: File) -> bool:
        there = self.tree.get(file.path)
        return there is not None and there.size == file.size and (self.deep or there.sha256 is None)

    def _file_fault(self, file: File, meter: _Meter) -> str | None:
        path, there = shown(file.path), self.tree.get(file.path)
        if there is None:
            return f"{path}: missing"
        if there.size != file.size:
            return f"{path}: {there.size:,} bytes, but the release has {file.size:,}"
        if there.sha256 is not None:
            self.by_hub += 1
            if there.sha256 != file.sha256:
                return f"{path}: sha256 {shown(there.sha256)}, but the release has {shown(file.sha256)}"
        if not self._must_download(file):
            return None
        size, sha256 = self.remote.digest(file.path, self.commit, file.size, meter.of(file))
        self.downloaded += 1
        if size != file.size:
            more = " or more" if size > file.size else ""
            return f"{path}: a download gives {size:,} bytes{more}, but the release has {file.size:,}"
        if sha256 != file.sha256:
            return f"{path}: sha256 of its content is {sha256}, but the release has {shown(file.sha256)}"
        return None

    def _compare_sums(self) -> None:
        """SHA256SUMS must list what the release lists, and may list the release file itself."""
        path = self.prefix + SUMS_NAME
        if path not in self.tree:
            self.faults.append(f"{path}: missing")
            return
        try:
            data = _bounded(self.remote, path, self.commit, SUMS_LIMIT)
            listed = dict(read_sums(data.decode("utf-8")))
        except (ValueError, VerifyError) as error:
            self.faults.append(f"{path}: {error.what if isinstance(error, VerifyError) else error}")
            return
        own = listed.pop(FILE_NAME, None)
        if own is not None and own != hashlib.sha256(self.release_bytes).hexdigest():
            self.faults.append(f"{path}: has another sha256 for {FILE_NAME} than the one that is there")
        expected = {
            file.path.removeprefix(self.prefix): file.sha256
            for file in self.files.values()
            if file.path.startswith(self.prefix) and file.path != _CARD
        }
        for name in sorted(expected.keys() | listed.keys()):
            if name not in listed:
                self.faults.append(f"{path}: does not list {shown(name)}")
            elif name not in expected:
                self.faults.append(f"{path}: lists {shown(name)}, which the release does not")
            elif listed[name] != expected[name]:
                self.faults.append(f"{path}: has another sha256 for {shown(name)} than the release")

    def _compare_card(self) -> None:
        """What hubforge wrote on the card must be what the release says; what people wrote is only noted."""
        file, there, record = self.files.get(_CARD), self.tree.get(_CARD), self.target.card
        if record is None and (file is None or there is None or there.size != file.size or self.card_differs):
            return  # not part of the release, or already told
        if there is None:
            self.faults.append(f"{_CARD}: missing")
            return
        try:
            data = _bounded(self.remote, _CARD, self.commit, CARD_LIMIT)
            text = data.decode("utf-8")
        except (UnicodeDecodeError, VerifyError) as error:
            self.faults.append(f"{_CARD}: {error.what if isinstance(error, VerifyError) else 'is not UTF-8'}")
            return
        notes = by_hand_notes(text) if record is not None else []
        self.notes += notes
        if record is not None:
            self.downloaded += 1
            if is_by_hand(text):
                return
            found = [*vouched_faults(text, record), *table_faults(text, self.target)]
            wrong = [f"{_CARD}: {fault}" for fault in found]
            if self.folder and wrong:
                self.card_differs = "; ".join(wrong)  # shared by the folders: judged once all were seen
                return
            self.faults += wrong
        self.faults += [f"{_CARD}: {fault}" for fault in front_matter_faults(text, self.release, keys_by_hand(text))]

    def _where(self) -> str:
        return f"{self.remote.repo}@{self.commit} on {self.remote.hub.endpoint}"


def _bounded(remote: Remote, path: str, commit: str, limit: int) -> bytes:
    """The bytes of a file that verify must read whole; VerifyError when there are more than such a file ever has."""
    try:
        return remote.read(path, commit, limit)
    except HubError:
        raise
    except PublishError as error:
        raise VerifyError(error.what, where=error.where) from error


def _card_faults(checks: list[_Check], *, whole: bool) -> Iterator[str]:
    """The card at the root, which the folders of a repository share: it must be that of one of their releases.

    Each release replaces it, so that only the latest one's digest fits.
    """
    differing = [check for check in checks if check.card_differs]
    if not differing:
        return
    if not whole:
        for check in differing:
            check.notes.append(f"{_CARD} is of another folder's release; it was not compared")
    elif len(differing) == sum(_CARD in check.files or check.target.card is not None for check in checks):
        yield f"{differing[0].card_differs} (and no other release in this repository has it either)"
    else:
        for check in differing:
            check.notes.append(f"{_CARD} is of a later release to another folder")
