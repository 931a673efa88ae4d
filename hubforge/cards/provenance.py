"""Where it comes from: inputs with commits, steps with keys, versions, machines, the recipe's repository."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import HUB, code, is_repo, link, listed, text, url
from hubforge.cards.numbers import count, duration, size
from hubforge.release import SourceRecord, StepRecord

Row = dict[str, str]
SHORT_KEY = 12


def input_rows(lineage: Lineage) -> list[Row]:
    """Every source behind what is published, with the commit its bytes came from."""
    return [
        {
            "Input": code(source.name),
            "Kind": text(source.kind),
            "From": _origin(source),
            "Split": text(source.split),
            "Revision": code(source.revision) if source.revision != source.commit else "",
            "Commit": _commit(source),
            "Licence": text(source.license),
            "Size": size(sum(file.size for file in source.files)) if source.files else "",
        }
        for source in lineage.sources
    ]


def step_rows(lineage: Lineage) -> list[Row]:
    """Every step behind the page, its evals included, with key, start and time taken."""
    steps = shown_steps(lineage)
    machines = _distinct(machine(step) for step in steps)
    return [
        {
            "Step": code(step.name),
            "Op": code(step.op),
            "Key": code(step.key[:SHORT_KEY]),
            "Started (UTC)": text(step.started.replace("T", " ").removesuffix("+00:00").removesuffix("Z")[:19]),
            "Took": _took(lineage, step),
            "Machine": machine(step) if len(machines) > 1 else "",
            "Same bytes again": "" if step.exact else "not promised",
        }
        for step in steps
    ]


def _took(lineage: Lineage, step: StepRecord) -> str:
    passes = lineage.passes_of(step)
    return f"in {listed([code(name) for name in passes])}" if passes else duration(step.seconds)


def shown_steps(lineage: Lineage) -> list[StepRecord]:
    """The steps that led here and the evals of what is published, in the order they ran."""
    behind = {step.name for step in lineage.steps}
    measured = set(lineage.target.entries)
    return [
        step
        for step in lineage.release.steps
        if step.name in behind or (step.section == "evals" and measured & set(step.inputs.values()))
    ]


def machine(step: StepRecord) -> str:
    """One line on the machine a step ran on, as far as known: "2 × AMD EPYC, 24 GB, NVIDIA H200". Markdown."""
    known = step.hardware
    parts: list[str] = []
    cpu, cores = known.get("cpu"), known.get("cores")
    if cpu and cores:
        parts.append(f"{text(cpu)} ({count(cores)} cores)")
    elif cpu or cores:
        parts.append(text(cpu) if cpu else f"{count(cores)} cores")
    if memory := size(known.get("memory")):
        parts.append(f"{memory} of memory")
    gpus = known.get("gpus")
    if isinstance(gpus, (list, tuple)) and gpus:
        parts += [f"{gpus.count(gpu)} × {text(gpu)}" if gpus.count(gpu) > 1 else text(gpu) for gpu in _distinct(gpus)]
    if known.get("platform"):
        parts.append(text(known["platform"]))
    return ", ".join(parts)


def one_machine(lineage: Lineage) -> str:
    """The machine all steps ran on; "" when they differ (the table then has a column) or none is known."""
    machines = _distinct(machine(step) for step in shown_steps(lineage))
    return machines[0] if len(machines) == 1 else ""


def versions(lineage: Lineage) -> list[tuple[str, str]]:
    """Each package with the version, or versions, that the steps ran with; in alphabetical order."""
    found: dict[str, list[str]] = {}
    for step in shown_steps(lineage):
        for package, version in step.versions.items():
            if version and version not in found.setdefault(package, []):
                found[package].append(version)
    return [(code(package), " and ".join(text(item) for item in found[package])) for package in sorted(found)]


def recipe_commits(lineage: Lineage) -> list[str]:
    """Sentences on the repository the recipe lies in: commit, remote, and whether it held changes not committed."""
    states: list[dict[str, Any]] = []
    for step in shown_steps(lineage):
        if step.git and step.git.get("commit") and step.git not in states:
            states.append(step.git)
    lines: list[str] = []
    for state in states:
        commit, remote = str(state["commit"]), web_address(state.get("remote"))
        digits = commit[:SHORT_KEY]
        line = f"commit {code(digits)}"
        if remote:
            place = link(remote.removeprefix("https://"), remote)
            line = f"commit {link(digits, f'{remote}/commit/{commit}')} of {place}"
        lines.append(line + (", with changes that were not committed" if state.get("dirty") else ""))
    return lines


def commands(lineage: Lineage) -> dict[str, str]:
    """`verify` and `reproduce`: the command lines of those verbs for this repository, at its tag.

    A local source is only with its author: `reproduce` wants to be told where each lies, by its name.
    """
    target = lineage.target
    where = shlex.quote(f"{target.repo}@{target.tag}" if target.tag else target.repo)
    folder = f" --folder {shlex.quote(lineage.folder)}" if lineage.folder else ""
    local = "".join(
        f" --source {shlex.quote(f'{source.name}=PATH')}" for source in lineage.release.sources if not source.repo
    )
    return {
        "verify": f"hubforge verify {where}{folder}",
        "reproduce": f"hubforge reproduce {where}{folder} --into again{local}" if lineage.release.recipe else "",
    }


def web_address(remote: object) -> str:
    """The https page of a git remote, without credentials; "" when it has none."""
    if not isinstance(remote, str):
        return ""
    address = remote.strip().removesuffix("/").removesuffix(".git")
    if address.startswith("git@") and ":" in address:
        host, path = address[4:].split(":", 1)
        address = f"https://{host}/{path}"
    address = address.replace("ssh://git@", "https://", 1)
    return url(address) if address.startswith("https://") else ""


def _origin(source: SourceRecord) -> str:
    if source.repo:
        prefix = "datasets/" if source.kind == "dataset" else ""
        return link(source.repo, f"{HUB}/{prefix}{source.repo}") if is_repo(source.repo) else code(source.repo)
    return f"local {code(source.path)}" if source.path else "local"


def _commit(source: SourceRecord) -> str:
    """The first digits of the commit, linked to the files at it; for a local source, of its content's key."""
    if source.commit:
        digits = source.commit[:SHORT_KEY]
        prefix = "datasets/" if source.kind == "dataset" else ""
        if source.repo and is_repo(source.repo):
            return link(digits, f"{HUB}/{prefix}{source.repo}/tree/{source.commit}")
        return code(digits)
    return f"content {code(source.key[:SHORT_KEY])}" if source.key else ""


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(item for item in items if item))
