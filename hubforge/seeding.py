"""The generators of the process, for libraries that draw from them: seeded for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def repeatable(seed: int, device: str) -> Iterator[None]:
    """Python's, NumPy's and torch's generators start from `seed`, and afterwards are as they were."""
    import random

    import numpy as np
    import torch

    state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        if device.startswith("cuda:"):
            stack.enter_context(torch.cuda.device(device))  # The trainer takes the current one.
        # Of this GPU alone: those of the others may belong to other processes.
        own = [torch.cuda.current_device()] if device.startswith("cuda") else []
        stack.enter_context(torch.random.fork_rng(devices=own))
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
