"""The solver of `op: subspace` beside torch's SVDs, on Gemma 4 E4B's shapes: `python bench/subspace.py [--k 64 256]`.

Random float32 deltas with a gapped spectrum, an i^-1/2 and an i^-1 power law, one at a time. For each matrix and k: CPU
seconds of ours, of `torch.linalg.svd` and of `torch.svd_lowrank(q=k + 16, niter=2)`, and the sine of the largest
principal angle to LAPACK's eigenvectors in float64; where the gap at k is too small for an angle to mean anything, "no
gap" stands instead, and the residual and the captured share tell. Last, in a process of its own, the peak memory of the
whole op on two layers of E4B in bfloat16, one with sliding and one with full attention. A quarter of an hour in all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hubforge.tensors.spectrum import leading

# (out, in) of the matrices of a layer with sliding attention, of one with full attention (head_dim 512), of the MLP.
SHAPES = {
    "k, v": (512, 2560),
    "k, v full": (1024, 2560),
    "q": (2048, 2560),
    "o": (2560, 2048),
    "q full": (4096, 2560),
    "o full": (2560, 4096),
    "gate, up": (10240, 2560),
    "down": (2560, 10240),
}
ROUNDING = 2.0**-25  # of float32, relative, on average


def timed(what: Callable[..., Any], *args: Any, **how: Any) -> tuple[Any, float]:
    began = time.process_time()
    found = what(*args, **how)
    return found, time.process_time() - began


def spectrum_of(kind: str, count: int, ks: list[int]) -> torch.Tensor:
    i = torch.arange(1, count + 1, dtype=torch.float64)
    if kind == "gapped":  # Slow decay, but for a step down by 3 after each k.
        return (i + 64) ** -0.5 * torch.stack([torch.where(i > k, 1 / 3, 1.0) for k in ks]).prod(0)
    return i ** (-0.5 if kind == "i^-1/2" else -1.0)


def sine(found: torch.Tensor, true: torch.Tensor) -> float:
    found, true = found.double(), true.double()
    return float(torch.linalg.matrix_norm(found - true @ (true.T @ found), 2))


def exact(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues and eigenvectors, rising, of the Gram matrix on W's smaller side; float64, by LAPACK."""
    wide = W.double() if W.shape[0] <= W.shape[1] else W.double().T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    return values, vectors


def measure(kinds: list[str], ks: list[int], shapes: dict[str, tuple[int, int]]) -> None:
    print("CPU seconds of one thread; sine of the largest angle to LAPACK's float64 eigenvectors, and ours as bounded")
    print(
        f"{'matrix':9} {'spectrum':8} {'k':>4} {'ours s':>7} {'svd s':>6} {'ratio':>6} {'lowrank s':>9} "
        f"{'sine':>8} {'bound':>8} {'lowrank':>8} {'captured':>8} {'residual':>8}  solver"
    )
    ours_total, svd_total = dict.fromkeys(ks, 0.0), dict.fromkeys(ks, 0.0)
    for name, (rows, columns) in shapes.items():
        count = min(rows, columns)
        generator = torch.Generator().manual_seed(rows + columns)
        left = torch.linalg.qr(torch.randn(rows, count, dtype=torch.float64, generator=generator))[0]
        right = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64, generator=generator))[0]
        for kind in kinds:
            limits = [min(k, count // 2) for k in ks]  # as the op limits them
            W = ((left * spectrum_of(kind, count, limits)) @ right.T).float()
            _, svd = timed(torch.linalg.svd, W, full_matrices=False)
            values, vectors = exact(W)
            for wanted, k in zip(ks, limits, strict=True):
                found, ours = timed(leading, W, k)
                lowrank, peer = timed(torch.svd_lowrank, W, q=min(k + 16, count), niter=2)
                side = 0 if rows <= columns else 2
                # What rounding in float64 alone may turn: then the reference is no better than chance.
                lost = 2.0**-52 * float(values.sum()) / float(values[-k] - values[-k - 1])
                angle = other = "no gap"
                if lost < 1e-4:
                    true = vectors[:, -k:]
                    angle = f"{sine(found.U if side == 0 else found.V, true):.1e}"
                    other = f"{sine(lowrank[side][:, :k], true):.1e}"
                print(
                    f"{name:9} {kind:8} {k:4} {ours:7.2f} {svd:6.2f} {svd / ours:5.1f}x {peer:9.2f} {angle:>8} "
                    f"{found.angle_bound:8.1e} {other:>8} {found.captured:8.5f} {found.residual:8.1e}  {found.solver}",
                    flush=True,
                )
                ours_total[wanted] += ours
                svd_total[wanted] += svd
    for k in ks:
        print(f"all of these at k={k}: torch.linalg.svd takes {svd_total[k] / ours_total[k]:.1f} times as long")


MEMORY = """
import json, resource, sys
from pathlib import Path
from hubforge.masks.subspace import Subspace
from hubforge.op import Artifact, Context
import numpy, scipy.linalg, torch
import hubforge.tensors.reader

def peak():  # bytes; getrusage tells the parent's, when that was larger
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder, k = Path(sys.argv[1]), int(sys.argv[2])
inputs = {name: Artifact(name, "model", "k", folder / name) for name in ("it", "pt")}
out = folder / "out"
out.mkdir()
before = peak()
op = Subspace.model_validate({"instruct": "it", "pretrained": "pt", "rank": k})
metrics = op.run(Context("masks.core", out, inputs))
print(json.dumps([before, peak(), metrics["matrices"]]))
"""


def memory(k: int) -> None:
    """Peak resident memory of the whole op, on a sliding and a full layer of E4B."""
    from safetensors.torch import save_file

    layers = {
        0: {"self_attn.q_proj": "q", "self_attn.k_proj": "k, v", "self_attn.o_proj": "o"},
        1: {"self_attn.q_proj": "q full", "self_attn.k_proj": "k, v full", "self_attn.o_proj": "o full"},
    }
    mlp = {"mlp.gate_proj": "gate, up", "mlp.up_proj": "gate, up", "mlp.down_proj": "down"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed, model in enumerate(("it", "pt")):
            (folder / model).mkdir()
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                f"model.layers.{layer}.{module}.weight": torch.randn(SHAPES[shape], generator=generator).bfloat16()
                for layer, modules in layers.items()
                for module, shape in (modules | mlp).items()
            }
            save_file(tensors, folder / model / "model.safetensors")
            (folder / model / "config.json").write_text("{}")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(folder), str(k)], check=True, capture_output=True, text=True
        )
    before, peak, matrices = json.loads(done.stdout.splitlines()[-1])
    print(
        f"op: subspace, {matrices} matrices of two layers, k={k}: peak {peak / 1e9:.2f} GB resident, of which the "
        f"libraries, before it starts, {before / 1e9:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--spectra", nargs="+", default=["gapped", "i^-1/2", "i^-1"])
    parser.add_argument("--only-memory", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    chosen = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # Read when torch and scipy are loaded: start anew.
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if not chosen.only_memory:
        measure(chosen.spectra, chosen.k, {name: SHAPES[name] for name in chosen.shapes})
    for k in chosen.k:
        memory(k)


if __name__ == "__main__":
    main()
