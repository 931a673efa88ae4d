"""Where things are: the store of a project, the user's embedded Hub, and the Hub that is meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubforge.errors import HubforgeError
from hubforge.publish._keyless import job_credentials
from hubforge.publisher import Hub

PROJECT = (".git", ".hubforge", "pyproject.toml")  # what marks the top folder of a project


def default_store(path: Path) -> Path:
    """.hubforge in the top folder of the project the recipe lies in, or beside the recipe."""
    folder = path.resolve().parent
    for parent in (folder, *folder.parents):
        if any((parent / mark).exists() for mark in PROJECT):
            return parent / ".hubforge"
    return folder / ".hubforge"


def hub_folder() -> Path:
    """Where the embedded Hub of this user keeps its repositories."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "hubforge" / "hub"


def real_hub() -> Hub:
    """The Hub and token that huggingface_hub's own settings name; no import of it just to plan.

    In a CI job without a token, or with HF_OIDC_RESOURCE, its publishing takes a token for each repository instead.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not token:
        home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
        saved = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
        token = saved.read_text().strip() if saved.is_file() else None
    return Hub(endpoint, token or None, credentials=job_credentials(endpoint, has_token=bool(token)))


@contextmanager
def open_hub(to: str | None) -> Iterator[Hub]:
    """The Hub to push to or verify on: HF_ENDPOINT's, one at an address, or the embedded one, started for now."""
    if to is None:
        yield real_hub()
    elif to == "local":
        from hubforge.hub import LocalHub

        with LocalHub(hub_folder()) as hub:
            yield Hub(hub.endpoint, "local", name="local")
    elif re.match(r"^https?://", to):
        # A token of huggingface.co is nobody else's business: another Hub gets one only when it is named for it. What a
        # CI job proves itself with is made out to one address, and may go there.
        variable = "HUBFORGE_HUB_TOKEN"
        token = os.environ.get(variable) or None
        yield Hub(to.rstrip("/"), token, credentials=job_credentials(to, has_token=bool(token)), variable=variable)
    else:
        raise HubforgeError(f"--to is {to!r}", mend="Give `local`, or an address such as http://127.0.0.1:8000.")
