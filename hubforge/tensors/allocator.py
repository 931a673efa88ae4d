"""What the C library does with freed memory."""


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory rather than return it to the kernel.

    A merge frees a block's temporaries only to ask for as much again: a million fresh pages, and a fifth of the time of
    an `apply` to 1.2 B parameters. Freeing one block of nearly 32 MB raises the allocator's thresholds (mallopt(3),
    M_MMAP_THRESHOLD); one that exceeds 32 MB with what numpy and glibc add to it changes nothing. Elsewhere it does
    nothing.
    """
    import numpy as np

    np.empty(30 << 20, np.uint8)
