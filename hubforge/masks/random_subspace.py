"""Random directions in the place of those of a subspace mask: the control of whatever that mask is said to do."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hubforge.errors import StepError
from hubforge.masks._files import write_json, write_tensors
from hubforge.op import Context, Kind, MaskRef, Metrics, Op
from hubforge.tensors.projection import Subspaces


class RandomSubspace(Op):
    """Random U and V of the shapes that a subspace mask has: what is saved by protecting just any directions.

    For each matrix the Q of the QR factorization of a standard normal matrix, drawn in float64: uniform over all
    subspaces of that rank.
    """

    makes: ClassVar[Kind] = "mask"
    form: ClassVar[str] = "subspace"
    pins: ClassVar[tuple[str, ...]] = ("torch",)
    exact: ClassVar[bool] = False  # LAPACK's last bits depend on the processor.
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "masks"
    formula: ClassVar[str] = "U, V = Q of a random normal matrix"
    source: ClassVar[str] = "Mezzadri 2007, How to generate random matrices from the classical compact groups"

    like: MaskRef = Field(description="The subspace mask whose matrices and ranks it takes.")
    seed: int = Field(0, ge=0, description="Draws the directions.")

    def misfit(self, field: str, form: str) -> str:
        return "" if form == "subspace" else "Name a mask made by `subspace`."

    def run(self, ctx: Context) -> Metrics:
        import torch

        mask = Subspaces(ctx.path(self.like))
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in mask.names:
            subspace = mask.read(name)
            for part, basis in (("U", subspace.U), ("V", subspace.V)):
                shapes[f"{name}.{part}"] = ("F32", tuple(basis.shape))
        if not shapes:
            raise StepError(f"{self.like} holds no subspace", where=ctx.where)
        places = {name: number for number, name in enumerate(shapes)}

        def draw(name: str) -> torch.Tensor:
            # Of its own seed, so that a tensor is the same whatever is drawn before it.
            generator = torch.Generator().manual_seed((self.seed << 20) + places[name])
            normal = torch.randn(shapes[name][1], generator=generator, dtype=torch.float64)
            return torch.linalg.qr(normal).Q.float()

        ctx.sha256.update(write_tensors(ctx.out, "subspace", shapes, draw))
        unchanged = ctx.artifact(self.like).read_json("subspace.json").get("unchanged", [])
        write_json(ctx.out / "subspace.json", {"like": str(self.like), "seed": self.seed, "unchanged": unchanged})
        ranks = {shape[1] for _, shape in shapes.values()}
        return {"rank": max(ranks), "matrices": len(mask.names), "unchanged": len(unchanged)}
