"""What a page's first screen needs: its title, the facts in a line, the snippet's names, the files, the references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hubforge.cards.frontmatter import base_models
from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import code, linkify, repo_link, text
from hubforge.cards.numbers import big_count, size
from hubforge.cards.quants import gguf_file, quant_type, suggested
from hubforge.release import FILE_NAME, SUMS_NAME, File, StepRecord

Row = dict[str, str]
_ORDER = ("model", "adapter", "mask", "gguf")
_PROMPT = "Write a short story about a lighthouse."


@dataclass(frozen=True)
class Usage:
    """Names for the snippet of a page; plain strings, to be quoted by the `py` filter."""

    repo: str
    revision: str
    prompt: str
    chat: bool
    base: str  # of an adapter: its base's repository, or "" when that is not on the Hub
    gguf_file: str
    gguf_type: str
    mask_file: str
    mask_folder: str


def usage(lineage: Lineage) -> Usage:
    target = lineage.target
    quant = suggested(lineage)
    file = gguf_file(quant) if quant else None
    base = base_models(lineage)[0] if target.kind == "adapter" else []
    mask = next((one for step in lineage.made for one in step.files if one.path.endswith(".safetensors")), None)
    return Usage(
        repo=target.repo,
        revision=target.tag or "",
        prompt=lineage.release.card.prompt or _PROMPT,
        chat=has_chat_template(lineage),
        base=base[0] if base else "",
        gguf_file=in_repository(lineage, file) if file else "",
        gguf_type=quant_type(quant) if quant else "",
        mask_file=lineage.place(mask.path) if mask else "",
        mask_folder=lineage.folder,
    )


def title(lineage: Lineage) -> str:
    """The author's title on the page it is meant for, and the GGUF page; else the repository's name. Markdown."""
    name = lineage.target.repo.rsplit("/", 1)[-1]
    stated = lineage.release.card.title
    if stated and is_primary(lineage):
        return text(stated)
    if stated and lineage.target.kind == "gguf":
        return f"{text(stated)}, GGUF"
    return text(name)


def is_primary(lineage: Lineage) -> bool:
    """Whether the author's text is about this target: the model of a release, else its adapter, masks, GGUF."""
    kinds = [target.kind for target in lineage.release.targets]
    return lineage.target.kind == min(kinds, key=_ORDER.index)


def glance(lineage: Lineage) -> list[str]:
    """The facts one looks for first, each a few words of Markdown."""
    target = lineage.target
    authors = lineage.release.card.authors
    facts = (
        [f"by {', '.join(authors[:-1])} and {authors[-1]}" if len(authors) > 1 else f"by {authors[0]}"]
        if authors
        else []
    )
    made = lineage.made[0] if lineage.made else None
    found: Mapping[str, object] = made.metrics if made else {}
    if target.kind == "model":
        facts += [
            f"{big_count(found.get('parameters'))} parameters" if big_count(found.get("parameters")) else "",
            text(found.get("dtype")),
        ]
    weights = [
        file for file in target.files or (made.files if made else ()) if file.path.endswith((".safetensors", ".gguf"))
    ]
    if weights and target.kind in ("model", "adapter"):
        total = size(sum(file.size for file in weights))
        facts.append(f"{total} in {len(weights)} shards" if len(weights) > 1 else total)
    if target.kind == "adapter" and made:
        rank = found.get("rank", made.fields.get("rank"))
        facts.append(f"rank {text(rank)}" if isinstance(rank, int) else "")
    facts += [_other(lineage, kind) for kind in _ORDER if kind != target.kind]
    if target.tag:
        facts.append(f"tag {code(target.tag)}")
    facts = [fact for fact in facts if fact]
    return [facts[0][0].upper() + facts[0][1:], *facts[1:]] if facts else []


def file_rows(lineage: Lineage, pictures: Mapping[str, str]) -> list[Row]:
    """The files of the repository with size and digest; not the card itself, whose digest it cannot hold."""
    own = {"README.md", FILE_NAME, SUMS_NAME, *pictures}
    files = lineage.target.files or _step_files(lineage)
    return [
        {"File": code(file.path), "Size": size(file.size), "SHA-256": code(file.sha256)}
        for file in sorted(files, key=lambda file: file.path)
        if file.path not in own and file.path.rsplit("/", 1)[-1] not in (FILE_NAME, SUMS_NAME)
    ]


def references(lineage: Lineage) -> list[str]:
    """The papers and code the methods come from, with the ops that use them; Markdown."""
    found: dict[str, list[str]] = {}
    evals = [step for step in lineage.release.steps if step.section == "evals"]
    for step in [*lineage.steps, *(step for step in evals if set(step.inputs.values()) & set(lineage.target.entries))]:
        if step.method_source and code(step.op) not in found.setdefault(step.method_source, []):
            found[step.method_source].append(code(step.op))
    return [f"{', '.join(ops)}: {linkify(source)}" for source, ops in found.items()]


def has_chat_template(lineage: Lineage) -> bool:
    """Whether the tokenizer is known to have a chat template: a file of its own, or a fact of a step or source."""
    files = [*lineage.target.files, *_step_files(lineage)]
    steps: list[StepRecord] = [step for step in lineage.steps if step.makes in ("model", "gguf")]
    models = [source for source in lineage.weights if source.kind == "model"]
    if lineage.target.kind != "model":
        files += [file for step in steps for file in step.files] + [file for source in models for file in source.files]
    named = any(file.path.rsplit("/", 1)[-1].startswith("chat_template.") for file in files)
    return (
        named
        or any(step.metrics.get("chat_template") for step in lineage.made)
        or any(source.facts.get("chat_template") for source in models)
    )


def in_repository(lineage: Lineage, file: File) -> str:
    """The path a step's file has in the repository."""
    for there in lineage.target.files:
        if there.sha256 == file.sha256 and there.path.endswith(file.path.rsplit("/", 1)[-1]):
            return there.path
    return lineage.place(file.path)


def _step_files(lineage: Lineage) -> list[File]:
    return [file.model_copy(update={"path": lineage.place(file.path)}) for step in lineage.made for file in step.files]


def _other(lineage: Lineage, kind: str) -> str:
    """A link to the release's repository of that kind, when it has one."""
    words = {"model": "model", "adapter": "adapter", "mask": "masks", "gguf": "GGUF"}[kind]
    repos = dict.fromkeys(target.repo for target in lineage.release.targets if target.kind == kind)
    links = [repo_link(repo) for repo in repos if repo != lineage.target.repo]
    return f"{words}: {', '.join(links)}" if links else ""
