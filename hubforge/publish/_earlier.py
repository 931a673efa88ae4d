"""The releases that a repository already holds: what hubforge put there, and what it wrote on the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import ValidationError

from hubforge.errors import PublishError
from hubforge.publish._explain import HubError
from hubforge.publish._merge import Base
from hubforge.publish._remote import Remote, RemoteFile
from hubforge.publisher import Upload, UploadFile
from hubforge.release import FILE_NAME, Release, TargetRecord

RELEASE_LIMIT = 32 << 20  # bytes; a release file holds the recipe, the lock and one line per file
CARD = "README.md"
NEVER_DELETED = frozenset({".gitattributes"})
_MOST_RELEASES = 200  # folders of one repository whose release files are read for the card that they share


def release_path(folder: str | None) -> str:
    """Where the release file of a folder (or of a whole repository) lies."""
    return f"{folder}/{FILE_NAME}" if folder else FILE_NAME


def find_target(release: Release, repo: str, folder: str | None) -> TargetRecord | None:
    """The target of a release that is that repository and folder; names the file gives itself come first."""
    fitting = [target for target in release.targets if target.folder == folder]
    named = [target for target in fitting if target.name == release.target]
    return next(iter(named or [target for target in fitting if target.repo == repo]), None)


class EarlierReleases:
    """The release files in a repository at one commit, each read once and only when it is asked for."""

    def __init__(
        self,
        remote: Remote,
        commit: str,
        tree: Mapping[str, RemoteFile],
        upload: Upload,
        is_same: Callable[[UploadFile], bool],
    ) -> None:
        self.remote, self.commit, self.tree, self.upload = remote, commit, tree, upload
        self._ours = {file.path: file for file in upload.files if file.path.rpartition("/")[2] == FILE_NAME}
        self._is_same = is_same
        self._read: dict[str, Release | None] = {}
        self.folders = tuple(path.rpartition("/")[0] for path in sorted(tree) if path.rpartition("/")[2] == FILE_NAME)

    def read(self, path: str) -> Release | None:
        """That release file; None when it is not one. Raises HubError when the Hub does not answer."""
        if path not in self._read:
            ours = self._ours.get(path)
            try:
                if ours is not None and isinstance(ours.content, bytes) and self._is_same(ours):
                    data = ours.content  # what is there is what we push: no need to ask for it
                else:
                    data = self.remote.read(path, self.commit, RELEASE_LIMIT)
                self._read[path] = Release.model_validate_json(data)
            except HubError:
                raise
            except (ValidationError, PublishError):
                self._read[path] = None
        return self._read[path]

    def is_stray(self, path: str) -> bool:
        """Whether a file lies where this release may write, and in no folder of another release."""
        mine = self.upload.folder or ""
        if path.rpartition("/")[2] in NEVER_DELETED or (mine and not path.startswith(f"{mine}/")):
            return False
        within = [one for one in self.folders if path.startswith(f"{one}/") or not one]
        return max(within, key=len, default=mine) in (mine, "")

    def card_writers(self) -> list[TargetRecord]:
        """The targets that have written the card at the root: the one pushed, and all folders where they share it."""
        folders = self.folders[:_MOST_RELEASES] if self.upload.folder else (self.upload.folder or "",)
        found = []
        for folder in folders:
            path = release_path(folder or None)
            release = self.read(path) if path in self.tree else None
            target = find_target(release, self.upload.repo, folder or None) if release else None
            found += [target] if target else []
        return found

    def wrote(self, card: bytes) -> bool:
        """Whether one of these releases lists that card as its own, byte for byte."""
        from hashlib import sha256

        digest = sha256(card).hexdigest()
        return any(file.path == CARD and file.sha256 == digest for one in self.card_writers() for file in one.files)

    def base(self) -> Base:
        """What hubforge wrote on the card, as far as these releases tell."""
        records = [target.card for target in self.card_writers() if target.card is not None]
        names = frozenset(name for record in records for name in record.sections)
        return Base(bool(records), tuple(record.front_matter for record in records), names)
