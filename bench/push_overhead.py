"""Seconds to push a large folder to the embedded Hub: hubforge, and the bare client's `upload_folder`.

    python bench/push_overhead.py [--size 2147483648] [--files 4] [--rounds 3]

Each round pushes fresh random bytes by both, in turns, to new repositories of one Hub in a process of its own, by LFS.
hubforge gets the digests as it does after a run (taken while the files were written); `upload_folder` computes them.
Also prints the seconds, requests and commits of pushing the same again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import disable_progress_bars

from hubforge.events import silent
from hubforge.hub import ensure_running, stop_running
from hubforge.op import Hub, Upload, UploadFile
from hubforge.publish.hub import push

_BLOCK = 16 << 20


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2 << 30, help="bytes in all")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; needs three times the size")
    asked = parser.parse_args()
    constants.HF_HUB_DISABLE_XET = True
    disable_progress_bars()
    ours, theirs, again = [], [], []
    sent = 0

    class Counting(httpx2.Client):
        def send(self, request: httpx2.Request, **options: object) -> httpx2.Response:
            nonlocal sent
            sent += 1
            return super().send(request, **options)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        root = Path(name)
        address = ensure_running(root / "hub")
        try:
            api, hub = HfApi(address, token="any"), Hub(address, "any")
            for number in range(asked.rounds):
                folder = root / f"files{number}"
                folder.mkdir()
                size = asked.size // asked.files
                files = []
                for index in range(asked.files):
                    path = folder / f"model-{index}.safetensors"
                    files.append(UploadFile(path.name, path, size, write_random(path, size)))
                upload = Upload("weights", f"local/ours{number}", tuple(files), "bench")

                def push_ours(upload: Upload = upload) -> None:
                    push(upload, hub, silent)

                def push_theirs(number: int = number, folder: Path = folder) -> None:
                    api.create_repo(f"local/theirs{number}")
                    api.upload_folder(repo_id=f"local/theirs{number}", folder_path=folder)

                for action, times in ((push_ours, ours), (push_theirs, theirs))[:: 1 if number % 2 else -1]:
                    start = time.perf_counter()
                    action()
                    times.append(time.perf_counter() - start)
                set_client_factory(Counting)
                sent, start = 0, time.perf_counter()
                push_ours()
                again.append(time.perf_counter() - start)
                commits = len(api.list_repo_commits(upload.repo)) - 1
                for path in folder.iterdir():
                    path.unlink()
                print(
                    f"round {number}: hubforge {ours[-1]:.2f} s, upload_folder {theirs[-1]:.2f} s;"
                    f" the same again {again[-1]:.3f} s, {sent - 1} requests, {commits} commit"
                )
        finally:
            stop_running(root / "hub")
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    print(
        f"{asked.size / 1e9:.2f} GB in {asked.files} files: hubforge / upload_folder = {ratio:.2f} (median of rounds)"
    )


if __name__ == "__main__":
    main()
