"""kill -9 at any moment of a run, then run again: the same bytes, and nothing complete is made twice."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """\
name: killed
sources:
  base: {{model: {base}}}
  one: {{adapter: {one}}}
  two: {{adapter: {two}}}
stages:
  voices: {{op: average, adapters: [one, two]}}
  loud: {{op: apply, model: base, adapters: [voices], scale: 0.9}}
  soft: {{op: apply, model: base, adapters: [one], scale: 0.1}}
  mixed: {{op: slerp, model: loud, to: soft, t: 0.3}}
"""


def command(recipe: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "hubforge.cli", "--store", str(store), "--quiet", "run", str(recipe)]


def artifacts(store: Path) -> dict[str, dict]:
    """The manifest of every whole artifact, by step name."""
    found = [json.loads(path.read_text()) for path in store.glob("artifacts/*/manifest.json")]
    return {manifest["name"]: manifest for manifest in found}


def digests(store: Path) -> dict[str, list]:
    return {name: manifest["files"] for name, manifest in artifacts(store).items()}


@pytest.mark.slow
def test_kill_at_ten_random_moments(tmp_path, tiny_llama, tiny_loras):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(base=tiny_llama, one=tiny_loras["one"], two=tiny_loras["low"]))
    began = time.monotonic()
    subprocess.run(command(recipe, tmp_path / "calm"), check=True, timeout=300)
    length = time.monotonic() - began
    store, moments = tmp_path / "killed", random.Random(0)
    for _ in range(10):
        before = artifacts(store)
        process = subprocess.Popen(command(recipe, store))
        time.sleep(moments.uniform(0.1, 1.1) * length)
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = artifacts(store)
        assert all(after[name] == manifest for name, manifest in before.items())  # not even its time has changed
    subprocess.run(command(recipe, store), check=True, timeout=300)
    assert digests(store) == digests(tmp_path / "calm")
    assert not list(store.glob("artifacts/*.part"))
