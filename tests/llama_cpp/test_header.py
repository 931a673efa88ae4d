"""Headers of GGUF files: what they say is read, and what cannot be true is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubforge.errors import SourceError
from hubforge.llama_cpp.header import LongArray, read_header


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(*, tensors: list[tuple[str, tuple[int, ...], int, int]], data: int, version: int = 3) -> bytes:
    """A GGUF with a name, a flag, three numbers and 100 words, the given tensors, and `data` bytes of zeros."""
    fields = [
        string("general.name") + struct.pack("<I", 8) + string("été"),
        string("flag") + struct.pack("<IB", 7, 1),
        string("numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 0.5),
        string("words") + struct.pack("<IIQ", 9, 8, 100) + string("ab") * 100,
    ]
    infos = [
        string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)
        for name, shape, kind, at in tensors
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


# A row of 256 weights is 210 bytes of Q6_K; 4 floats are 16 bytes, the second tensor starting at the next 32.
TENSORS = [("a.weight", (256, 2), 14, 0), ("b.bias", (4,), 0, 448)]


def write(folder: Path, content: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(content)
    return path


def test_reads_metadata_and_tensors(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, gguf(tensors=TENSORS, data=464)))
    assert header.metadata == {
        "general.name": "été",
        "flag": True,
        "numbers": [1.0, 2.0, 0.5],
        "words": LongArray(100),
    }
    assert [(one.name, one.type, one.shape, one.size) for one in header.tensors] == [
        ("a.weight", "Q6_K", (256, 2), 420),
        ("b.bias", "F32", (4,), 16),
    ]
    assert header.parameters == 516
    assert header.bits_per_weight == pytest.approx(8 * (420 + 16) / 516)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4" + bytes(64), "not a GGUF file"),
        (gguf(tensors=TENSORS, data=464, version=1), "GGUF version 1"),
        (gguf(tensors=TENSORS, data=463), "'b.bias' ends at byte"),
        (gguf(tensors=[("a", (256,), 99, 0)], data=464), "unknown type 99"),
        (gguf(tensors=[("a", (255,), 14, 0)], data=464), "rows of 'a' are 255 long, which Q6_K cannot be"),
        (gguf(tensors=[("a", (1, 1, 1, 1, 1), 0, 0)], data=464), "5 dimensions"),
        (gguf(tensors=[("a", (4,), 0, 0)] * 2, data=464), "the tensor 'a' twice"),
        (gguf(tensors=[("a", (2**62, 2**62), 0, 0)], data=464), "'a' ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "a metadata key: 9223372036854775808 bytes wanted, 0 left"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "ends within a tensor name"),
    ],
    ids=["empty", "a-zip", "version", "cut", "type", "rows", "dimensions", "twice", "overflow", "string", "count"],
)
def test_refuses_what_cannot_be_true(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_header(write(tmp_path, content))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(0, len(gguf(tensors=TENSORS, data=464)) - 1))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(SourceError):
        read_header(write(tmp_path, gguf(tensors=TENSORS, data=464)[:cut]))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, len(gguf(tensors=TENSORS, data=0)) - 1), byte=st.integers(0, 255))
def test_one_wrong_byte_is_read_or_refused_but_never_crashes(tmp_path: Path, at: int, byte: int) -> None:
    content = bytearray(gguf(tensors=TENSORS, data=464))
    content[at] = byte
    try:
        header = read_header(write(tmp_path, bytes(content)))
    except SourceError:
        return
    assert all(tensor.offset + tensor.size <= len(content) for tensor in header.tensors)
