"""Random numbers that belong to elements: the same whatever the blocks, threads, shards or order of the work.

A number is a function of the seed, of the names of what is drawn for (a tensor, the place of a model in a list) and of
the element's index; no state goes from one draw to the next. The function is Philox 4x64-10 (Salmon et al. 2011,
doi:10.1145/2063384.2063405) as numpy has it, whose streams numpy promises to keep from version to version.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LANES = 8  # numbers of 32 bits that one value of the counter gives


def uniform(seed: int, names: tuple[str | int, ...], first: int, count: int) -> Tensor:
    """Numbers in [0, 1) of elements [first, first + count): float32, (count,), each a multiple of 2⁻²⁴."""
    import numpy as np
    import torch

    block, skipped = divmod(first, _LANES)
    raw = np.random.Philox(key=_key(seed, names), counter=block).random_raw(-(-(skipped + count) // _LANES) * 4)
    # Little-endian lanes on every machine: the low half of a word comes first.
    lanes = torch.from_numpy(raw.astype("<u8", copy=False).view("<i4"))[skipped : skipped + count]
    # The upper 24 bits, all that float32 holds. The shift keeps the sign, and adding half the range takes it away.
    return (lanes >> 8).float().add_(1 << 23).mul_(2.0**-24)


def _key(seed: int, names: tuple[str | int, ...]) -> int:
    """128 bits that differ with the seed and with every name."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=16, person=b"hubforge random")
    return int.from_bytes(digest.digest(), "little")
