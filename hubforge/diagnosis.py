"""`hubforge doctor`: what is installed, which devices and tokens there are, and what is missing for which op."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from hubforge import __version__, catalog
from hubforge.machine import hardware
from hubforge.places import default_store, hub_folder, real_hub
from hubforge.sources import package_versions
from hubforge.store import existing

PACKAGES = (
    "huggingface_hub", "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "datasets", "lm_eval",
    "cyllama", "llama_cpp_python", "starlette", "uvicorn",
)  # fmt: skip
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUBFORGE_HUB_TOKEN")


def examine() -> dict[str, Any]:
    """Everything, as data. Tokens by the name of where they are, never by value."""
    tokens = [name for name in TOKENS if os.environ.get(name)]
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    if Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token").is_file():
        tokens.append("saved by `hf auth login`")
    ops = []
    for entry in catalog.everything():
        missing = [name for name in entry.op.requires if importlib.util.find_spec(name) is None]
        mend = f"pip install 'hubforge[{entry.op.extra}]'" if entry.op.extra else f"pip install {' '.join(missing)}"
        ops.append({"op": f"{entry.section}.{entry.name}", "missing": missing, "mend": mend if missing else ""})
    store = default_store(Path("recipe.yaml"))
    return {
        "hubforge": __version__,
        "machine": hardware() | {"gpus": _gpus()},
        "packages": package_versions(PACKAGES),
        "endpoint": real_hub().endpoint,
        "tokens": tokens,
        "store": {"folder": str(store), "free_bytes": shutil.disk_usage(existing(store)).free},
        "embedded_hub": str(hub_folder()),
        "ops": ops,
    }


def _gpus() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def print_findings(found: dict[str, Any]) -> None:
    from rich.markup import escape

    from hubforge.show import console, size, table

    machine = found["machine"]
    rows = table("", "")
    rows.show_header = False
    rows.add_row("hubforge", found["hubforge"])
    rows.add_row("python", f"{machine['python']}, {machine['platform']}")
    rows.add_row("cpu", f"{machine['cpu']}, {machine['cores']} cores")
    if "memory" in machine:
        rows.add_row("memory", size(machine["memory"]))
    rows.add_row("gpus", ", ".join(machine["gpus"]) or "none that torch sees")
    rows.add_row("store", f"{escape(found['store']['folder'])} ({size(found['store']['free_bytes'])} free)")
    rows.add_row("hub", found["endpoint"])
    rows.add_row("token", ", ".join(found["tokens"]) or "none: `hf auth login`, or set HF_TOKEN")
    for name, version in found["packages"].items():
        rows.add_row(name, version if version != "absent" else "[dim]absent[/dim]")
    console.print(rows)
    lacking = [op for op in found["ops"] if op["missing"]]
    for op in lacking:
        console.print(
            f"[yellow]![/yellow] {op['op']} lacks {', '.join(op['missing'])}: [bold]{escape(op['mend'])}[/bold]"
        )
    if not lacking:
        console.print(f"[green]✓[/green] every op can run here ({len(found['ops'])})")
