"""The token is in nothing that a failing publish of the real command wrote: output, store, journal, log, summary."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubforge.hub import HubSettings
from tests.publish.faulty import Fault, FaultyHub
from tests.publish.kills import make_project
from tests.publish.schedules import TOKEN


@pytest.mark.parametrize("fault", [403, "lost"])
def test_a_publish_that_fails_writes_its_token_nowhere(tmp_path: Path, fault: Fault) -> None:
    """A Hub that shows each request that it refuses, headers and all, and the traceback asked for with --debug."""

    def faults(method: str, path: str) -> Fault | None:
        if "/commit/" in path and "me/two" in path:
            return fault
        return 403 if fault == "lost" and "/settings" in path else None

    recipe = make_project(tmp_path / "project", 1)
    with FaultyHub(tmp_path / "hub", HubSettings(tokens={TOKEN: "me"}, lfs_from=2000), faults) as server:
        command = [sys.executable, "-m", "hubforge.cli", "--debug", "--store", str(tmp_path / "store"), "publish"]
        environment = {
            **os.environ,
            "HUBFORGE_HUB_TOKEN": TOKEN,
            "HF_TOKEN": "hf_of_another_hub",
            "GITHUB_ACTIONS": "true",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "store" / "summary.md"),
            "HF_DEBUG": "1",  # the client logs a curl command of each request
        }
        done = subprocess.run(
            [*command, str(recipe), "--to", server.endpoint],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode != 0 and "HubError" in done.stderr, done.stderr[-2000:]
    assert all(TOKEN not in argument for argument in command)
    written = {"output": done.stdout, "errors": done.stderr} | {
        str(path.relative_to(tmp_path)): path.read_bytes().decode("utf-8", "replace")
        for folder in ("store", "project")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    }
    assert any("publish" in name and name.endswith(".jsonl") for name in written)  # the journal is among them
    leaks = [name for name, text in written.items() for secret in (TOKEN, "hf_of_another_hub") if secret in text]
    assert leaks == []
