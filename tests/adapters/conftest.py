"""Masks and data for training on the tiny models, and a context to train in."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hubforge.adapters.lora import Lora
from hubforge.events import Event
from hubforge.op import Artifact, Context
from hubforge.tensors.reader import open_checkpoint

LINEAR = re.compile(r"^(?:model\.|language_model\.)*layers\.\d+\.\S+_proj\.weight$")
K = 8


def make_mask(folder: Path, model: Path) -> Path:
    """A random subspace of each linear layer, in the files that `op: subspace` writes."""
    generator, tensors = torch.Generator().manual_seed(7), {}
    with open_checkpoint(model) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if LINEAR.match(name):
                for part, size in zip("UV", info.shape, strict=True):
                    basis = torch.linalg.qr(torch.randn(size, K, generator=generator)).Q
                    tensors[f"{name}.{part}"] = basis.contiguous()
                tensors[f"{name}.S"] = torch.ones(K)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "subspace.safetensors")
    (folder / "subspace.json").write_text(json.dumps({"unchanged": [], "matrices": {}}))
    return folder


@pytest.fixture(scope="session")
def llama_mask(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mask(tmp_path_factory.mktemp("masks") / "llama", tiny_llama)


@pytest.fixture(scope="session")
def chats() -> list[dict[str, Any]]:
    """Forty short chats of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {number}"},
                {"role": "assistant", "content": f"The old man said {number}" + ", and sat" * (number % 4) + "."},
            ]
        }
        for number in range(40)
    ]


FAST = {"dtype": "float32", "gradient_checkpointing": False, "rank": 4, "gradient_accumulation_steps": 1}
TWO = ["q_proj", "down_proj"]  # modules, where the seven would only take longer


def lora(**fields: object) -> Lora:
    return Lora.model_validate({"model": "it", "data": "rows", "max_steps": 4, "learning_rate": 0.01} | FAST | fields)


Prepare = Callable[..., Context]


@pytest.fixture
def prepare(tmp_path: Path, tiny_llama: Path, llama_mask: Path, chats: list[dict[str, Any]]) -> Prepare:
    """A context with the tiny Llama as `it`, its mask as `core` and the chats as `rows`, writing to a folder's name."""

    def made(
        name: str = "out",
        rows: list[dict[str, Any]] | None = None,
        model: Path = tiny_llama,
        mask: Path = llama_mask,
        report: Callable[[Event], None] = lambda event: None,
        **more: Artifact,
    ) -> Context:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in (chats if rows is None else rows)))
        (tmp_path / name).mkdir(exist_ok=True)
        inputs = {
            "it": Artifact("it", "model", "k1", model, origin={"repo": "me/tiny", "commit": "c" * 40}),
            "rows": Artifact("rows", "dataset", "k2", data),
            "core": Artifact("core", "mask", "k3", mask),
        }
        return Context("adapters.chat", tmp_path / name, inputs | more, where="r.yaml:9", report=report)

    return made
