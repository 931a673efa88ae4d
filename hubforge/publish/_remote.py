"""One repository on a Hub, through huggingface_hub: every failure is a HubError, every wait is reported.

The client's process-wide settings are set for as long as a `Remote` is open: see `_client`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from hubforge import __version__
from hubforge.errors import PublishError, shown
from hubforge.events import Report, Warned, silent
from hubforge.publish._client import client_settings
from hubforge.publish._explain import HubError, explained, scrubbed
from hubforge.publish._retry import Retry
from hubforge.publisher import Hub

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")

_CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """One file at one commit. sha256: of the content when it is in large-file storage, else None.

    oid: git's name of the blob, which for a large file is its pointer and tells nothing of the content.
    """

    path: str
    size: int
    sha256: str | None
    oid: str


def _listed(entry: RepoFile) -> RemoteFile:
    """A file as the Hub lists it. TypeError when what it says of it are no words and numbers."""
    sha256 = entry.lfs.sha256 if entry.lfs else None
    if not (isinstance(entry.path, str) and isinstance(entry.size, int) and isinstance(sha256, str | None)):
        raise TypeError("a file without a path, a size or a digest")
    return RemoteFile(entry.path, entry.size, sha256, entry.blob_id)


@dataclass(frozen=True)
class Head:
    """A revision of a repository: its commit (None: nothing was ever committed), and who may see it."""

    commit: str | None
    private: bool


@dataclass(frozen=True)
class Snapshot:
    """A repository as it was when it was looked at. head: None when it does not exist; tree: every file, by path."""

    head: Head | None
    tree: Mapping[str, RemoteFile]


class Remote:
    """A repository, open: use it in a `with` block."""

    def __init__(
        self, hub: Hub, repo: str, *, report: Report = silent, step: str = "", retry: Retry | None = None
    ) -> None:
        """retry: the waiting that is shared with other repositories; by default this one has all the patience."""
        self.hub, self.repo, self.report, self.step = hub, repo, report, step
        self.endpoint = hub.endpoint.rstrip("/")
        self.retry = retry or Retry(report, step, hub.patience)
        self.retry.step = step
        self.token = hub.token
        self._open = ExitStack()
        self._api: HfApi | None = None

    def __enter__(self) -> Remote:
        from huggingface_hub import HfApi

        with ExitStack() as stack:
            stack.enter_context(client_settings(self))
            if self.hub.credentials is not None and self.repo:
                credentials = self.hub.credentials
                self.token = self.retry.call(lambda: credentials.token(self.repo))
            # False, not None: None would send the token saved on this machine to whatever Hub this is.
            self._api = HfApi(
                endpoint=self.endpoint,
                token=self.token or False,
                library_name="hubforge",
                library_version=__version__,
            )
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._api = None
        self._open.close()

    @property
    def api(self) -> HfApi:
        if self._api is None:
            raise RuntimeError("Remote is used outside its `with` block")
        return self._api

    def _headers(self) -> dict[str, str]:
        """The headers of the requests that we send ourselves, over the client's connection."""
        token = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {"User-Agent": f"hubforge/{__version__}", **token}

    def call(self, doing: str, function: Callable[[], T], *, client_retries: bool = False, resend: bool = True) -> T:
        """What that call returns; its failures explained, and tried again by the rules of `_retry`."""

        def once() -> T:
            self._renew(fresh=False)
            with explained(self.hub, self.repo, doing):
                return function()

        def renewing() -> T:
            try:
                return once()
            except HubError as error:
                # A token that ran out in the middle: whatever was asked was refused, so asking again repeats nothing.
                if error.status != 401 or not self._renew(fresh=True):
                    raise
                return once()

        return self.retry.call(renewing, client_retries=client_retries, resend=resend)

    def _renew(self, *, fresh: bool) -> bool:
        """Take the token that is good now, where tokens are short-lived; whether there is another one."""
        if self.hub.credentials is None or not self.repo or self._api is None:
            return False
        self.token = self._api.token = self.hub.credentials.token(self.repo, fresh=fresh)
        return True

    def whoami(self) -> Mapping[str, Any]:
        """What the Hub says of the token's owner and permissions."""
        return dict(self.call("ask whose token this is", lambda: self.api.whoami(token=self.token)))

    def head(self, revision: str = "main") -> Head | None:
        """Where that revision stands, or None when the repository does not exist (or is hidden from the token)."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = self.call(
                "look at the repository", lambda: self.api.repo_info(self.repo, revision=revision, repo_type="model")
            )
        except HubError as error:
            if isinstance(error.__cause__, RevisionNotFoundError) and revision == "main":
                return Head(None, bool(self._visible().private))
            if isinstance(error.__cause__, RepositoryNotFoundError) and error.status == 404:
                return None
            raise
        return Head(info.sha, bool(info.private))

    def look(self) -> Snapshot:
        """What main holds now: two requests."""
        head = self.head()
        return Snapshot(head, self.tree(head.commit) if head and head.commit else {})

    def _visible(self) -> Any:
        return self.call("look at the repository", lambda: self.api.repo_info(self.repo, repo_type="model"))

    def tree(self, commit: str) -> dict[str, RemoteFile]:
        """Every file at that commit, by path."""
        from huggingface_hub.hf_api import RepoFile

        def listed() -> dict[str, RemoteFile]:
            entries = self.api.list_repo_tree(self.repo, revision=commit, recursive=True, repo_type="model")
            return {entry.path: _listed(entry) for entry in entries if isinstance(entry, RepoFile)}

        return self.call("list the files", listed, client_retries=True)

    def tags(self) -> dict[str, str]:
        """The commit of each tag, by name."""
        refs = self.call("list the tags", lambda: self.api.list_repo_refs(self.repo, repo_type="model"))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def create(self, *, private: bool) -> None:
        """Make the repository; fine when somebody was faster."""
        self.call(
            "create the repository",
            lambda: self.api.create_repo(self.repo, private=private, repo_type="model", exist_ok=True),
        )

    def check_card(self, text: str) -> None:
        """Let the Hub judge a card's front matter before anything large is sent; PublishError says what it found."""
        from huggingface_hub import get_session, hf_raise_for_status

        def ask() -> tuple[int, Any]:
            response = get_session().post(
                f"{self.endpoint}/api/validate-yaml",
                json={"content": text, "repoType": "model"},
                headers=self._headers(),
            )
            if response.status_code != 400:
                hf_raise_for_status(response)
            return response.status_code, response.json()

        status, answer = self.call("have the card's front matter checked", ask)
        findings = answer if isinstance(answer, dict) else {}
        for warning in _messages(findings.get("warnings")):
            self.report(Warned(self.step, f"README.md: {scrubbed(warning, self.hub)}"))
        errors = _messages(findings.get("errors"))
        if errors or status == 400:
            raise PublishError(
                f"the Hub refuses the front matter of README.md: {'; '.join(errors) or 'it does not say why'}",
                where=f"{self.repo} on {self.hub.endpoint}",
                mend="Mend `card:` or `license:` in the recipe; `hubforge card` shows the page without publishing.",
            )

    def preupload(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Send what goes to large-file storage, and learn of every file where it goes."""
        self.call(
            "upload files",
            lambda: self.api.preupload_lfs_files(
                self.repo, additions=list(additions), repo_type="model", revision="main", free_memory=False
            ),
            client_retries=True,
        )

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        parent: str | None,
        *,
        description: str = "",
        pull: bool = False,
    ) -> tuple[str, int]:
        """The commit that these operations made on top of `parent`; and with `pull` the new pull request it is in.

        HubError with status 412: the branch stands elsewhere; `in_doubt`: it may have been made all the same.
        """
        info = self.call(
            "open a pull request" if pull else "commit",
            lambda: self.api.create_commit(
                self.repo,
                operations=list(operations),
                commit_message=message,
                commit_description=description,
                parent_commit=parent,
                repo_type="model",
                revision="main",
                create_pr=pull,
            ),
            resend=False,
        )
        return info.oid, int(info.pr_num or 0)

    def tag(self, tag: str, commit: str) -> None:
        """Put that tag on that commit; HubError with status 409 when there is one of that name."""
        self.call(
            f"set the tag {tag}", lambda: self.api.create_tag(self.repo, tag=tag, revision=commit, repo_type="model")
        )

    def read(self, path: str, commit: str, limit: int) -> bytes:
        """The bytes of that file; PublishError when there are more than `limit`."""
        parts: list[bytes] = []
        size = 0
        for part in self._stream(path, commit):
            size += len(part)
            if size > limit:
                raise PublishError(
                    f"{shown(path)} is larger than {limit:,} bytes, which is more than such a file ever is",
                    where=f"{self.repo} on {self.hub.endpoint}",
                )
            parts.append(part)
        return b"".join(parts)

    def digest(self, path: str, commit: str, size: int, count: Callable[[int], None] | None = None) -> tuple[int, str]:
        """Size and sha256 of what a download of that file gives; reads at most one byte more than `size`."""
        digest, done = hashlib.sha256(), 0
        for part in self._stream(path, commit):
            digest.update(part)
            done += len(part)
            if count is not None:
                count(done)
            if done > size:
                break
        return done, digest.hexdigest()

    def _stream(self, path: str, commit: str) -> Iterator[bytes]:
        """The bytes of that file, a megabyte at a time; after a dropped connection it goes on where it was."""
        from huggingface_hub import get_session, hf_raise_for_status

        url = f"{self.endpoint}/{self.repo}/resolve/{quote(commit, safe='')}/{quote(path)}"
        done, tries = 0, 0
        while True:
            # Without "identity" a server may compress, and the bytes counted would not be those of the file.
            headers = {**self._headers(), "Accept-Encoding": "identity"}
            if done:
                headers["Range"] = f"bytes={done}-"
            try:
                with (
                    explained(self.hub, self.repo, f"download {shown(path)}"),
                    get_session().stream("GET", url, headers=headers) as response,
                ):
                    if response.status_code >= 400:
                        response.read()
                    hf_raise_for_status(response)
                    skip = done if response.status_code != 206 else 0  # a server may ignore the range
                    for part in response.iter_bytes(_CHUNK):
                        fresh = part[skip:] if skip else part
                        skip = max(0, skip - len(part))
                        if fresh:
                            done += len(fresh)
                            yield fresh
                return
            except HubError as error:
                self.retry.pause(error, tries)
                tries += 1


def _messages(found: Any) -> list[str]:
    """The messages of a validate-yaml answer, as far as it has the shape it should."""
    if not isinstance(found, list):
        return []
    return [shown(str(one["message"]), 300) for one in found[:20] if isinstance(one, dict) and "message" in one]
