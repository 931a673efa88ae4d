"""Memory that is freed and asked for again: the same pages."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading
import numpy as np
from hubforge.tensors.allocator import keep_freed_memory

def work():
    for turn in range(23):
        if turn == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for block in [np.empty(3 << 20, np.uint8) for _ in range(5)]:
            block.fill(1)
        del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "kept":
    keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such thresholds")
def test_blocks_of_a_merge_do_not_take_fresh_pages_each_time():
    """In a process of its own: the thresholds stay raised."""

    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 20 * 5 * (3 << 20) // 4096
    assert faults("kept") < pages / 50
    assert faults("as it is") > pages / 50  # else this test shows nothing
