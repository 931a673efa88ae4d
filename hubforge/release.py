"""Release: everything that is known of what a recipe made. The only input of a card, and what `verify` reads.

A release is plain data: it is written as `hubforge.release.json` beside what it describes, and anyone who has that file
can render the card again, check every digest, and rebuild the model from the recipe and the commits in it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hubforge.op import Kind

FILE_NAME = "hubforge.release.json"
SUMS_NAME = "SHA256SUMS"


class Record(BaseModel):
    """Base of what a release is made of: unknown keys of a newer hubforge are ignored, values never change."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class File(Record):
    path: str
    """Relative to its artifact or repository, forward slashes."""
    size: int
    """Bytes."""
    sha256: str


class SourceRecord(Record):
    """One input: what was asked for, which bytes came, and what its own files say of it."""

    name: str
    kind: Kind
    repo: str | None = None
    """Hub repository, or None for a local source."""
    path: str | None = None
    """Local path as written in the recipe (relative to it), or None."""
    revision: str | None = None
    commit: str | None = None
    license: str | None = None
    split: str | None = None
    key: str = ""
    files: tuple[File, ...] = ()
    facts: dict[str, Any] = Field(default_factory=dict)
    """A model: architecture, parameters, dtype. An adapter: rank, alpha, base_model, target_modules, use_rslora, and
    `training` (corpus, samples, tokens, steps ...) where its own files tell. A dataset: rows."""


class StepRecord(Record):
    """One step, from its manifest."""

    name: str
    """Full name: "stages.healed", "quantize.gguf/Q6_K", "evals.ifeval/healed"."""
    section: str
    entry: str
    """The name in the recipe that others refer to: "healed", "gguf/Q6_K"."""
    op: str
    makes: Kind
    summary: str = ""
    """What the op makes, in one sentence."""
    formula: str = ""
    method_source: str = ""
    fields: dict[str, Any] = Field(default_factory=dict)
    """The op's fields as run, defaults included, refs as entry names."""
    meanings: dict[str, str] = Field(default_factory=dict)
    """Field -> what it means, from the op's own descriptions; the cards' tables of parameters show it."""
    key: str = ""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Ref as written -> full name of the source ("sources.instruct") or step it points to."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    files: tuple[File, ...] = ()
    fused_into: tuple[str, ...] = ()
    """Full names of the steps in whose passes this one was computed, unrounded and without files of its own."""
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    """cpu, cores, memory (bytes), gpus (names), platform."""
    started: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0
    exact: bool = True
    git: dict[str, Any] | None = None
    """The repository the recipe lies in: commit (40 hex), dirty, remote (URL without credentials)."""


class MetricRecord(Record):
    """One metric of one model under one eval, with its interval, and against the baseline where there is one."""

    eval: str
    on: str
    metric: str
    value: float
    low: float | None = None
    """95 % interval of the value."""
    high: float | None = None
    n: int = 0
    """Prompts or documents."""
    samples: int = 1
    """Samples per prompt."""
    unit: str = ""
    higher_is_better: bool | None = None
    meaning: str = ""
    baseline: str | None = None
    """Entry name of the baseline, or None."""
    baseline_value: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    significant: bool | None = None
    method: str = ""
    """How the interval of the difference was computed."""


class GateRecord(Record):
    text: str
    holds: bool
    on: str = ""
    value: float
    threshold: float
    margin: float
    """value - threshold, signed so that a negative margin fails."""


class CardRecord(Record):
    """What hubforge wrote on the page of a target: people may write around it, and their text is not in here."""

    front_matter: dict[str, Any] = Field(default_factory=dict)
    sections: dict[str, str] = Field(default_factory=dict)
    """sha256 of each section's text by its name, as `hubforge.sections.digest` takes it."""


class TargetRecord(Record):
    """One repository (or one folder of one) that the release is published to."""

    name: str
    """Entry under `publish`: "weights"."""
    kind: Kind
    """model, adapter, mask or gguf."""
    repo: str
    folder: str | None = None
    tag: str | None = None
    private: bool = False
    entries: tuple[str, ...] = ()
    """Full names of the steps (or sources) whose files are pushed."""
    files: tuple[File, ...] = ()
    """Paths in the repository, README (as rendered) and pictures included; not the release file and SHA256SUMS."""
    card: CardRecord | None = None

    @property
    def prefix(self) -> str:
        """What every path of it in the repository begins with: "g4-31b-it/", or nothing."""
        return f"{self.folder.strip('/')}/" if self.folder else ""


class CardText(BaseModel):
    """What the author says of the model. Shown as written; nothing else on a card is invented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str | None = None
    summary: str | None = None
    """One paragraph under the title. Markdown."""
    description: str | None = None
    """What it is, at length. Markdown."""
    authors: tuple[str, ...] = ()
    intended_use: str | None = None
    limitations: tuple[str, ...] = ()
    """One sentence each. Markdown."""
    citation: tuple[str, ...] = ()
    """BibTeX entries."""
    tags: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    """Hub ids of data sets, added to those among the sources."""
    pipeline_tag: str | None = None
    prompt: str | None = None
    """The prompt of the usage snippet."""


class Release(Record):
    """A recipe, what went in, what was done, what came out, and what was measured."""

    version: int = 1
    """Of this format."""
    hubforge: str
    name: str
    license: str | None = None
    license_link: str | None = None
    recipe_file: str
    """File name of the recipe, without its folder."""
    recipe: str
    """The recipe's text."""
    lock: dict[str, Any] | None = None
    sources: tuple[SourceRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    """In the order they ran; each after its inputs."""
    metrics: tuple[MetricRecord, ...] = ()
    gates: tuple[GateRecord, ...] = ()
    targets: tuple[TargetRecord, ...] = ()
    target: str | None = None
    """In a published file: which of the targets this repository is."""
    card: CardText = CardText()

    def step(self, name: str) -> StepRecord | None:
        """The step of that full name ("stages.healed") or entry name ("healed")."""
        return next((step for step in self.steps if name in (step.name, step.entry)), None)

    def source(self, name: str) -> SourceRecord | None:
        """The source of that name, with or without `sources.` before it."""
        return next((source for source in self.sources if name in (source.name, f"sources.{source.name}")), None)
