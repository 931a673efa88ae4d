"""Drawn schedules of faults over whole releases, and kills of the real command; each holds the same invariants.

    python -m tests.publish.schedules --faults 1000 --kills 100

What must hold, looked at after every single request that the Hub answered:
- what others see at main is nothing, or one whole release: of each repository;
- nobody sees a release in any repository before all repositories hold it, seen or not;
- what the recipe calls private is private.
And at the end: publish called it done, every file is there and verifies (downloaded and hashed), no release is twice in
a history, no pull request is left open, and no file was sent again once it had arrived.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from hubforge.errors import HubforgeError
from hubforge.events import silent
from hubforge.hub import HubSettings
from hubforge.hub.refusal import Refusal
from hubforge.hub.storage.discussions import numbers, read
from hubforge.hub.storage.repository import PULLS
from hubforge.hub.storage.shelf import Shelf
from hubforge.publish._journal import Journal
from hubforge.publish._release import publish_release
from hubforge.publish._sums import sums_text
from hubforge.publisher import Hub, Upload, UploadFile
from hubforge.release import FILE_NAME, SUMS_NAME, File, Release, TargetRecord
from hubforge.verify import verify
from tests.publish.faulty import Fault, FaultyHub

TOKEN = "hf_secretsecretsecretsecret"
SETTINGS = HubSettings(tokens={TOKEN: "me"}, lfs_from=2000, multipart_from=9000, part_size=4000)
FAULTS: tuple[Fault, ...] = (
    "reset", "deaf", "spoilt", "lost", "lost", "cut", "drip", "lie", 429, 500, 502, 503, 504, 412,
)  # fmt: skip
RATE, DEATH, HARD = 0.12, 0.006, 8  # shares of requests that fail, or kill; and for how many attempts
Files = dict[str, str]  # path -> sha256


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_release(version: int, root: Path) -> list[Upload]:
    """Three repositories, one of them private: weights (one file in parts), small files, and one that comes or goes."""
    uploads = []
    for repo in ("me/one", "me/two", "me/closed"):
        contents: dict[str, bytes] = {
            "README.md": b"---\nlicense: mit\n---\n# %d\n" % version,
            "config.json": b'{"version": %d}' % version,
            "model.safetensors": repo.encode() * 400 + bytes([version]) * 100,
            "large.safetensors": repo.encode() * 1500 + bytes([version]),
            f"only-in-{version}.json": b"{}",
        }
        files = []
        for path, data in contents.items():
            place = root / str(version) / repo / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.write_bytes(data)
            files.append(UploadFile(path, place if path.endswith("s") else data, len(data), sha256(data)))
        target = TargetRecord(
            name=repo[3:],
            kind="model",
            repo=repo,
            files=tuple(File(path=one.path, size=one.size, sha256=one.sha256) for one in files),
        )
        record = Release(
            hubforge="0", name="t", license="mit", recipe_file="t.yaml", recipe="name: t\n", targets=(target,),
            target=target.name,
        )  # fmt: skip
        for path, data in (
            (FILE_NAME, record.model_dump_json(indent=1).encode()),
            (SUMS_NAME, b""),
        ):
            data = data or sums_text(files).encode()
            files.append(UploadFile(path, data, len(data), sha256(data)))
        closed = repo == "me/closed"
        uploads.append(Upload(target.name, repo, tuple(files), f"Publish {version}", tag=f"v{version}", private=closed))
    return uploads


class Broken(AssertionError):
    """An invariant did not hold."""


class Killed(BaseException):
    """In place of kill -9, within one process: nothing of ours may catch it."""


Whole = dict[str, list[dict[str, tuple[str, ...]]]]  # by repository, of each release: path -> etags it may have


def whole_of(releases: Sequence[Sequence[Upload]]) -> Whole:
    found: Whole = {}
    for release in releases:
        for upload in release:
            found.setdefault(upload.repo, []).append({one.path: (one.sha256, _blob(one)) for one in upload.files})
    return found


@dataclass
class Watcher:
    """Looks at the Hub's folder, as one who may see everything."""

    folder: Path
    whole: Whole
    private: frozenset[str]
    broken: list[str] = field(default_factory=list)
    uploads: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)  # sha256 -> times that it arrived and nobody was told

    def __post_init__(self) -> None:
        self.held: dict[str, set[int]] = {id: set() for id in self.whole}  # seen or not, now or before

    def _is(self, repo: str, index: int, tree: Any) -> bool:
        wanted = self.whole[repo][index]
        held = {path: entry for path, entry in tree.files.items() if path != ".gitattributes"}
        return held.keys() == wanted.keys() and all(held[path].etag in wanted[path] for path in held)

    def _which(self, repo: str, tree: Any) -> set[int]:
        return {index for index in range(len(self.whole[repo])) if self._is(repo, index, tree)}

    def look(self, method: str, path: str, fault: Fault | None) -> None:
        """After a request."""
        if method in ("GET", "HEAD"):
            return
        if "/_lfs/" in path and fault in ("lost", "cut"):
            self.unanswered[_object(path)[2]] += 1
        try:
            self._look(f"{method} {path[:60]} ({fault})")
        except Exception as error:  # in the server's thread: told at the end
            self.broken.append(f"{type(error).__name__}: {error}")

    def arrives(self, method: str, path: str) -> None:
        """Before a request: what is stored must not be sent again, but where the sender was never told."""
        if method == "PUT" and "/_lfs/" in path:
            kind, id, oid = _object(path)
            self.uploads += 1
            if Shelf(self.folder).get(kind, id).objects.lfs_size(oid) is not None and not self.unanswered[oid]:
                self.broken.append(f"{oid[:8]} of {id} is sent again, although it is stored")

    def _look(self, after: str) -> None:
        shelf = Shelf(self.folder)
        shown: dict[str, int] = {}
        for id in self.whole:
            try:
                repo = shelf.get("models", id)
            except Refusal:  # not made yet
                continue
            refs = repo.refs()
            main = repo.tree(repo.commit(refs["refs/heads/main"]))
            trees = [repo.tree(repo.commit(refs[ref])) for ref in refs if ref.startswith(PULLS)]
            for tree in (main, *trees):
                self.held[id] |= self._which(id, tree)
            if id in self.private:
                if not repo.private:
                    self.broken.append(f"{id} is public after {after}")
                continue
            if repo.private or set(main.files) <= {".gitattributes"}:
                continue
            found = self._which(id, main)
            if not found:
                self.broken.append(f"{id} shows part of a release after {after}: {sorted(main.files)}")
            shown[id] = min(found, default=-1)
        self.broken += [
            f"{id} shows release {index} after {after}, but {other} does not hold it"
            for id, index in shown.items()
            for other in self.whole
            if index not in self.held[other]
        ]

    def check_end(self, hub: Hub, index: int) -> None:
        """The end of a schedule: the last release is what everybody sees, once."""
        shelf = Shelf(self.folder)
        for id in self.whole:
            repo = shelf.get("models", id)
            refs = repo.refs()
            history = list(repo.history(repo.commit(refs["refs/heads/main"])))
            if not self._is(id, index, repo.tree(history[0])):
                self.broken.append(f"{id} does not hold the last release at the end")
            times = Counter(commit.tree for commit in history)
            if max(times.values()) > 1:
                self.broken.append(f"{id}: a commit twice: {[commit.title for commit in history]}")
            if repo.private != (id in self.private):
                self.broken.append(f"{id} is {'private' if repo.private else 'public'} at the end")
            left = [number for number in numbers(repo) if read(repo, number)["status"] in ("open", "draft")]
            if left:
                self.broken.append(f"{id}: pull requests left open: {left}")
            verify(id, hub, revision=f"v{index}", deep=True)
        if self.broken:
            raise Broken("\n  ".join(self.broken[:5]))


