"""Seconds to publish a large folder to the embedded Hub: hubforge, staged, and the bare client's `upload_folder`.

    python bench/push_overhead.py [--size 2147483648] [--files 4] [--rounds 3]

Each round publishes fresh random bytes by both, in turns, to repositories of one Hub in a process of its own, by LFS.
Ours is the whole staged flow with its journal: to a new repository (hidden, verified, opened), and to one that exists
(pull request, verified, merged; by the client: `upload_folder` again). hubforge has the digests as it has after a run,
taken while the files were written; `upload_folder` computes them. Reads counts how often each byte of the weights was
read by our process (rchar of /proc; Linux only). At the end: publishing five repositories to which nothing changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import disable_progress_bars

from hubforge.events import silent
from hubforge.hub import ensure_running, stop_running
from hubforge.publish._journal import Journal
from hubforge.publish._release import publish_release
from hubforge.publisher import Hub, Upload, UploadFile

_BLOCK = 16 << 20
_REPOSITORIES = 5  # of the publish that changes nothing


def write_random(path: Path, size: int) -> str:
    """Fill a file with random bytes; its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as handle:
        while size > 0:
            block = os.urandom(min(_BLOCK, size))
            digest.update(block)
            handle.write(block)
            size -= len(block)
    return digest.hexdigest()


def bytes_read() -> int:
    """What this process has read from anything so far."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1])
    except OSError:
        return 0


class Counting(httpx2.Client):
    """The client's connection, counting what is sent."""

    sent = 0

    def send(self, request: httpx2.Request, **options: object) -> httpx2.Response:
        Counting.sent += 1
        return super().send(request, **options)  # type: ignore[arg-type]


def make_upload(folder: Path, repo: str, size: int, files: int) -> Upload:
    folder.mkdir()
    listed = []
    for index in range(files):
        path = folder / f"model-{index}.safetensors"
        digest = write_random(path, size // files)
        listed.append(UploadFile(path.name, path, size // files, digest))
    return Upload("weights", repo, tuple(listed), "bench")


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2 << 30, help="bytes in all")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; needs three times the size")
    asked = parser.parse_args()
    constants.HF_HUB_DISABLE_XET = True
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        root = Path(name)
        address = ensure_running(root / "hub")
        try:
            measure(asked, root, address)
        finally:
            stop_running(root / "hub")


def measure(asked: argparse.Namespace, root: Path, address: str) -> None:
    api, hub = HfApi(address, token="any"), Hub(address, "any")
    ratios: dict[str, list[float]] = {"new": [], "existing": []}
    for number in range(asked.rounds):
        for state in ("new", "existing"):
            folder = root / "files"
            upload = make_upload(folder, f"local/ours{number}", asked.size, asked.files)
            theirs = f"local/theirs{number}"
            reads = 0

            def push_ours(upload: Upload = upload) -> None:
                nonlocal reads
                before = bytes_read()
                publish_release([upload], hub, silent, Journal(root / "journal.jsonl", hub))
                reads = bytes_read() - before

            def push_theirs(folder: Path = folder, theirs: str = theirs) -> None:
                api.create_repo(theirs, exist_ok=True)
                api.upload_folder(repo_id=theirs, folder_path=folder)

            actions = [push_ours, push_theirs][:: 1 if number % 2 else -1]
            seconds = {action: timed(action) for action in actions}
            ratio = seconds[push_ours] / seconds[push_theirs]
            ratios[state].append(ratio)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            print(
                f"round {number}, {state} repository: hubforge {seconds[push_ours]:.2f} s, upload_folder"
                f" {seconds[push_theirs]:.2f} s, ratio {ratio:.2f}; each byte read {reads / asked.size:.2f} times"
            )
    for state, found in ratios.items():
        print(
            f"{asked.size / 1e9:.2f} GB in {asked.files} files to a repository that is {state}:"
            f" hubforge / upload_folder = {statistics.median(found):.2f} (median of {len(found)})"
        )
    unchanged(root, hub, api)


def unchanged(root: Path, hub: Hub, api: HfApi) -> None:
    """Five repositories, tagged, of 20 files each; published, and then published again."""
    uploads = []
    for number in range(_REPOSITORIES):
        contents = {f"file-{index}.json": b'{"index": %d}' % index for index in range(19)} | {"w.bin": bytes(12 << 20)}
        files = tuple(UploadFile(p, c, len(c), hashlib.sha256(c).hexdigest()) for p, c in contents.items())
        uploads.append(Upload(f"t{number}", f"local/same{number}", files, "bench", tag="v1"))
    journal = root / "again.jsonl"
    publish_release(uploads, hub, silent, Journal(journal, hub))
    set_client_factory(Counting)
    Counting.sent = 0
    seconds = timed(lambda: publish_release(uploads, hub, silent, Journal(journal, hub)))
    sent = Counting.sent
    commits = max(len(api.list_repo_commits(upload.repo)) for upload in uploads)
    print(
        f"{_REPOSITORIES} repositories to which nothing changed: {seconds:.2f} s, {sent} requests"
        f" ({sent / _REPOSITORIES:.1f} each), {commits - 2} new commits"
    )


if __name__ == "__main__":
    main()
