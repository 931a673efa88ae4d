"""Random numbers that belong to elements: the same whatever the blocks, threads, shards or order of the work.

A number is a function of the seed, of the names of what is drawn for (a tensor, the place of a model in a list) and of
the element's index; no state goes from one draw to the next. The function is Philox 4x64-10 (Salmon et al. 2011,
doi:10.1145/2063384.2063405) as numpy has it, whose streams numpy promises to keep from version to version.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_WORDS = 4  # of 64 bits, that one value of the counter gives
RESOLUTION = 1 << 16  # chances of `bernoulli` are multiples of 1 / 65,536


def uniform(seed: int, names: tuple[str | int, ...], first: int, count: int) -> Tensor:
    """Numbers in [0, 1) of elements [first, first + count): float32, (count,), each a multiple of 2⁻²⁴."""
    import torch

    lanes = torch.from_numpy(_lanes(seed, names, first, count, "<i4"))
    # The upper 24 bits, all that float32 holds. The shift keeps the sign, and adding half the range takes it away.
    return (lanes >> 8).float().add_(1 << 23).mul_(2.0**-24)


def bernoulli(seed: int, names: tuple[str | int, ...], first: int, count: int, chance: float) -> Tensor:
    """1 with that chance, else 0, for elements [first, first + count): float32, (count,).

    chance: in (0, 1], taken as `resolved`. 16 bits an element are drawn, a half of what `uniform` takes.
    """
    import numpy as np
    import torch

    drawn = np.empty(count, np.bool_)
    choose(drawn, seed, names, first, chance)
    return torch.from_numpy(drawn.view(np.int8)).float()


def choose(drawn: NDArray[Any], seed: int, names: tuple[str | int, ...], first: int, chance: float) -> None:
    """What `bernoulli` gives of the elements from `first` on, into a bool array of as many."""
    import numpy as np

    below = round(resolved(chance) * RESOLUTION)
    if below == RESOLUTION:
        drawn.fill(True)
    else:
        np.less(_lanes(seed, names, first, len(drawn), "<u2"), np.uint16(below), out=drawn)


def resolved(chance: float) -> float:
    """The nearest chance that `bernoulli` can take; never 0."""
    return max(round(chance * RESOLUTION), 1) / RESOLUTION


def _lanes(seed: int, names: tuple[str | int, ...], first: int, count: int, dtype: str) -> NDArray[Any]:
    """The generator's bits as integers of a little-endian dtype, one for each element."""
    import numpy as np

    lanes = 8 * _WORDS // np.dtype(dtype).itemsize
    block, skipped = divmod(first, lanes)
    raw = np.random.Philox(key=_key(seed, names), counter=block).random_raw(-(-(skipped + count) // lanes) * _WORDS)
    # Little-endian lanes on every machine: the low part of a word comes first.
    return raw.astype("<u8", copy=False).view(dtype)[skipped : skipped + count]


def _key(seed: int, names: tuple[str | int, ...]) -> int:
    """128 bits that differ with the seed and with every name."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=16, person=b"hubforge random")
    return int.from_bytes(digest.digest(), "little")