def _object(path: str) -> tuple[Any, str, str]:
    """Kind, repository and sha256 that an upload address is for."""
    payload = path.partition("/_lfs/")[2].partition("/")[0].partition(".")[0]
    grant = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return grant["kind"], grant["id"], grant["oid"]


def _blob(file: UploadFile) -> str:
    data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Dying(httpx2.Client):
    """The client's connection, which may be the last thing that its process did."""

    def __init__(self, dies: Callable[[], bool]) -> None:
        super().__init__(follow_redirects=True, verify=False)  # loading certificates takes longer than a schedule
        self.dies = dies

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        if request.url.host != "127.0.0.1":
            return httpx2.Response(404, request=request)
        if self.dies():
            raise Killed
        response = super().send(request, **options)
        if self.dies():
            raise Killed
        return response


def run_schedule(seed: int, root: Path) -> dict[str, int]:
    """Three releases, one after the other, while requests fail and publishers die as the seed says; raises Broken.

    The second may be given up in the middle for the third. Returns how often what happened.
    """
    draw = random.Random(seed)
    releases = [make_release(version, root / "files") for version in range(3)]
    private = frozenset(upload.repo for upload in releases[0] if upload.private)
    watcher = Watcher(root / "hub", whole_of(releases), private)
    counts: Counter[str] = Counter()
    guard = threading.Lock()
    state = {"rate": 0.0, "death": 0.0}

    def fault(method: str, path: str) -> Fault | None:
        watcher.arrives(method, path)
        with guard:
            return draw.choice(FAULTS) if draw.random() < state["rate"] else None

    def dies() -> bool:
        with guard:
            return draw.random() < state["death"]

    with FaultyHub(root / "hub", SETTINGS, fault, watch=watcher.look) as server:
        hub = Hub(server.endpoint, TOKEN, name="faulty")
        set_client_factory(lambda: _Dying(dies))
        try:
            for index, release in enumerate(releases):
                gives_up = index == 1 and draw.random() < 0.5
                for attempt in range(40):
                    hard = attempt < HARD
                    state.update(rate=RATE if hard else 0.0, death=DEATH if hard else 0.0)
                    counts["attempts"] += 1
                    try:
                        publish_release(release, hub, silent, Journal(root / "journal.jsonl", hub))
                        break
                    except HubforgeError as error:
                        counts[type(error).__name__] += 1
                    except Killed:
                        counts["killed"] += 1
                        _tear(root / "journal.jsonl", draw)
                    finally:
                        state.update(rate=0.0, death=0.0)
                    if gives_up and attempt == 2:
                        break
                else:
                    raise Broken("did not converge in 40 attempts")
            # Once more, in peace: it finds all done, and what a fault kept it from tidying up.
            commits = sum(path.endswith("/commit/main") for _, path, _ in server.seen)
            publish_release(releases[2], hub, silent, Journal(root / "journal.jsonl", hub))
            if sum(path.endswith("/commit/main") for _, path, _ in server.seen) != commits:
                raise Broken("a publish that had nothing to do made a commit")
            watcher.check_end(hub, 2)
        finally:
            set_client_factory(default_client_factory)
        counts["uploads"] += watcher.uploads
        counts["requests"] += len(server.seen)
        counts["faults"] += sum(one[2] is not None for one in server.seen)
    return dict(counts)


