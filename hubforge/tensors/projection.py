"""Keep a change of weights out of a protected subspace: the projections, their leak, and the mask file they read.

A `subspace` mask holds, for a matrix W (out, in), the k leading singular vectors of what an instruct model learned:
U (out, k) and V (in, k), float32, orthonormal columns. A change ΔW touches the subspace by UᵀΔW and by ΔWV.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hubforge.errors import SourceError, StepError
from hubforge.tensors.names import Aliases
from hubforge.tensors.reader import Checkpoint, TensorInfo, open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Projection = Literal["two_sided", "published", "core", "left", "right", "scale"]
FILE = "subspace.safetensors"
_ORTHONORMAL = 1e-5  # float32 vectors are off by 1e-6 at most, bfloat16 ones by 1e-3


@dataclass(frozen=True)
class Subspace:
    """The protected directions of one matrix: U (out, k) and V (in, k), float32, orthonormal columns."""

    U: Tensor
    V: Tensor

    def to(self, device: str | torch.device) -> Subspace:
        return Subspace(self.U.to(device), self.V.to(device))


def remove(x: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """x (n, m) without its share in the span of the basis' columns (n, k): x − strength · basis · basisᵀ · x.

    A projection, and so idempotent, at strength 1.
    """
    return x.addmm(basis, basis.T @ x, alpha=-strength)


def protect(delta: Tensor, subspace: Subspace, how: Projection = "two_sided", strength: float = 1.0) -> Tensor:
    """A change of weights (out, in) kept out of the subspace; float32, all rows at once.

    With P = UUᵀ and Q = VVᵀ: two_sided (I − P)Δ(I − Q); left (I − P)Δ; right Δ(I − Q); core Δ − PΔQ;
    scale (I − sP)Δ(I − sQ), s = strength; published Δ − PΔ − ΔQ. All are linear. The first four are projections;
    `published` is not: what lies in both spans comes out with its sign turned, and comes back when applied again.
    """
    U, V = subspace.U, subspace.V
    if how == "two_sided":
        return remove(remove(delta, U).T, V).T
    if how == "left":
        return remove(delta, U)
    if how == "right":
        return remove(delta.T, V).T
    if how == "core":
        return delta - U @ (U.T @ delta @ V) @ V.T
    if how == "scale":
        return remove(remove(delta, U, strength).T, V, strength).T
    return delta - U @ (U.T @ delta) - (delta @ V) @ V.T


@dataclass(frozen=True)
class Leak:
    """How much of a change lies in the subspace, in [0, 1] each: of ‖ΔW‖, ‖UᵀΔW‖, ‖ΔWV‖ and ‖UᵀΔWV‖."""

    left: float
    right: float
    core: float  # at most the smaller of the two

    @property
    def worst(self) -> float:
        return max(self.left, self.right)


def leak(delta: Tensor, subspace: Subspace) -> Leak | None:
    """The leak of a change (out, in), in float64; None when the change is zero, which has no direction."""
    wide, U, V = delta.double(), subspace.U.double(), subspace.V.double()
    size = float(wide.norm())
    if not size:
        return None
    left, right = U.T @ wide, wide @ V
    return Leak(*(float(part.norm()) / size for part in (left, right, left @ V)))


def factored_leak(a: Tensor, b: Tensor, subspace: Subspace) -> Leak | None:
    """The leak of B·A, A (rank, in) and B (out, rank), without forming the product; None when it is zero.

    ‖XY‖² = tr(XᵀX · YYᵀ), in float64: squaring halves the digits, and 1e-8 is to be told from zero.
    """
    wide_a, wide_b = a.detach().double(), b.detach().double()
    inner_a, inner_b = wide_a @ wide_a.T, wide_b.T @ wide_b
    left = subspace.U.double().T @ wide_b
    right = wide_a @ subspace.V.double()
    total = _root(inner_b, inner_a)
    if not total:
        return None
    core = float((left @ right).norm())  # k × k at most: small enough to form
    return Leak(_root(left.T @ left, inner_a) / total, _root(inner_b, right @ right.T) / total, core / total)


def stored_leaks(base: Checkpoint, made: Checkpoint, mask: Subspaces) -> dict[str, Leak]:
    """The leak of `made` − `base` for each matrix of both that the mask covers and that differs, as it is stored.

    Rounding counts: in bfloat16 a small change is largely rounding, which keeps clear of nothing. One matrix at a time.
    """
    theirs, found = Aliases(made, str(made.path)), {}
    for name, info in base.tensors.items():
        own, other = mask.find(name, info.shape) if len(info.shape) == 2 else None, theirs.find(name)
        if own is None or other is None:
            continue
        one = leak(made.read(other).float() - base.read(name).float(), mask.read(own))
        if one is not None:
            found[name] = one
    return found


def _root(one: Tensor, other: Tensor) -> float:
    # Rounding may leave a trace of -1e-33 where zero is meant.
    return math.sqrt(max(float((one * other).sum()), 0.0))


def summary(leaks: Mapping[str, Leak]) -> dict[str, float | str | int]:
    """Worst and mean leak over the matrices that changed, as manifests and cards keep it; {} without any."""
    if not leaks:
        return {}
    worst = max(leaks, key=lambda name: leaks[name].worst)
    left, right, core = ([getattr(one, part) for one in leaks.values()] for part in ("left", "right", "core"))
    return {
        "worst": leaks[worst].worst,
        "worst_matrix": worst,
        "worst_left": max(left),
        "worst_right": max(right),
        "worst_core": max(core),
        "mean_left": sum(left) / len(left),
        "mean_right": sum(right) / len(right),
        "mean_core": sum(core) / len(core),
        "matrices": len(leaks),
    }


def worst_held(leak: Mapping[str, object], how: object) -> float | None:
    """The worst leak, of a `summary`, into what a projection holds out; None when nothing has changed."""
    worst = leak.get({"left": "worst_left", "right": "worst_right", "core": "worst_core"}.get(str(how), "worst"))
    return worst if isinstance(worst, float) else None


class Subspaces:
    """The subspaces in a mask, by the tensor names of a model that may spell their prefixes otherwise.

    Only headers are read until a subspace is asked for.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """name: what errors call it; its path unless given. Raises SourceError when no subspace is there."""
        file = path / FILE if (path / FILE).is_file() else path
        with open_checkpoint(file) as checkpoint:
            self._tensors: Mapping[str, TensorInfo] = dict(checkpoint.tensors)
        self.path, self._name = path, name or str(path)
        names = [name.removesuffix(".U") for name in self._tensors if name.endswith(".U")]
        self.names = tuple(name for name in names if f"{name}.V" in self._tensors)
        if not self.names:
            mend = "A mask made by `op: subspace` holds tensors named `<tensor of the model>.U`, `.S` and `.V`."
            raise SourceError("holds no subspace", where=str(path), mend=mend)
        self._aliases = Aliases(self.names, str(path))
        self._unchanged = Aliases(_unchanged(path / "subspace.json"), str(path))

    def find(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The mask's own name for that tensor of a model; None when the mask does not cover it.

        Raises StepError, naming the tensor, when its shape is not the one the mask was made for.
        """
        own = self._aliases.find(name)
        if own is None:
            return None
        out, into = self._tensors[f"{own}.U"].shape[0], self._tensors[f"{own}.V"].shape[0]
        if (out, into) != tuple(shape):
            what = f"{name} is {list(shape)} in the model, but {own} in {self._name} is for {[out, into]}"
            raise StepError(what, mend="The mask is of another model; make one of this model and its instruct version.")
        return own

    def is_unchanged(self, name: str) -> bool:
        """Whether the mask says that the two models it was made of do not differ in this tensor."""
        return self._unchanged.find(name) is not None

    def rank(self, own: str) -> int:
        return self._tensors[f"{own}.U"].shape[1]

    def read(self, own: str) -> Subspace:
        """The subspace of a tensor, by the mask's own name for it, orthonormal whatever precision it was stored in."""
        with Checkpoint(self.path, self._tensors) as checkpoint:
            U, V = checkpoint.read(f"{own}.U").float(), checkpoint.read(f"{own}.V").float()
        return Subspace(orthonormal(U, f"{own}.U", self.path), orthonormal(V, f"{own}.V", self.path))

    def bind(self, shapes: Mapping[str, tuple[int, ...]], where: str = "") -> dict[str, str]:
        """The mask's own name for each tensor that is to change, but for those it calls unchanged.

        Raises StepError when the mask covers none of them, or leaves one of them without protection.
        """
        found: dict[str, str] = {}
        bare: list[str] = []
        for name, shape in shapes.items():
            try:
                own = self.find(name, shape)
            except StepError as error:
                raise StepError(error.what, where=where, mend=error.mend) from error
            if own is not None:
                found[name] = own
            elif not self.is_unchanged(name):
                bare.append(name)
        if bare:
            more = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
            what = f"{self._name} has no subspace for {bare[0]}{more}, which would change unprotected"
            mend = "Make a mask of this model whose `targets` cover them, or change fewer modules."
            raise StepError(what, where=where, mend=mend)
        return found


def orthonormal(basis: Tensor, name: str, path: Path) -> Tensor:
    """An orthonormal basis (n, k) of the columns' span, float32; the same bits if they are orthonormal already."""
    import torch

    kept = basis[:, basis.square().sum(0) > 0]  # Columns of padding span nothing, and would turn into noise.
    if not bool(torch.isfinite(kept).all()):
        raise SourceError(f"{name} holds NaN or infinity", where=str(path))
    if not kept.shape[1]:
        raise SourceError(f"{name} is all zeros", where=str(path))
    if float((kept.T @ kept - torch.eye(kept.shape[1])).abs().max()) <= _ORTHONORMAL:
        return kept.contiguous()
    Q, R = torch.linalg.qr(kept.double())
    if float(R.diagonal().abs().min()) < 1e-3 * float(R.diagonal().abs().max()):
        raise SourceError(f"the columns of {name} are no basis: they depend on one another", where=str(path))
    return Q.float().contiguous()


def _unchanged(path: Path) -> Collection[str]:
    """The matrices in which instruct and pretrained are equal, as subspace.json lists them."""
    try:
        named = [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["unchanged"]]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"subspace.json does not list `unchanged`: {error!r}", where=str(path)) from error
    return named
