"""Small checkpoints and adapters written by hand, and a context to run an op in without a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hubforge.op import Artifact, Context, Op


@pytest.fixture
def checkpoint_folder(tmp_path):
    """Writes tensors as a model folder with config and a token tokenizer, one tensor a shard when `shards` is set."""
    import torch
    from safetensors.torch import save_file

    def write(
        name: str, tensors: dict[str, torch.Tensor], *, shards: int = 1, config: dict[str, object] | None = None
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        names = list(tensors)
        files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
        if shards == 1:
            files = {"model.safetensors": names}
        for file, held in files.items():
            save_file({n: tensors[n].contiguous() for n in held}, folder / file, metadata={"format": "pt"})
        if shards > 1:
            weight_map = {n: file for file, held in files.items() for n in held}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy", "dtype": "bfloat16"}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_text("{}")
        return folder

    return write


@pytest.fixture
def adapter_folder(tmp_path):
    """Writes LoRA factors {module: (A, B)} as a PEFT adapter folder; further fields go to adapter_config.json."""
    import torch
    from safetensors.torch import save_file

    def write(name: str, modules: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {}
        for module, (a, b) in modules.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        rank = next(iter(modules.values()))[0].shape[0]
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"} | config
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return folder

    return write


@pytest.fixture
def context(tmp_path):
    """A Context whose inputs are folders: context(out="a", model=("model", folder), ...)."""

    def make(out: str = "out", *, report=lambda event: None, **inputs: tuple[str, Path]) -> Context:
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        artifacts = {name: Artifact(name, kind, f"key-of-{path}", path) for name, (kind, path) in inputs.items()}
        return Context(name=f"stages.{out}", out=folder, inputs=artifacts, where="recipes/toy.yaml:7", report=report)

    return make


@pytest.fixture
def run_op():
    """Runs an op as the interpreter does, and gives its context's folder and metrics."""

    def run(op: Op, ctx: Context, threads: int | None = 2):
        from hubforge.op import TensorOp
        from hubforge.tensors.engine import run_tensor_op

        return run_tensor_op(op, ctx, threads) if isinstance(op, TensorOp) else op.run(ctx)

    return run


@pytest.fixture
def tensors_of():
    """All tensors of a folder, by the safetensors library."""
    from safetensors.torch import load_file

    def load(folder: Path):
        return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}

    return load
