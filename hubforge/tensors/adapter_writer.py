"""Merge adapters into one module by module, and write it as a PEFT folder that `PeftModel.from_pretrained` loads."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError
from hubforge.op import Context, Metrics
from hubforge.processes import processors
from hubforge.tensors import dtypes
from hubforge.tensors.adapter import WEIGHTS, Adapter, LoraModule
from hubforge.tensors.adapter_config import CONFIG
from hubforge.tensors.allocator import keep_freed_memory
from hubforge.tensors.layout import Layout, lay_out
from hubforge.tensors.names import Aliases
from hubforge.tensors.writer import store_error, write_whole

if TYPE_CHECKING:
    from torch import Tensor

# Which modules an adapter is injected into; carried over only when all adapters agree on them.
_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Merged:
    """One module of the output, and the module of each adapter that has it, by the adapter's position."""

    name: str
    parts: Mapping[int, LoraModule]

    @property
    def first(self) -> LoraModule:
        return next(iter(self.parts.values()))


def align(adapters: Sequence[Adapter], where: str = "") -> list[Merged]:
    """The modules of all adapters, matched by name across `model.` and `model.language_model.`.

    StepError when one module has two shapes.
    """
    found: dict[str, dict[int, LoraModule]] = {}
    for position, adapter in enumerate(adapters):
        adapter.require_plain()
        # The first adapter that has a module names it.
        known = Aliases(list(found), adapter.where)
        for module in adapter.modules.values():
            found.setdefault(known.find(module.name) or module.name, {})[position] = module
    for name, parts in found.items():
        (at, one), *rest = parts.items()
        for position, other in rest:
            if (one.shape, one.embedding, one.transposed) != (other.shape, other.embedding, other.transposed):
                what = (
                    f"the delta of {name} is {list(one.shape)} in {adapters[at].where}, "
                    f"but {list(other.shape)} in {adapters[position].where}"
                )
                raise StepError(what, where=where, mend="Adapters of different base models cannot be merged.")
    return [Merged(name, parts) for name, parts in found.items()]


def merge_adapters(
    ctx: Context,
    adapters: Sequence[Adapter],
    merge: Callable[[Merged], tuple[Tensor, Tensor]],
    rank: Callable[[Merged], int],
    dtype: str = "float32",
) -> Metrics:
    """Write the adapter whose factors `merge` gives for each module, with a scaling of 1; its metrics.

    merge: the factors A (rank, in_features) and B (out_features, rank), float32; called from several threads.
    rank: how many rows A will have. The digest of the weights goes to `ctx.sha256`.
    """
    modules = sorted(align(adapters, ctx.where), key=lambda module: module.name)
    kind = dtypes.from_torch(dtype)
    ranks = {module.name: rank(module) for module in modules}
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
    for module in modules:
        key_a, key_b = _keys(module)
        shapes.append((key_a, kind, (ranks[module.name], module.first.a.shape[1])))
        shapes.append((key_b, kind, (module.first.b.shape[0], ranks[module.name])))
    layout = lay_out(shapes, max_shard_bytes=1 << 62, stem=WEIGHTS.removesuffix(".safetensors"))
    ctx.sha256[WEIGHTS] = _write(ctx, layout, modules, merge)
    config = _config(adapters, modules, ranks)
    write_whole(ctx.out / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    return {
        "parameters": sum(slot.nbytes * 8 // dtypes.BITS[kind] for slot in layout.slots.values()),
        "bytes": layout.nbytes,
        "dtype": dtype,
        "modules": len(modules),
        "rank": max(ranks.values()),
    }


def _keys(module: Merged) -> tuple[str, str]:
    stem = f"base_model.model.{module.name}"
    if module.first.embedding:
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _write(
    ctx: Context, layout: Layout, modules: Sequence[Merged], merge: Callable[[Merged], tuple[Tensor, Tensor]]
) -> str:
    """Write the weights in the order of their bytes; their sha256."""
    import torch

    ctx.out.mkdir(parents=True, exist_ok=True)
    partial = ctx.out / f"{WEIGHTS}.partial"
    header = layout.headers[WEIGHTS]
    digest = hashlib.sha256(header)
    done, total = 0, layout.nbytes - len(header)
    by_key = {key: module for module in modules for key in _keys(module)}
    order = list(dict.fromkeys(by_key[key].name for key in layout.slots))
    named = {module.name: module for module in modules}
    try:
        with partial.open("wb") as file:
            file.write(header)
            merged = _in_threads([named[name] for name in order], merge)
            for (a, b), name in zip(merged, order, strict=True):
                for key, factor in zip(_keys(named[name]), (a, b), strict=True):
                    slot = layout.slots[key]
                    if tuple(factor.shape) != slot.shape:
                        raise TypeError(f"{key} came out as {list(factor.shape)}, not {list(slot.shape)}")
                    if not bool(torch.isfinite(factor).all()):
                        raise StepError(f"{name} would hold NaN or infinity: an adapter is damaged", where=ctx.where)
                    stored = factor.to(dtypes.torch_dtype(slot.dtype)).contiguous()
                    data = memoryview(stored.reshape(-1).view(torch.uint8).numpy())
                    file.write(data)
                    digest.update(data)
                    done += len(data)
                ctx.progress(done, total, "B", name)
        partial.replace(ctx.out / WEIGHTS)
    except OSError as error:
        raise store_error(error, partial) from error
    return digest.hexdigest()


def _in_threads(
    modules: Sequence[Merged], merge: Callable[[Merged], tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The merged factors of the modules, in their order; a few are computed ahead, each by one thread."""
    import torch

    def work(module: Merged) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return merge(module)

    before = torch.get_num_threads()
    keep_freed_memory()
    torch.set_num_threads(1)  # here too: what this thread does to the results would have others spin for its sake
    threads = processors()
    waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
        try:
            for module in modules:
                waiting.append(pool.submit(work, module))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(before)


def _config(adapters: Sequence[Adapter], modules: Sequence[Merged], ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json of the merged adapter: every scaling is 1, so alpha is the rank and rsLoRA is off."""
    first = adapters[0].config.raw
    rank = max(ranks.values())
    others = {name: other for name, other in ranks.items() if other != rank}
    kept = {name: first[name] for name in ("base_model_name_or_path", "revision", "task_type") if name in first}
    return kept | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": adapters[0].config.fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        **_targets([adapter.config.raw for adapter in adapters], modules),
    }


def _targets(configs: Sequence[Mapping[str, Any]], modules: Sequence[Merged]) -> dict[str, Any]:
    """The fields that make PEFT inject exactly these modules."""
    fields = [{name: config.get(name) for name in _TARGETING} for config in configs]
    patterns: list[Any] = [field["target_modules"] for field in fields]
    if patterns[0] and all(field == fields[0] for field in fields):
        return fields[0] if isinstance(patterns[0], str) else fields[0] | {"target_modules": sorted(patterns[0])}
    filtered = any(field[name] for field in fields for name in _TARGETING[1:])
    if not filtered and all(isinstance(pattern, list) and pattern for pattern in patterns):
        return {"target_modules": sorted({name for pattern in patterns for name in pattern})}
    if not filtered and all(isinstance(pattern, str) and pattern for pattern in patterns):
        return {"target_modules": "|".join(f"({pattern})" for pattern in dict.fromkeys(patterns))}
    return {"target_modules": [module.name for module in modules]}
