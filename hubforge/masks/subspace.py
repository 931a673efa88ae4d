"""The directions in which an instruct model differs most from the pretrained model it was trained from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from hubforge.errors import StepError
from hubforge.masks import _targets
from hubforge.masks._files import TensorWriter, settle, size, write_json, write_tensors
from hubforge.masks._pair import Matrices, Pair, Weighed, opened
from hubforge.models import read_config
from hubforge.op import Context, Kind, MaskRef, Metrics, ModelRef, Op
from hubforge.rows import some
from hubforge.tensors.layout import lay_out
from hubforge.tensors.names import layer_of
from hubforge.tensors.reader import open_checkpoint
from hubforge.tensors.tokens import require_same

if TYPE_CHECKING:
    from torch import Tensor

    from hubforge.tensors.spectrum import Leading

Facts = dict[str, Any]  # what is known of one matrix: JSON
DONE = "computed.json"  # under ctx.out once every matrix is in the work folder


class Subspace(Op):
    """The leading singular vectors U, V and values S of W_instruct − W_pretrained, for each matrix of the decoder.

    Two checkpoints are read from disk one matrix at a time; neither model is loaded. A solution counts only when a
    bound on its angle to the truth says so: randomized solvers return another subspace on the slowly decaying spectra
    of such differences. float32 in the file: at rank 256, bfloat16 vectors let through 6e-4 of what they should hold
    back.
    """

    makes: ClassVar[Kind] = "mask"
    form: ClassVar[str] = "subspace"
    version: ClassVar[int] = 3  # Another eigensolver where k is small.
    pins: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    exact: ClassVar[bool] = False  # LAPACK's last bits, and a vector's sign, depend on the processor.
    requires: ClassVar[tuple[str, ...]] = ("torch", "scipy", "numpy")
    extra: ClassVar[str] = "masks"
    resumable: ClassVar[bool] = True
    formula: ClassVar[str] = "W_instruct − W_pretrained ≈ U · diag(S) · Vᵀ, the k largest of S"
    source: ClassVar[str] = "Eckart and Young 1936; Davis and Kahan 1970 for the bound on the angle"

    instruct: ModelRef | None = Field(None, description="The model whose abilities the subspace is to hold.")
    pretrained: ModelRef | None = Field(None, description="The model it was trained from: same shapes, same tokenizer.")
    fisher: MaskRef | None = Field(
        None,
        description="Instead of the two models: take the leading directions of this Fisher mask's matrices. Weaker, "
        "since a matrix of squares is nearly of rank one and does not know the sign of a direction; for fidelity to "
        "masks published so.",
    )
    rank: int | None = Field(
        None, ge=1, description="k, directions kept per matrix, at most. `rank`, `energy` or both must be given."
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep per matrix only as many directions as hold this share of ‖Δ‖²; `rank` and `max_share` "
        "still limit them.",
    )
    max_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Limit of k as a share of a matrix's smaller side, so that narrow ones, such as keys and values, "
        "are not spanned whole.",
    )
    targets: Annotated[str, AfterValidator(_targets.pattern)] | None = Field(
        None,
        description="Regular expression searched for in the names of the instruct checkpoint's matrices. By default "
        "the seven linears of each decoder layer; never dead key and value weights.",
    )

    @model_validator(mode="after")
    def _whose_and_how_many(self) -> Subspace:
        if (self.fisher is not None) == (self.instruct is not None or self.pretrained is not None):
            raise ValueError("give `instruct` and `pretrained`, or `fisher` alone")
        if self.fisher is None and (self.instruct is None or self.pretrained is None):
            missing = "pretrained" if self.pretrained is None else "instruct"
            raise ValueError(f"`{missing}` is missing: the subspace is that of a difference of two models")
        if self.fisher is None and self.instruct == self.pretrained:
            raise ValueError(f"{self.instruct} is named twice, and does not differ from itself")
        if self.rank is None and self.energy is None:
            raise ValueError("give `rank` (such as 64), `energy` (such as 0.9), or both")
        return self

    def misfit(self, field: str, form: str) -> str:
        return "" if form == "fisher" else "It is taken of a Fisher mask, or of two models."

    def preflight(self, ctx: Context) -> None:
        """Shapes and tokenizers, where both models are there already: only headers are read."""
        if all(ref is None or ref in ctx.inputs for ref in (self.instruct, self.pretrained, self.fisher)):
            with self._matrices(ctx, said=False):
                pass

    def run(self, ctx: Context) -> Metrics:
        with self._matrices(ctx) as (matrices, targets):
            limits = {name: self._limit(matrices.shape(name)) for name in targets.names}
            capped = [name for name, limit in limits.items() if self.rank is not None and limit < self.rank]
            if capped:
                said = f"rank {self.rank} is limited in {len(capped)} matrices: to {limits[capped[0]]} in {capped[0]}"
                small = [name for name in capped if self.rank is not None and min(matrices.shape(name)) < self.rank]
                if small:  # No matter of `max_share`: such a rank cannot be meant.
                    ctx.warn(f"{said}; {len(small)} have no such rank: {small[0]} is {list(matrices.shape(small[0]))}")
                else:
                    ctx.note(said)
            facts = self._compute(ctx, matrices, limits)
        empty = [name for name, matrix in facts.items() if not matrix["rank"]]
        if empty and self.fisher is not None:
            raise StepError(f"{empty[0]} of {self.fisher} is zero throughout", where=ctx.where, mend="Make it again.")
        if len(empty) == len(facts):
            mend = "Name a pretrained model that the instruct model was trained from."
            raise StepError("the two models do not differ in any matrix", where=ctx.where, mend=mend)
        self._finish(ctx, facts, limits, targets.left_out)
        vague = [name for name, matrix in facts.items() if matrix["angle_bound"] > 1e-3]
        if vague:
            ctx.note(
                f"in {len(vague)} matrices, such as {vague[0]}, the spectrum has no gap at k: other directions "
                "would do as well there; residual and captured energy hold"
            )
        return _metrics(facts) | {"capped": len(capped), "angle_unknown": len(vague)}

    @contextmanager
    def _matrices(self, ctx: Context, *, said: bool = True) -> Iterator[tuple[Matrices, _targets.Targets]]:
        """What to decompose and which of it, opened and checked. said: whether to tell what is no error."""
        if self.fisher is not None:
            with open_checkpoint(ctx.path(self.fisher), "fisher") as fisher:
                weighed = {name: info.shape for name, info in fisher.tensors.items() if len(info.shape) == 2}
                yield Weighed(fisher), _targets.select(weighed, {}, self.targets or ".", ctx.where)
            return
        assert self.instruct is not None and self.pretrained is not None
        instruct, pretrained = ctx.path(self.instruct), ctx.path(self.pretrained)
        mend = "A difference of weights means something only between a model and the one it was trained from."
        renamed = require_same(instruct, pretrained, mend)
        if renamed is None and said:
            lacking = [str(folder) for folder in (instruct, pretrained) if not (folder / "tokenizer.json").is_file()]
            ctx.warn(f"the tokenizers are not compared: no tokenizer.json in {' and '.join(lacking)}")
        elif renamed and said:
            ctx.note(f"added tokens that differ: {some(renamed)}")
        with opened(instruct, pretrained) as (one, other):
            shapes = {name: info.shape for name, info in one.tensors.items()}
            targets = _targets.select(shapes, read_config(instruct), self.targets, ctx.where)
            yield Pair(one, other, targets.names), targets

    def _limit(self, shape: tuple[int, int]) -> int:
        share = max(1, math.floor(self.max_share * min(shape)))
        return share if self.rank is None else min(self.rank, share)

    def _compute(self, ctx: Context, pair: Matrices, limits: Mapping[str, int]) -> dict[str, Facts]:
        """Fill ctx.out/work with U, S and V of every matrix, padded with zeros to its limit; what is known of each."""
        from hubforge.tensors.spectrum import leading

        if (ctx.out / DONE).is_file():
            known: dict[str, Facts] = json.loads((ctx.out / DONE).read_text(encoding="utf-8"))
            return known
        shapes = [pair.shape(name) for name in limits]
        written = sum(4 * k * (sum(pair.shape(name)) + 1) for name, k in limits.items())
        held = max(_memory(*shape) for shape in shapes)
        ctx.note(f"subspace of {len(limits)} matrices, one at a time: {size(held)} are held, {size(written)} written")
        tensors = [
            (f"{name}.{part}", "F32", shape)
            for name, k in limits.items()
            for part, shape in _shapes(pair.shape(name), k).items()
        ]
        plan = json.dumps([self.energy, tensors, pair.paths])
        writer = TensorWriter(ctx.out / "work", lay_out(tensors, stem="subspace"), plan)
        facts: dict[str, Facts] = {}
        names = list(limits)
        try:
            for number, name in enumerate(names):
                if number + 1 < len(names):
                    pair.expect(names[number + 1])
                if all(f"{name}.{part}" in writer.done for part in "USV"):
                    facts[name] = writer.done[f"{name}.S"]
                else:
                    delta = pair.delta(name)
                    try:
                        found = leading(delta.values, limits[name], self.energy)
                    except StepError as error:
                        if damaged := pair.damaged(name):
                            what, mend = f"{damaged} holds NaN or infinity", "Make or fetch it again."
                            raise StepError(what, where=ctx.where, mend=mend) from error
                        raise StepError(f"{name}: {error.what}", where=ctx.where, mend=error.mend) from error
                    facts[name] = _facts(found, delta.base, delta.rounding)
                    for part in "UVS":  # S last: with it come the facts.
                        tensor = _padded(getattr(found, part), limits[name])
                        writer.put(f"{name}.{part}", tensor, facts[name] if part == "S" else None)
                ctx.progress(number + 1, len(names), "matrix", name)
            digests = writer.complete()
        except BaseException:
            writer.close()
            raise
        ctx.sha256.update(digests)
        write_json(ctx.out / DONE, facts)
        return facts

    def _finish(
        self, ctx: Context, facts: Mapping[str, Facts], limits: Mapping[str, int], left_out: Mapping[str, int]
    ) -> None:
        """Bring the files of the work folder to their place: as they are, or cut to the ranks that were found."""
        work = ctx.out / "work"
        described = ctx.out / "subspace.json"
        if not described.is_file():
            if all(facts[name]["rank"] == limit for name, limit in limits.items()):
                if work.is_dir():
                    settle(work, ctx.out)
            else:
                _cut(ctx, facts)
            write_json(described, self._description(facts, left_out))
        shutil.rmtree(work, ignore_errors=True)
        (ctx.out / DONE).unlink(missing_ok=True)

    def _description(self, facts: Mapping[str, Facts], left_out: Mapping[str, int]) -> dict[str, Any]:
        total = sum(matrix["norm"] ** 2 for matrix in facts.values())
        return {
            "of": "fisher" if self.fisher is not None else "difference",
            "rank": self.rank,
            "energy": self.energy,
            "max_share": self.max_share,
            "matrices": {
                name: {**matrix, "energy_share": matrix["norm"] ** 2 / total}
                for name, matrix in facts.items()
                if matrix["rank"]
            },
            "unchanged": [name for name, matrix in facts.items() if not matrix["rank"]],
            "left_out": dict(left_out),
        }


def _shapes(shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
    return {"U": (shape[0], rank), "S": (rank,), "V": (shape[1], rank)}


def _memory(rows: int, columns: int) -> int:
    """Bytes: the difference in float32, and its Gram matrix in float64 three times (LAPACK works on copies)."""
    return 4 * rows * columns + 3 * 8 * min(rows, columns) ** 2


def _padded(tensor: Tensor, rank: int) -> Tensor:
    from torch.nn.functional import pad

    return pad(tensor, (0, rank - tensor.shape[-1]))


def _facts(found: Leading, base: float, rounding: float) -> Facts:
    return {
        "rank": found.rank,
        "shape": [len(found.U), len(found.V)],
        "energy_captured": found.captured,
        "norm": math.sqrt(found.energy),  # ‖Δ‖, Frobenius
        "relative": math.sqrt(found.energy / base) if base else None,  # ‖Δ‖ / ‖W_pretrained‖
        # How much of ‖Δ‖² to expect from rounding the two checkpoints alone: near 1, the difference is mostly noise.
        "rounding_share": rounding / found.energy if found.energy else 0.0,
        "residual": found.residual,
        "angle_bound": found.angle_bound,
        "solver": found.solver,
    }


def _cut(ctx: Context, facts: Mapping[str, Facts]) -> None:
    """Write the tensors of the work folder to ctx.out without their padding, unchanged matrices left out."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, matrix in facts.items():
        if rank := matrix["rank"]:
            for part, shape in _shapes(tuple(matrix["shape"]), rank).items():
                shapes[f"{name}.{part}"] = ("F32", shape)
    ctx.sha256.clear()
    with open_checkpoint(ctx.out / "work") as computed:
        ctx.sha256.update(
            write_tensors(ctx.out, "subspace", shapes, lambda name: computed.read(name)[..., : shapes[name][1][-1]])
        )


def _metrics(facts: Mapping[str, Facts]) -> Metrics:
    by_layer: dict[int, list[float]] = {}
    changed = {name: matrix for name, matrix in facts.items() if matrix["rank"]}
    for name, matrix in changed.items():
        layer = layer_of(name)
        if layer is not None:
            by_layer.setdefault(layer, []).append(matrix["energy_captured"])
    total = sum(matrix["norm"] ** 2 for matrix in changed.values())
    return {
        "rank": max(matrix["rank"] for matrix in changed.values()),
        "directions": _spread([matrix["rank"] for matrix in changed.values()]),
        "matrices": len(changed),
        "unchanged": len(facts) - len(changed),
        "energy_captured": _spread([matrix["energy_captured"] for matrix in changed.values()]),
        "energy_captured_overall": sum(m["norm"] ** 2 * m["energy_captured"] for m in changed.values()) / total,
        "rounding_share": sum(m["norm"] ** 2 * m["rounding_share"] for m in changed.values()) / total,
        "residual": max(matrix["residual"] for matrix in changed.values()),
        "refined": sum(matrix["solver"] != "exact" for matrix in changed.values()),
        "layers": [{"layer": layer, "energy_captured": _spread(by_layer[layer])} for layer in sorted(by_layer)],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
