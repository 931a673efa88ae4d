"""What a step ran on: the machine, and the git repository the recipe lies in. For manifests; never part of a key."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any


@cache
def hardware() -> dict[str, Any]:
    """cpu, cores, memory (bytes), platform, python; gpus by name when torch is loaded and sees any."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found


def gpus() -> list[str]:
    """Names of the GPUs torch sees; asks only when torch is already loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """The most memory that this process, or one of those it ran, has held so far, in bytes; 0 where none tells."""
    try:
        import resource
    except ImportError:
        return 0
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def git_state(folder: Path) -> dict[str, Any] | None:
    """commit, dirty and remote (without credentials) of the repository around a folder; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    state: dict[str, Any] = {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    if remote := git("remote", "get-url", "origin"):
        # Credentials stand before the host; a path on this machine is nobody else's business.
        if match := re.match(r"^(https?://)(?:[^@/]*@)?(.+)$", remote):
            state["remote"] = match.group(1) + match.group(2)
        elif re.match(r"^[\w.-]+@[\w.-]+:[\w./-]+$", remote):
            state["remote"] = remote
    return state
