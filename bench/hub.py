"""Load the embedded Hub: many clients pushing and pulling at once, and one large upload. Prints a table.

usage: hub.py [--clients 64] [--seconds 120] [--upload 10] [--folder DIR]

The clients are the real one, in threads of a few processes, on shared repositories: each commits a small file and a
large one, and downloads a file somebody pushed, whose sha256 is checked. Afterwards every acknowledged commit must be
in the history, and every stored file be what its name says. The upload is --upload GB (10**9 bytes) in one file.
Memory is the server's own resident memory, from /proc (Linux only).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOS = 8  # Shared by all clients, so that they meet.
MB = 10**6


class Server:
    """The Hub in a process of its own, watched."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "hubforge.hub", str(folder), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.endpoint = self.process.stdout.readline().strip()
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def memory(self, key: str = "VmRSS") -> float:
        """MB. VmHWM is the most there ever was."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / MB

    def cpu(self) -> float:
        """Seconds of processor time."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.samples.append(self.memory())

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.process.terminate()
        self.process.wait(10)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()


def work(endpoint: str, first: int, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients in threads of this process: what they did, and every commit that was acknowledged."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars, get_session  # type: ignore[attr-defined]

    disable_progress_bars()
    done: dict[str, Any] = {"pushed": 0, "pulled": 0, "bytes": 0, "errors": [], "commits": [], "waits": []}
    pushed: list[tuple[str, str, str]] = []  # (repository, path, sha256)
    guard = threading.Lock()
    until = time.monotonic() + seconds

    def client(number: int) -> None:
        chance, api, round = random.Random(number), HfApi(endpoint=endpoint, token="x"), 0
        while time.monotonic() < until:
            round += 1
            # Few names: trees stop growing, so that memory can be seen to.
            repo, path = f"load/repo{chance.randrange(REPOS)}", f"c{number}/{round % 2}.bin"
            data = chance.randbytes(chance.randrange(1_000, 400_000))
            adds = [CommitOperationAdd(path, data), CommitOperationAdd(f"c{number}/note.txt", str(round).encode())]
            try:
                begun = time.monotonic()
                oid = api.create_commit(repo, adds, commit_message=f"{number}:{round}").oid
                waited = time.monotonic() - begun
                with guard:
                    pushed.append((f"{repo}/resolve/{oid}/{path}", path, hashlib.sha256(data).hexdigest()))
                    done["pushed"] += 1
                    done["bytes"] += len(data)
                    done["commits"].append([repo, oid])
                    done["waits"].append(waited)
                    address, _, sha256 = chance.choice(pushed)
                got = get_session().get(f"{endpoint}/{address}")
                if got.status_code != 200 or hashlib.sha256(got.content).hexdigest() != sha256:
                    raise ValueError(f"{address}: HTTP {got.status_code}, or other bytes")
                with guard:
                    done["pulled"] += 1
                    done["bytes"] += len(got.content)
            except Exception as error:
                with guard:
                    done["errors"].append(f"{type(error).__name__}: {str(error)[:200]}")

    threads = [threading.Thread(target=client, args=(first + number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def check(folder: Path, commits: list[tuple[str, str]]) -> tuple[int, int]:
    """Acknowledged commits that are lost, and stored files that are not what their name says."""
    from hubforge.hub.storage.gitids import blob_id
    from hubforge.hub.storage.shelf import Shelf

    lost = torn = 0
    for number in range(REPOS):
        name = f"load/repo{number}"
        repo = Shelf(folder).get("models", name)
        history = list(repo.history(repo.find("main")))
        lost += len({oid for each, oid in commits if each == name} - {commit.id for commit in history})
        seen: set[str] = set()
        for commit in history:
            for entry in repo.tree(commit).files.values():
                if entry.etag in seen:
                    continue
                seen.add(entry.etag)
                data = repo.path_of(entry).read_bytes() if repo.path_of(entry).exists() else b""
                torn += entry.etag != (hashlib.sha256(data).hexdigest() if entry.sha256 else blob_id(data))
    return lost, torn


def many_clients(folder: Path, clients: int, seconds: float, processes: int) -> dict[str, Any]:
    from huggingface_hub import HfApi

    with serving(folder) as server:
        for number in range(REPOS):
            HfApi(endpoint=server.endpoint, token="x").create_repo(f"load/repo{number}")
        idle, cpu = server.memory(), server.cpu()
        server.samples.clear()
        share = [clients // processes + (number < clients % processes) for number in range(processes)]
        workers = []
        for number, each in enumerate(share):
            options = [server.endpoint, str(sum(share[:number])), str(each), str(seconds)]
            command = [sys.executable, __file__, "--work", *options]
            workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        found = [json.loads(worker.communicate()[0]) for worker in workers]
        samples, cpu = list(server.samples), server.cpu() - cpu
    commits = [(repo, oid) for each in found for repo, oid in each["commits"]]
    lost, torn = check(folder, commits)
    waits = sorted(wait for each in found for wait in each["waits"])
    errors = [error for each in found for error in each["errors"]]
    if not commits or any(worker.returncode for worker in workers):
        errors.append("a process of clients failed, or pushed nothing")
    # The first fifth is warming up: caches fill, threads start. Flat: what the last two fifths have over the second.
    fifth = max(1, len(samples) // 5)

    def mean(part: list[float]) -> float:
        return sum(part) / max(1, len(part))

    return {
        "clients": f"{clients} in {processes} processes, {seconds:g} s",
        "pushes, pulls": f"{len(commits)}, {sum(each['pulled'] for each in found)}",
        "moved": f"{sum(each['bytes'] for each in found) / MB:.0f} MB",
        "errors": f"{len(errors)}" + (f" ({errors[0]})" if errors else ""),
        "lost commits, torn files": f"{lost}, {torn}",
        "time of a push, median and 99 %": f"{waits[len(waits) // 2]:.2f} s, {waits[int(len(waits) * 0.99)]:.2f} s"
        if waits
        else "-",
        "server: processor time": f"{cpu:.1f} s",
        "server: memory idle, peak": f"{idle:.0f} MB, {max(samples, default=0):.0f} MB",
        "server: memory second fifth, last fifth": (
            f"{mean(samples[fifth : 2 * fifth]):.0f} MB, {mean(samples[-fifth:]):.0f} MB"
        ),
    }


def large_upload(folder: Path, gigabytes: float) -> dict[str, Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    size = int(gigabytes * 10**9)
    path = folder.parent / "large.safetensors"
    block = random.Random(0).randbytes(16 * MB)
    with path.open("wb") as handle:
        for start in range(0, size, len(block)):
            handle.write(block[: size - start])
    with serving(folder) as server:
        api = HfApi(endpoint=server.endpoint, token="x")
        api.create_repo("load/large")
        idle = server.memory()
        server.samples.clear()
        begun = time.monotonic()
        api.upload_file(path_or_fileobj=path, path_in_repo="large.safetensors", repo_id="load/large")
        up, peak = time.monotonic() - begun, max(server.samples, default=server.memory())
        server.samples.clear()
        begun = time.monotonic()
        api.hf_hub_download("load/large", "large.safetensors", local_dir=folder.parent / "down")
        down, peak_down = time.monotonic() - begun, max(server.samples, default=server.memory())
    return {
        "upload": f"{gigabytes:g} GB in {up:.1f} s (the client's hashing included), {size / MB / up:.0f} MB/s",
        "download": f"{down:.1f} s, {size / MB / down:.0f} MB/s",
        "server: memory idle, peak up, peak down": f"{idle:.0f} MB, {peak:.0f} MB, {peak_down:.0f} MB",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--processes", type=int, default=4, help="that the clients' threads are spread over")
    parser.add_argument("--upload", type=float, default=10, help="GB; 0: none")
    parser.add_argument("--folder", type=Path, help="where to work; needs three times the upload. Default: temporary")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # Read when the client is imported.
    if options.work:
        endpoint, first, clients, seconds = options.work
        print(json.dumps(work(endpoint, int(first), int(clients), float(seconds))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="hub-bench-") as folder:
        rows: dict[str, Any] = {}
        if options.clients:
            rows |= many_clients(Path(folder) / "many", options.clients, options.seconds, options.processes)
        if options.upload:
            rows |= large_upload(Path(folder) / "large", options.upload)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    if rows.get("errors", "0") != "0" or rows.get("lost commits, torn files", "0, 0") != "0, 0":
        sys.exit(1)


if __name__ == "__main__":
    main()
