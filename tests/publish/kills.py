"""kill -9 of the real `hubforge publish --to URL` at drawn moments; see `schedules` for what must hold."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from hubforge.hub.storage.shelf import Shelf
from hubforge.publisher import Hub
from tests.publish.faulty import Fault, FaultyHub
from tests.publish.schedules import SETTINGS, TOKEN, Watcher, Whole

RECIPE = """\
name: killed
license: mit
sources:
  base: {{model: ./base}}
  one: {{adapter: ./one}}
publish:
  weights: {{op: hub, repo: me/one, model: base, tag: v{version}, collection: Ours}}
  adapter: {{op: hub, repo: me/two, adapter: one, tag: v{version}}}
  closed: {{op: hub, repo: me/closed, adapter: one, private: true, tag: v{version}}}
"""


def make_project(folder: Path, version: int) -> Path:
    """A recipe that publishes a model and an adapter as they are; other weights for each version."""
    import numpy
    from safetensors.numpy import save_file

    values = numpy.full((64, 64), version, dtype=numpy.float32)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "dtype": "float32"}
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for name, file, settings, data in (
        ("base", "model.safetensors", config, {"model.norm.weight": values[0], "lm_head.weight": values}),
        ("one", "adapter_model.safetensors", adapter, {"a.q_proj.lora_A.weight": values[:4]}),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / ("config.json" if name == "base" else "adapter_config.json")).write_text(json.dumps(settings))
        save_file(data, folder / name / file)
    recipe = folder / "killed.yaml"
    recipe.write_text(RECIPE.format(version=version))
    return recipe


def publish_command(recipe: Path, server: FaultyHub) -> subprocess.Popen[str]:
    """The real command, in a process of its own."""
    command = [sys.executable, "-m", "hubforge.cli", "--store", str(recipe.parent / "store"), "--quiet"]
    environment = {**os.environ, "HUBFORGE_HUB_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [*command, "publish", str(recipe), "--to", server.endpoint],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_kills(number: int, root: Path, seed: int = 0) -> Counter[str]:
    """So many kills of the real command, at drawn moments; each release is then finished by one more publish.

    A moment is one request: just before it is done, right after, or some milliseconds later. Often the publish that
    goes on from there is killed as well. What each release should be is told by a calm publish of it to another Hub.
    """
    draw, counts = random.Random(seed), Counter[str]()
    whole: Whole = {"me/one": [], "me/two": [], "me/closed": []}
    watcher = Watcher(root / "hub", whole, frozenset({"me/closed"}))
    state: dict[str, Any] = {"left": -1, "how": "", "child": None}

    def fault(method: str, path: str) -> Fault | None:
        watcher.arrives(method, path)
        state["left"] -= 1
        if state["left"] == 0 and state["how"] == "before":
            state["child"].send_signal(signal.SIGKILL)
            return "reset"
        return None

    def watch(method: str, path: str, fault: Fault | None) -> None:
        if state["left"] == 0 and state["how"] == "after":
            state["child"].send_signal(signal.SIGKILL)
        elif state["left"] == 0 and state["how"] == "later":
            threading.Timer(draw.random() * 0.02, state["child"].send_signal, [signal.SIGKILL]).start()
        watcher.look(method, path, fault)

    with (
        FaultyHub(root / "calm", SETTINGS) as calm,
        FaultyHub(root / "hub", SETTINGS, fault, watch=watch) as server,
    ):
        hub, version = Hub(server.endpoint, TOKEN), 0
        while counts["killed"] < number:
            recipe, before = make_project(root / "project", version), len(calm.seen)
            finish(publish_command(recipe, calm))
            requests = len(calm.seen) - before
            for id, releases in whole.items():
                repo = Shelf(root / "calm").get("models", id)
                tree = repo.tree(repo.commit(repo.refs()["refs/heads/main"]))
                releases.append({path: (one.etag,) for path, one in tree.files.items() if path != ".gitattributes"})
            while counts["killed"] < number:
                state.update(how=draw.choice(("before", "after", "later")), left=draw.randint(1, requests))
                state["child"] = publish_command(recipe, server)
                state["child"].communicate(timeout=120)
                killed = state["child"].returncode == -signal.SIGKILL
                counts["killed" if killed else "came through"] += 1
                if not killed or draw.random() < 0.5:
                    break
            state.update(left=-1, how="")
            try:
                finish(publish_command(recipe, server))
                watcher.check_end(hub, version)
            except Exception as error:
                counts["broken"] += 1
                print(f"release {version}: {type(error).__name__}: {error}", flush=True)
                watcher.broken.clear()
            version += 1
        counts["releases"], counts["requests"] = version, len(server.seen)
    return counts


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a publish that must end well."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
