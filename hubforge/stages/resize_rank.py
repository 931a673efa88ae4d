"""An adapter brought to another rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hubforge.errors import StepError
from hubforge.op import AdapterRef, Context, Kind, Metrics, Op
from hubforge.tensors.adapter import open_adapter
from hubforge.tensors.adapter_writer import Merged, merge_adapters
from hubforge.tensors.low_rank import reduce_product, summary, write_ranks

if TYPE_CHECKING:
    from torch import Tensor


class ResizeRank(Op):
    """The adapter with every module at one rank: the best approximation of its deltas, or the same deltas if higher.

    A lower rank keeps the leading singular triples of scaling · B · A, found through the QR decompositions of the
    factors; what that leaves out is in `ranks.json`, matrix by matrix. A higher one, or that of a module whose rank
    already is lower, is filled up with zeros. The new scaling is 1: alpha is the rank, and rsLoRA is off.
    """

    makes: ClassVar[Kind] = "adapter"
    pins: ClassVar[tuple[str, ...]] = ("torch",)
    exact: ClassVar[bool] = False  # LAPACK's last bits, and a vector's sign, depend on the processor.
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "merge"
    formula: ClassVar[str] = "scaling · B · A = U · S · Vᵀ;  A′ = V_kᵀ,  B′ = U_k · S_k"
    source: ClassVar[str] = "Eckart and Young 1936"

    adapter: AdapterRef = Field(description="The adapter, of any rank and scaling.")
    rank: int = Field(ge=1, description="Rank of every module afterwards.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Element type of the factors.")

    def run(self, ctx: Context) -> Metrics:
        facts: dict[str, dict[str, float]] = {}
        with open_adapter(ctx.path(self.adapter), str(self.adapter)) as adapter:

            def merge(module: Merged) -> tuple[Tensor, Tensor]:
                a, b = adapter.factors(module.first.name)
                try:
                    found = reduce_product(a * module.first.scaling, b, self.rank)
                except StepError as error:
                    mend = "The adapter is damaged: fetch it again."
                    raise StepError(f"{module.name}: {error.what}", where=ctx.where, mend=mend) from error
                facts[module.name] = found.facts()
                return found.padded(self.rank)

            metrics = merge_adapters(ctx, [adapter], merge, lambda module: self.rank, self.dtype)
        write_ranks(ctx.out, facts)
        return metrics | {"energy": summary(facts)}
