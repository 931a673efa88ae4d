"""Local files on their way: read once, checked while they pass, and never whole when they have changed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._lfs import SliceFileObj

from hubforge.errors import PublishError
from hubforge.events import Event, Progress, silent
from hubforge.publish import _sending
from hubforge.publish._sending import Meter, WatchedFile, check_files, git_oid
from hubforge.publish.hub import push
from hubforge.publisher import Hub, Upload, UploadFile
from hubforge.reporters import progress_text
from tests.fixtures_publish import MakeUpload, digest

MIB = 1 << 20
DATA = bytes(range(256)) * 10_000  # 2.4 MiB, read from disk a MiB at a time


def file_of(tmp_path: Path, data: bytes = DATA, listed: bytes = DATA) -> UploadFile:
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    return UploadFile("weights.bin", path, len(listed), digest(listed))


def opened(file: UploadFile) -> WatchedFile:
    assert isinstance(file.content, Path)
    return WatchedFile(file, file.content)


def test_reading_gives_the_bytes_of_the_file(tmp_path: Path) -> None:
    with opened(file_of(tmp_path)) as reader:
        assert b"".join(iter(lambda: reader.read(10_000), b"")) == DATA
    with opened(file_of(tmp_path)) as reader:
        assert reader.read() == DATA


@pytest.mark.parametrize("place", [0, 2 * MIB - 1, 2 * MIB, len(DATA) - 1])
def test_the_end_of_a_changed_file_is_never_given(tmp_path: Path, place: int) -> None:
    changed = DATA[:place] + bytes([DATA[place] ^ 1]) + DATA[place + 1 :]
    given = b""
    with opened(file_of(tmp_path, changed)) as reader, pytest.raises(PublishError, match=r"weights\.bin is not what"):
        while part := reader.read(1 << 16):
            given += part
    assert len(given) == 2 * MIB


def test_a_file_that_grew_is_refused(tmp_path: Path) -> None:
    with opened(file_of(tmp_path, DATA + b"more")) as reader, pytest.raises(PublishError):
        reader.read()


def test_a_retry_from_the_front_and_reading_in_slices_are_checked_too(tmp_path: Path) -> None:
    with opened(file_of(tmp_path)) as reader:
        reader.read(MIB + 3000)
        reader.seek(0)
        assert reader.read(4000) + reader.read() == DATA
    changed = DATA[:-1] + b"x"
    with opened(file_of(tmp_path, changed)) as reader:
        for start in (0, MIB):
            with SliceFileObj(reader, start, MIB) as part:
                assert part.read(2 * MIB) == changed[start : start + MIB]
        with SliceFileObj(reader, 2 * MIB, MIB) as part, pytest.raises(PublishError):
            part.read(5000)


def test_the_git_oid_is_that_of_git(tmp_path: Path) -> None:
    # `printf hello | git hash-object --stdin`
    assert git_oid(UploadFile("a", b"hello", 5, digest(b"hello"))) == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    with pytest.raises(PublishError, match="is not what was made"):
        git_oid(file_of(tmp_path, b"other", b"hello"))


def test_the_meter_adds_up_threads_and_goes_back_on_a_retry() -> None:
    heard: list[Event] = []
    meter = Meter(4 << 20, heard.append, "publish.weights")
    meter.at("a", 1 << 20)
    meter.at("b", 2 << 20)
    meter.at("b", 0)
    meter.at("b", 3 << 20)
    assert [event.done for event in heard if isinstance(event, Progress)] == [size << 20 for size in (1, 3, 1, 4)]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ([UploadFile("a", b"1", 1, digest(b"2"))], "a is not what was made"),
        ([UploadFile("a", b"1", 2, digest(b"1"))], "a is not what was made"),
        ([UploadFile("a", Path("/nowhere/a"), 1, digest(b"1"))], "a cannot be read: No such file"),
        ([UploadFile("a", Path("/"), 4096, digest(b"1"))], "a is not what was made"),
        ([UploadFile("a", b"1", 1, digest(b"1"))] * 2, "a is in the upload twice"),
    ],
)
def test_what_cannot_be_published_is_found_before_anything_is_asked(files: list[UploadFile], fault: str) -> None:
    with pytest.raises(PublishError, match=fault):
        check_files(Upload("weights", "me/model", tuple(files), "m"))


@pytest.mark.parametrize("again", [False, True], ids=["first push", "unchanged"])
def test_a_large_file_is_read_once_to_be_sent_and_never_to_be_hashed(
    hub: Hub, make_upload: MakeUpload, monkeypatch: pytest.MonkeyPatch, lfs_transport: None, again: bool
) -> None:
    """Bytes read from the weights, by anybody in this process, through Python's file objects."""
    upload = make_upload({"model.safetensors": b"w" * 1_000_000})
    if again:
        push(upload, hub, silent)
    read = 0
    ours = _sending._WatchedBytes.readinto

    def counting(self: Any, buffer: Any) -> int | None:
        nonlocal read
        count = ours(self, buffer)
        read += count or 0
        return count

    opening = io.open

    def counting_open(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        """Any other way to read the weights counts as reading them whole; looking at the first bytes does not."""
        nonlocal read
        handle = opening(path, mode, *rest, **named)
        if str(path).endswith("model.safetensors") and "made" in str(path):
            whole = handle.read

            def reading(size: int = -1) -> bytes:
                nonlocal read
                data = whole(size)
                read += len(data)
                return data

            handle.read = reading
        return handle

    monkeypatch.setattr(_sending._WatchedBytes, "readinto", counting)
    monkeypatch.setattr("builtins.open", counting_open)
    monkeypatch.setattr(io, "open", counting_open)
    push(upload, hub, silent)
    assert read == (0 if again else 1_000_000)


def test_a_drip_is_a_stall_and_a_retry_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte a second never runs into the timeout of a single send: the reader sees when it is asked for more."""
    import httpx2

    now = 0.0
    monkeypatch.setattr("hubforge.publish._sending.time.monotonic", lambda: now)
    with opened(file_of(tmp_path)) as reader:
        reader.read(65536)
        now += 59
        reader.read(65536)
        now += 61
        with pytest.raises(httpx2.WriteTimeout, match="less than 64 KiB in 60 s"):
            reader.read(65536)
        reader.seek(0)
        now += 100
        assert reader.read() == DATA


def test_the_meter_tells_the_part_the_whole_and_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hubforge.publish._sending.time.monotonic", lambda: now)
    heard: list[Event] = []
    meter = Meter(300 * MIB, heard.append, "publish.weights", {"a": 100 * MIB, "b": 200 * MIB})
    for position in (0, 10, 20):
        meter.at("a", position * MIB, whole=True)
        now += 2
    *_, last = [event for event in heard if isinstance(event, Progress)]
    assert (last.done, last.total, last.part_done, last.part_total) == (20 * MIB, 300 * MIB, 20 * MIB, 100 * MIB)
    assert last.rate == 5 * MIB
    assert progress_text(last) == "a 21.0/104.9 MB, 21.0/314.6 MB in all, 5.2 MB/s, 56 s left"
