"""What the Hub says of files before they are sent: `preupload`, asked alone, for a plan that uploads nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubforge.events import Note
from hubforge.publish._explain import HubError
from hubforge.publish._remote import Remote
from hubforge.publish._sending import git_oid, unreadable
from hubforge.publisher import UploadFile

_BATCH = 256  # files of one request, as huggingface_hub sends them
_SAMPLE = 512  # bytes of each file by which the Hub tells text from binary


@dataclass(frozen=True)
class Answer:
    """Of one file. oid: of the file of that path on main: sha256 of a large one, git's sha1 of a small one."""

    large: bool
    ignored: bool  # by a .gitignore in the repository
    oid: str | None

    def holds(self, file: UploadFile) -> bool:
        """Whether main has that very file."""
        return self.oid is not None and self.oid == (file.sha256 if self.large else git_oid(file))


def ask_before(files: Sequence[UploadFile], remote: Remote) -> dict[str, Answer]:
    """The Hub's answer for each of those files, by path; {} with a note where this token may not ask.

    Sends the first 512 bytes of each file, as every upload does.
    """
    found: dict[str, Answer] = {}
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        try:
            answer = remote.call("ask what is there", lambda batch=batch: _ask(batch, remote))  # type: ignore[misc]
        except HubError as error:
            if error.status not in (401, 403, 404):
                raise
            remote.report(
                Note(remote.step, "this token may only read, so what a .gitignore would keep out is not known")
            )
            return {}
        wanted = {file.path for file in batch}
        files_there = answer.get("files")
        for one in files_there if isinstance(files_there, list) else ():
            if isinstance(one, dict) and one.get("path") in wanted:
                oid = one.get("oid")
                large = one.get("uploadMode") == "lfs"
                found[one["path"]] = Answer(
                    large, one.get("shouldIgnore") is True, oid if isinstance(oid, str) else None
                )
    return found


def _ask(files: Sequence[UploadFile], remote: Remote) -> dict[str, Any]:
    from huggingface_hub import get_session, hf_raise_for_status

    rows = [
        {"path": file.path, "sample": base64.b64encode(_sample(file)).decode(), "size": file.size} for file in files
    ]
    response = get_session().post(
        f"{remote.endpoint}/api/models/{remote.repo}/preupload/main", json={"files": rows}, headers=remote._headers()
    )
    hf_raise_for_status(response)
    answer = response.json()
    return answer if isinstance(answer, dict) else {}


def _sample(file: UploadFile) -> bytes:
    if not isinstance(file.content, Path):
        return file.content[:_SAMPLE]
    try:
        with file.content.open("rb") as handle:
            return handle.read(_SAMPLE)
    except OSError as error:
        raise unreadable(file, error) from error