def _tear(journal: Path, draw: random.Random) -> None:
    """Power loss may leave the last line half written: an outcome, since after an intent nothing is done before it is
    on disk."""
    data = journal.read_bytes() if journal.exists() else b""
    if data and draw.random() < 0.3 and b'"state": "intent"' not in data.splitlines()[-1]:
        journal.write_bytes(data[: len(data) - draw.randrange(1, 40)])


def run_many(seeds: Sequence[int], *, quiet: bool = False) -> Counter[str]:
    """Every schedule in a folder of its own; Broken names the seed."""
    totals: Counter[str] = Counter()
    for number, seed in enumerate(seeds, 1):
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            try:
                totals.update(run_schedule(seed, Path(folder)))
            except Exception as error:
                totals["broken"] += 1
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        if not quiet and number % 50 == 0:
            print(f"{number} schedules: {dict(totals)}", flush=True)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000, help="schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kills", type=int, default=0, help="moments of kill -9")
    options = parser.parse_args()
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET = True
    totals: Counter[str] = Counter()
    if options.faults:
        from hubforge.publish import _retry

        sleeping = time.sleep
        _retry.time.sleep = lambda seconds: sleeping(min(seconds, 0.001))
        totals = run_many(range(options.first, options.first + options.faults))
        _retry.time.sleep = sleeping
        print(f"{options.faults} schedules of faults: {totals['broken']} broken; {dict(totals)}")
    if options.kills:
        from tests.publish.kills import run_kills

        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            found = run_kills(options.kills, Path(folder), options.first)
        print(f"{options.kills} moments of kill -9: {found['broken']} broken; {dict(found)}")
        totals["broken"] += found["broken"]
    sys.exit(bool(totals["broken"]))


if __name__ == "__main__":
    main()
