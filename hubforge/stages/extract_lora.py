"""An adapter from a fine-tuned model and its base."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from hubforge.errors import SourceError, StepError
from hubforge.models import read_config
from hubforge.op import Context, Kind, Metrics, ModelRef, Op
from hubforge.rows import some
from hubforge.tensors.adapter import Adapter
from hubforge.tensors.adapter_config import AdapterConfig
from hubforge.tensors.adapter_writer import Merged, merge_adapters
from hubforge.tensors.dtypes import FLOATS
from hubforge.tensors.low_rank import reduce_matrix, summary, write_ranks
from hubforge.tensors.names import Aliases, is_dead, layer_of, natural_order
from hubforge.tensors.quantised import open_model
from hubforge.tensors.reader import Checkpoint, read_header
from hubforge.tensors.rounding import is_finite
from hubforge.tensors.writer import write_whole

if TYPE_CHECKING:
    from torch import Tensor

LINEARS = r"\.(?:self_attn\.(?:q|k|v|o|qkv)_proj|mlp\.(?:gate|up|down|gate_up)_proj)\.weight$"
_BLOCK = 1 << 22  # elements of each model held at once, beside the difference


def _pattern(targets: str) -> str:
    try:
        re.compile(targets)
    except re.error as error:
        raise ValueError(f"{targets!r} is not a regular expression: {error}") from error
    return targets


class ExtractLora(Op):
    """The adapter that turns the base model into the fine-tuned one, as nearly as its rank allows.

    Each matrix's difference is brought to its rank by the leading singular triples, exactly, through the Gram matrix
    on the smaller side in float64. Two checkpoints are read one matrix at a time; neither model is loaded. The share of
    each difference that was kept is in `ranks.json`. What an adapter of linear layers cannot hold (norms, embeddings,
    heads) is compared too, and what differs is named, with its share of the whole difference.
    """

    makes: ClassVar[Kind] = "adapter"
    version: ClassVar[int] = 3  # Another eigensolver where few directions are kept.
    pins: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    exact: ClassVar[bool] = False  # LAPACK's last bits, and a vector's sign, depend on the processor.
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy", "scipy", "safetensors")
    extra: ClassVar[str] = "merge"
    resumable: ClassVar[bool] = True
    formula: ClassVar[str] = "W_model − W_base ≈ B · A,  A = V_kᵀ,  B = U_k · S_k"
    source: ClassVar[str] = "Eckart and Young 1936; as mergekit-extract-lora and kohya-ss's extract_lora"

    model: ModelRef = Field(description="The fine-tuned model.")
    base_model: ModelRef = Field(description="The model it was trained from: same architecture and size.")
    rank: int | None = Field(None, ge=1, description="Rank of the adapter, or its limit where `energy` is given.")
    energy: float | None = Field(
        None, gt=0, le=1, description="Give each matrix the smallest rank that keeps this share of ‖Δ‖², in (0, 1]."
    )
    targets: Annotated[str, AfterValidator(_pattern)] | None = Field(
        None,
        description="Regular expression searched for in the names of the base's tensors: linear layers to cover. "
        "By default the seven of each decoder layer.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Element type of the factors.")

    @model_validator(mode="after")
    def _some_limit(self) -> ExtractLora:
        if self.rank is None and self.energy is None:
            raise ValueError("either rank or energy must say how much of the difference to keep")
        return self

    def preflight(self, ctx: Context) -> None:
        """Names, shapes and dtypes, where both models are there already: only headers are read."""
        if self.model in ctx.inputs and self.base_model in ctx.inputs:
            with open_model(ctx.path(self.model)) as tuned, open_model(ctx.path(self.base_model)) as base:
                self._pairs(ctx, tuned, base)

    def run(self, ctx: Context) -> Metrics:
        with open_model(ctx.path(self.model)) as tuned, open_model(ctx.path(self.base_model)) as base:
            theirs = self._pairs(ctx, tuned, base)
            facts = self._reduce(ctx, tuned, base, theirs)
            covered = sum(fact["norm"] ** 2 for fact in facts.values())
            if not covered:
                mend = f"Is {self.model} trained from {self.base_model}, or a copy of it?"
                raise StepError("the models do not differ in any targeted matrix", where=ctx.where, mend=mend)
            left = _left_out(tuned, base, theirs)
            for name, norm in left.items():
                if norm is not None and not math.isfinite(norm):
                    own = Aliases(tuned, str(tuned.path)).find(name) or name
                    if damaged := self._damaged(ctx, tuned, own, base, name):
                        raise damaged
            total = covered + sum((norm or 0.0) ** 2 for norm in left.values())
            if left:
                share = f"{1 - covered / total:.2%} of the energy of the whole difference"
                ctx.warn(f"{len(left)} tensors that differ are not in the adapter, {share}: {some(list(left))}")
            metrics = self._write(ctx, base, facts)
        metrics["energy"] = summary(facts) | {"covered": covered / total, "left_out": sorted(left, key=natural_order)}
        write_ranks(ctx.out, facts)
        shutil.rmtree(ctx.out / "work")
        return metrics

    def _pairs(self, ctx: Context, tuned: Checkpoint, base: Checkpoint) -> dict[str, str]:
        """The fine-tuned model's name of each tensor to cover, by the base's; all checked."""
        wanted, config = re.compile(self.targets or LINEARS), read_config(ctx.path(self.base_model))
        names = [name for name in base if wanted.search(name) and not is_dead(name, config)]
        if self.targets is None:
            names = [name for name in names if layer_of(name) is not None]
        if not names:
            mend = f"Set targets. Its tensors: {some(sorted(base, key=natural_order))}."
            raise StepError("no tensor of the base matches targets", where=ctx.where, mend=mend)
        aliases = Aliases(tuned, str(tuned.path))
        found = {}
        for name in sorted(names, key=natural_order):
            info = base.info(name)
            if len(info.shape) != 2 or not name.endswith(".weight") or "embed" in name.split(".")[-2]:
                what = f"{name} of shape {list(info.shape)} is no linear layer's weight"
                raise StepError(what, where=ctx.where, mend="Leave it out with `targets`.")
            match = aliases.find(name)
            if match is None:
                raise SourceError(f"has no tensor {name}, which {base.path} has", where=str(tuned.path))
            other = tuned.info(match)
            if other.shape != info.shape:
                what = f"{match} is of shape {list(other.shape)}, but {list(info.shape)} in {base.path}"
                raise SourceError(what, where=str(tuned.path), mend="Both must be of one architecture and size.")
            for each in (info, other):
                if each.dtype not in FLOATS:
                    what = f"{each.name} is quantised to {each.dtype}, which has no difference to speak of"
                    raise SourceError(what, where=str(each.file), mend="Take the unquantised checkpoint.")
            found[name] = match
        return found

    def _reduce(
        self, ctx: Context, tuned: Checkpoint, base: Checkpoint, theirs: Mapping[str, str]
    ) -> dict[str, dict[str, float]]:
        """The facts of each module; its factors are left in the work folder, one file each, for another try too."""
        from safetensors.torch import save

        (ctx.out / "work").mkdir(parents=True, exist_ok=True)
        facts: dict[str, dict[str, float]] = {}
        for number, name in enumerate(ctx.track(theirs, unit="matrix")):
            module, limit = name.removesuffix(".weight"), min(self.rank or 1 << 62, *base.info(name).shape)
            done = _work(ctx, number, "json")
            if not done.is_file():
                try:
                    found = reduce_matrix(difference(tuned, theirs[name], base, name), limit, self.energy)
                except StepError as error:
                    if damaged := self._damaged(ctx, tuned, theirs[name], base, name):
                        raise damaged from error
                    raise StepError(f"{name}: {error.what}", where=ctx.where, mend=error.mend) from error
                if found.rank:
                    # Without `energy` all have one rank, which many programs that serve adapters ask for.
                    a, b = found.padded(found.rank if self.energy else limit)
                    stem = f"base_model.model.{module}"
                    factors = {f"{stem}.lora_A.weight": a.contiguous(), f"{stem}.lora_B.weight": b.contiguous()}
                    write_whole(_work(ctx, number, "safetensors"), save(factors))
                write_whole(done, json.dumps(found.facts()).encode())  # Last: it says that both are there.
            facts[module] = json.loads(done.read_text(encoding="utf-8"))
        return facts

    def _damaged(self, ctx: Context, tuned: Checkpoint, theirs: str, base: Checkpoint, name: str) -> StepError | None:
        """The error that names the model whose tensor holds NaN or infinity."""
        for ref, checkpoint, own in ((self.model, tuned, theirs), (self.base_model, base, name)):
            if not is_finite(checkpoint.read(own).float()):
                what = f"{own} of {ref} ({checkpoint.info(own).file}) holds NaN or infinity"
                return StepError(what, where=ctx.where, mend="That model is damaged: make or fetch it again.")
        return None

    def _write(self, ctx: Context, base: Checkpoint, facts: Mapping[str, Mapping[str, float]]) -> Metrics:
        numbered = [(number, module) for number, module in enumerate(facts) if facts[module]["rank"]]
        modules = [module for _, module in numbered]
        tensors = {key: info for n, _ in numbered for key, info in read_header(_work(ctx, n, "safetensors")).items()}
        ranks = {m: tensors[f"base_model.model.{m}.lora_A.weight"].shape[0] for m in modules}
        top = max(ranks.values())
        raw = self._config(ctx) | {"target_modules": _targets(modules, base)}
        config = AdapterConfig(top, float(top), False, False, ranks, {m: float(r) for m, r in ranks.items()}, raw)
        with Adapter("work", config, Checkpoint(ctx.out / "work", tensors)) as adapter:

            def factors(module: Merged) -> tuple[Tensor, Tensor]:
                return adapter.factors(module.name)

            return merge_adapters(ctx, [adapter], factors, lambda module: module.first.rank, self.dtype)

    def _config(self, ctx: Context) -> dict[str, Any]:
        repo, commit = (ctx.artifact(self.base_model).origin.get(field) for field in ("repo", "commit"))
        named: dict[str, Any] = {"base_model_name_or_path": str(self.base_model)}
        # A folder's path means nothing to whoever gets the adapter.
        if isinstance(repo, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            named = {"base_model_name_or_path": repo, "revision": commit}
        architectures = read_config(ctx.path(self.base_model)).get("architectures") or [""]
        if str(architectures[0]).endswith(("ForCausalLM", "ForConditionalGeneration")):
            named["task_type"] = "CAUSAL_LM"
        return named


def difference(tuned: Checkpoint, theirs: str, base: Checkpoint, name: str) -> Tensor:
    """W_model − W_base of one matrix, float32."""
    import torch

    rows, columns = base.info(name).shape
    values = torch.empty(rows, columns)
    step = max(1, _BLOCK // max(columns, 1))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        values[first:last].copy_(tuned.read_rows(theirs, first, last)).sub_(base.read_rows(name, first, last).float())
    return values


def _left_out(tuned: Checkpoint, base: Checkpoint, covered: Mapping[str, str]) -> dict[str, float | None]:
    """The norm of the difference of every tensor that differs and is not covered; None where it has none."""
    import torch

    aliases, found = Aliases(tuned, str(tuned.path)), dict[str, float | None]()
    for name in base:
        if name in covered or (match := aliases.find(name)) is None:
            continue
        info, other = base.info(name), tuned.info(match)
        if info.shape != other.shape or info.dtype not in FLOATS or other.dtype not in FLOATS:
            if (info.shape, info.dtype) != (other.shape, other.dtype):
                found[name] = None
            continue
        energy, step = 0.0, max(1, _BLOCK * info.rows // max(info.elements, 1))
        for first in range(0, info.rows, step):
            last = min(info.rows, first + step)
            one, two = tuned.read_rows(match, first, last).float(), base.read_rows(name, first, last).float()
            change = one - two
            if not is_finite(change):
                change = change.masked_fill(one == two, 0.0)  # infinite bounds that both have
            energy += float(torch.linalg.vector_norm(change)) ** 2
        if energy:
            found[name] = energy**0.5
    return found


def _work(ctx: Context, number: int, suffix: str) -> Path:
    return ctx.out / "work" / f"{number}.{suffix}"


def _targets(modules: list[str], base: Checkpoint) -> list[str]:
    """What makes PEFT inject exactly these modules: the last parts of their names, else the names."""
    last = {module.rpartition(".")[2] for module in modules}
    weights = [name.removesuffix(".weight") for name in base if name.endswith(".weight")]
    meant = {name for name in weights if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(modules) else modules
