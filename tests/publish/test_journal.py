"""The journal: on disk before the action, torn lines passed over, no secrets, one publish at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hubforge.errors import StoreError
from hubforge.publish._explain import HubError
from hubforge.publish._journal import Journal, journal_path, read_journal
from hubforge.publisher import Hub

HUB = Hub("http://127.0.0.1:8000", "hf_secretsecretsecret")


def lines(path: Path) -> list[tuple[str, str]]:
    return [(entry["action"], entry["state"]) for entry in read_journal(path)]


def test_an_intent_is_there_before_the_action_and_the_outcome_after(tmp_path: Path) -> None:
    path = tmp_path / "a" / "journal.jsonl"
    journal = Journal(path, HUB)
    with journal.doing("merge", "me/x", number=3) as found:
        assert lines(path) == [("merge", "intent")]
        found["commit"] = "c" * 40
    assert lines(path) == [("merge", "intent"), ("merge", "done")]
    assert read_journal(path)[1]["commit"] == "c" * 40
    with pytest.raises(HubError), journal.doing("tag", "me/x"):
        raise HubError("refused", status=403)
    with pytest.raises(KeyboardInterrupt), journal.doing("open", "me/x"):
        raise KeyboardInterrupt
    assert lines(path)[2:] == [("tag", "intent"), ("tag", "failed"), ("open", "intent")]


def test_a_torn_line_is_passed_over_and_the_next_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, HUB).record("create", "me/x", "intent", hidden=True)
    with path.open("ab") as handle:
        handle.write(b'{"action": "create", "state": "do')
    journal = Journal(path, HUB)
    assert [entry["state"] for entry in journal.entries] == ["intent"] and journal.is_hidden_by_us("me/x")
    journal.record("open", "me/x", "done")
    assert lines(path) == [("create", "intent"), ("open", "done")]
    assert not Journal(path, HUB).is_hidden_by_us("me/x")


@pytest.mark.parametrize(
    ("failure", "ours"),
    [
        (HubError("no", status=403), False),
        (HubError("gone", trouble="dropped"), True),
        (HubError("?", trouble="nonsense"), True),
        (HubError("late", status=504), True),
    ],
    ids=["refused", "dropped", "nonsense", "gateway"],
)
def test_a_repository_is_ours_to_open_unless_it_surely_was_not_made(failure: HubError, ours: bool) -> None:
    journal = Journal(None, HUB)
    with pytest.raises(HubError), journal.doing("create", "me/x", hidden=True):
        raise failure
    assert journal.is_hidden_by_us("me/x") is ours


def test_pull_requests_that_are_ours_and_open() -> None:
    journal = Journal(None, HUB)
    for number in (1, 2, 3):
        with journal.doing("propose", "me/x", title=f"v{number}") as found:
            found["number"] = number
    journal.record("merge", "me/x", "intent", number=1)
    journal.record("merge", "me/x", "done", number=1)
    journal.record("close", "me/x", "failed", number=2)
    assert journal.pulls("me/x") == {2, 3} and journal.pulls("me/y") == set()
    assert journal.titles("me/x") == {"v1", "v2", "v3"}


def test_tokens_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, HUB)
    with pytest.raises(HubError), journal.doing("tag", "me/x"):
        raise HubError(f"the proxy says Bearer {HUB.token}")
    assert HUB.token not in path.read_text() and "Bearer ***" in path.read_text()


def test_a_full_disk_stops_the_action_before_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hubforge.publish._journal.os.fsync", full)
    done: list[int] = []
    journal = Journal(tmp_path / "journal.jsonl", HUB)
    with (
        pytest.raises(StoreError, match="journal of this publish cannot be written: No space left on device"),
        journal.doing("merge", "me/x"),
    ):
        done.append(1)
    assert done == []


def test_each_recipe_and_hub_has_its_own_and_a_hub_with_a_name_keeps_it() -> None:
    root = Path("/store")
    one = journal_path(root, "poet", Hub("https://huggingface.co"))
    assert one.parent == root / "publish" / "poet" and one.name.startswith("huggingface.co-")
    assert one != journal_path(root, "poet", Hub("https://hub.example"))
    local = [journal_path(root, "poet", Hub(f"http://127.0.0.1:{port}", name="local")) for port in (1, 2)]
    assert local[0] == local[1]


_HOLD = """
import sys, time
from pathlib import Path
from hubforge.publisher import Hub
from hubforge.publish._journal import Journal
with Journal(Path(sys.argv[1]), Hub("http://x")).held(1, print) as journal:
    print("held", flush=True)
    sys.stdin.read()
    journal.record("release", "", "done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_second_publish_waits_for_the_first_and_reads_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "held\n"
    with (
        pytest.raises(StoreError, match="another publish of this recipe has been under way"),
        Journal(path, HUB).held(0, lambda text: None),
    ):
        pass
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        other.stdin.close()  # type: ignore[union-attr]

    with Journal(path, HUB).held(60, tell) as journal:
        assert [entry["action"] for entry in journal.entries] == ["release"]
    assert told == ["another publish of this recipe is under way; waiting for it to end"] and other.wait(10) == 0


def test_a_long_journal_with_nothing_unfinished_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubforge.publish._journal._LONG", 10)
    path = tmp_path / "journal.jsonl"
    Journal(path, HUB).record("release", "", "intent")
    with Journal(path, HUB).held(1, lambda text: None):
        assert path.exists()
    Journal(path, HUB).record("release", "", "done")
    with Journal(path, HUB).held(1, lambda text: None) as journal:
        assert not path.exists() and len(journal.entries) == 2  # what it said still counts
    assert json.loads((tmp_path / "journal.old.jsonl").read_text().splitlines()[0])["action"] == "release"
