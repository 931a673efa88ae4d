"""How much longer a training step takes under a mask: `python bench/training.py [--hidden 1024 --rank 16 ...]`.

Builds a Llama with random weights and a random subspace per matrix, and trains the same LoRA on the same rows without
a mask, with `projection: none` (only measured) and with each projection asked for, in turns. Prints the median over
the turns of seconds per step (on a CPU of processor time, which other work on the machine disturbs least), its ratio to
training without a mask, and the share of the steps' time that is spent inside the callback. The leak is measured
twenty times in a run, whatever its length: with few steps that is most of what a mask costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from hubforge.adapters import _guard
from hubforge.adapters.lora import Lora
from hubforge.events import Event, Progress
from hubforge.lab.tiny import tiny_llama
from hubforge.op import Artifact, Context, Settings
from hubforge.tensors.reader import open_checkpoint


def make_mask(folder: Path, model: Path, k: int) -> None:
    generator, tensors = torch.Generator().manual_seed(0), {}
    with open_checkpoint(model) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if name.endswith("_proj.weight"):
                for part, size in zip("UV", info.shape, strict=True):
                    tensors[f"{name}.{part}"] = torch.linalg.qr(
                        torch.randn(size, k, generator=generator)
                    ).Q.contiguous()
                tensors[f"{name}.S"] = torch.ones(k)
    folder.mkdir()
    save_file(tensors, folder / "subspace.safetensors")


class Clock:
    """Adds up the time spent in the guard's two calls per step, and notes that of the first and last step."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds = self.after_first = self.per_step = 0.0
        for name in ("before_step", "after_step"):
            setattr(_guard.Guard, name, self.timed(getattr(_guard.Guard, name)))

    def timed(self, call):  # type: ignore[no-untyped-def]
        def timed(guard: _guard.Guard) -> None:
            self.wait()
            began = self.now()
            call(guard)
            self.wait()
            self.seconds += self.now() - began

        return timed

    def wait(self) -> None:
        """For what a GPU has been given to do: the backward pass is not the callback's."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def report(self, event: Event) -> None:
        if isinstance(event, Progress) and event.unit == "step":
            if event.done == 1:
                self.after_first, self.seconds = self.now(), 0.0
            else:
                self.per_step = (self.now() - self.after_first) / (event.done - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("layers", 2), ("rank", 16), ("k", 64), ("batch", 4), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--projections", nargs="*", default=["two_sided", "scale"])
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-training-"))
    size = {"hidden_size": given.hidden, "intermediate_size": 4 * given.hidden, "num_hidden_layers": given.layers}
    model = tiny_llama(folder / "model", **size, num_attention_heads=8, num_key_value_heads=4, max_shard_size="5GB")
    make_mask(folder / "mask", model, given.k)
    draw = random.Random(0)
    rows = [{"text": "".join(draw.choices("abcdefgh ", k=8 * given.length))} for _ in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {
        "model": Artifact("model", "model", "k", model),
        "rows": Artifact("rows", "dataset", "k", folder / "rows.jsonl"),
        "mask": Artifact("mask", "mask", "k", folder / "mask"),
    }
    clock = Clock(time.perf_counter if torch.cuda.is_available() else time.process_time)
    seconds: dict[str, list[float]] = {name: [] for name in ("no mask", "none", *given.projections)}
    shares: dict[str, list[float]] = {name: [] for name in seconds}
    for turn in range(given.turns):
        for name in seconds:
            out = folder / f"{name}-{turn}"
            out.mkdir()
            masked = {} if name == "no mask" else {"protect": "mask", "projection": name}
            op = Lora.model_validate(
                {"model": "model", "data": "rows", "rank": given.rank, "max_steps": given.steps, "dtype": "float32"}
                | {"per_device_train_batch_size": given.batch, "gradient_accumulation_steps": 1}
                | {"max_length": given.length, "gradient_checkpointing": False, "save_steps": 10**6, **masked}
            )
            op.run(Context("bench", out, inputs, Settings(device=given.device), report=clock.report))
            seconds[name].append(clock.per_step)
            shares[name].append(clock.seconds / (given.steps - 1) / clock.per_step)
    plain = statistics.median(seconds["no mask"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, {platform.machine()}, torch {torch.__version__}; {vars(given)}")
    print(f"{'':>12} s per step   ratio   share of the callback")
    for name, times in seconds.items():
        middle, share = statistics.median(times), statistics.median(shares[name])
        print(f"{name:>12} {middle:10.4f} {middle / plain:7.3f} {share:12.4f}")


if __name__ == "__main__":
    main()
