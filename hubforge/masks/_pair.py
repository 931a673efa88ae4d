"""Two checkpoints of one architecture, matrix by matrix: their pairing, and what makes them no pair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hubforge.errors import SourceError, StepError
from hubforge.tensors.dtypes import FLOATS
from hubforge.tensors.names import Aliases, layer_of
from hubforge.tensors.reader import Checkpoint, open_checkpoint
from hubforge.tensors.rounding import is_finite

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 22  # elements of each model held at once, beside the difference
_FORMS = {"BF16": (7, 8, 127), "F16": (10, 5, 15)}  # bits of the fraction and of the exponent, and its bias


@dataclass(frozen=True)
class Delta:
    """instruct − pretrained of one matrix, or its Fisher."""

    values: Tensor  # float32, (out, in)
    base: float  # ‖W_pretrained‖²; 0 of a Fisher, which has no base
    rounding: float  # energy to be expected of rounding alone, where the two models differ


class Matrices(Protocol):
    """The matrices whose leading directions are wanted."""

    @property
    def paths(self) -> list[str]:
        """Where they are read from."""

    def shape(self, name: str) -> tuple[int, int]: ...
    def expect(self, name: str) -> None:
        """Have it in memory soon."""

    def delta(self, name: str) -> Delta: ...
    def damaged(self, name: str) -> str:
        """Which of the tensors read for it holds NaN or infinity, and in what file; "" when none does."""


class Pair:
    """The named matrices of one checkpoint beside those of another that may spell their prefixes otherwise."""

    def __init__(self, one: Checkpoint, other: Checkpoint, names: tuple[str, ...]) -> None:
        """Raises SourceError, naming the tensor, when it is absent from `other`, has another shape, or is quantised."""
        self.one, self.other = one, other
        layers = [{layer_of(name) for name in checkpoint} - {None} for checkpoint in (one, other)]
        if layers[1] - layers[0]:
            what = f"has {len(layers[1])} decoder layers, and {one.path} has {len(layers[0])}"
            raise SourceError(what, where=str(other.path), mend="Both must be of one architecture and size.")
        aliases = Aliases(other, str(other.path))
        self._theirs: dict[str, str] = {}
        for name in names:
            match = aliases.find(name)
            if match is None:
                mend = "Both must be of one architecture and size."
                raise SourceError(f"has no tensor {name}, which {one.path} has", where=str(other.path), mend=mend)
            mine, theirs = one.info(name), other.info(match)
            if mine.shape != theirs.shape:
                mend = f"In {one.path} it is {list(mine.shape)}. Both must be of one architecture and size."
                raise SourceError(f"{match} is of shape {list(theirs.shape)}", where=str(other.path), mend=mend)
            for info in (mine, theirs):
                if info.dtype not in FLOATS:
                    what = f"{info.name} is quantised to {info.dtype}, which has no difference to speak of"
                    raise SourceError(what, where=str(info.file), mend="Take the unquantised checkpoint.")
                if len(info.shape) != 2:
                    what = f"{info.name} is of shape {list(info.shape)}, not a matrix"
                    raise StepError(what, mend="Leave it out with `targets`.")
            self._theirs[name] = match

    @property
    def paths(self) -> list[str]:
        return [str(self.one.path), str(self.other.path)]

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.one.info(name).shape
        return rows, columns

    def expect(self, name: str) -> None:
        rows, _ = self.shape(name)
        self.one.expect(name, 0, rows)
        self.other.expect(self._theirs[name], 0, rows)

    def delta(self, name: str) -> Delta:
        import torch

        rows, columns = self.shape(name)
        values = torch.empty(rows, columns)
        base = rounding = 0.0
        step = max(1, _BLOCK // max(columns, 1))
        for first in range(0, rows, step):
            last = min(rows, first + step)
            mine = self.one.read_rows(name, first, last)
            theirs = self.other.read_rows(self._theirs[name], first, last)
            block = values[first:last]
            floats = theirs.float()
            block.copy_(mine).sub_(floats)
            base += float(torch.linalg.vector_norm(floats)) ** 2
            differ = block != 0
            rounding += rounding_energy(mine, differ) + rounding_energy(theirs, differ)
        return Delta(values, base, rounding)

    def damaged(self, name: str) -> str:
        return _damaged(self.one, name) or _damaged(self.other, self._theirs[name])


class Weighed:
    """The matrices of a Fisher mask. The rounding of its squares says nothing of a model's, and is not counted."""

    def __init__(self, fisher: Checkpoint) -> None:
        self.fisher = fisher

    @property
    def paths(self) -> list[str]:
        return [str(self.fisher.path)]

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.fisher.info(name).shape
        return rows, columns

    def expect(self, name: str) -> None:
        self.fisher.expect(name, 0, self.shape(name)[0])

    def delta(self, name: str) -> Delta:
        return Delta(self.fisher.read(name).float(), 0.0, 0.0)

    def damaged(self, name: str) -> str:
        return _damaged(self.fisher, name)


def _damaged(checkpoint: Checkpoint, name: str) -> str:
    return "" if is_finite(checkpoint.read(name).float()) else f"{name} of {checkpoint.info(name).file}"


def rounding_energy(values: Tensor, where: Tensor) -> float:
    """What storing these numbers in their own dtype cost, as a sum of squares: ulp²/12 each, were it random.

    where: which of them count. 0 for float32, whose rounding is not worth counting.
    """
    import torch

    from hubforge.tensors.dtypes import from_torch

    form = _FORMS.get(from_torch(values.dtype))
    if form is None:
        return 0.0
    fraction, exponent, bias = form
    # The exponent alone says how large an ulp is, and there are at most 256 of them: count, then add up.
    exponents = (values.contiguous().view(torch.int16) >> fraction).bitwise_and_((1 << exponent) - 1).to(torch.uint8)
    counts = torch.bincount(exponents.mul_(where).view(-1), minlength=1 << exponent).double()
    counts[0] = 0  # Zeros, and subnormals, whose rounding is smaller still.
    sizes = torch.arange(1 << exponent, dtype=torch.float64) - bias - fraction
    return float((counts * torch.exp2(2 * sizes)).sum()) / 12


@contextmanager
def opened(one: Path, other: Path) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        yield first, second
