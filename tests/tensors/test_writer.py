"""The checksum by which a killed run's pieces are known again."""

from __future__ import annotations

import random

from hubforge.tensors.writer import checksum


def test_a_checksum_does_not_depend_on_how_the_bytes_come():
    data = random.Random(0).randbytes(1001)
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    for cuts in ([], [1], [3, 5, 6], [8, 500], [997], list(range(1, 1001, 7))):
        total = 0
        for first, last in zip([0, *cuts], [*cuts, len(data)], strict=True):
            total = checksum(memoryview(data)[first:last], first, total)
        assert total == sum(words) % 2**64


def test_a_checksum_tells_a_write_that_left_zeros():
    data = random.Random(1).randbytes(8192)
    torn = data[:4096] + bytes(4096)
    assert checksum(memoryview(torn), 0) != checksum(memoryview(data), 0)
