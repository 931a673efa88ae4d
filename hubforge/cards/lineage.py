"""What one target of a release is made of: the steps and sources that led to it, and those whose weights are in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hubforge.errors import HubforgeError
from hubforge.release import Release, SourceRecord, StepRecord, TargetRecord

_CARRIES_WEIGHTS = ("model", "adapter", "gguf")


def find_target(release: Release, name: str) -> TargetRecord:
    """The target of that name; HubforgeError naming those there are."""
    for target in release.targets:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in release.targets) or "none"
    raise HubforgeError(
        f"the release {release.name!r} has no target {name!r}",
        where=release.recipe_file,
        mend=f"Its targets, the entries under `publish`, are: {known}.",
    )


@dataclass(frozen=True)
class Lineage:
    """The part of a release that one target rests on."""

    release: Release
    target: TargetRecord

    @cached_property
    def folder(self) -> str:
        """The folder of the repository that the target fills, without slashes around it; "" for all of it."""
        return (self.target.folder or "").strip("/")

    def place(self, path: str) -> str:
        """Where a file of the target lies in the repository."""
        return f"{self.folder}/{path}" if self.folder else path

    @cached_property
    def made(self) -> tuple[StepRecord, ...]:
        """The steps whose files are in the repository."""
        return tuple(step for step in self.release.steps if step.name in self.target.entries)

    @cached_property
    def steps(self) -> tuple[StepRecord, ...]:
        """Every step that led here, in the order they ran; no evals."""
        names = self._closure(self.target.entries, through_masks=True)
        return tuple(step for step in self.release.steps if step.name in names and step.section != "evals")

    def passes_of(self, step: StepRecord) -> tuple[str, ...]:
        """Full names of the steps in whose pass that one was computed, those that led here before others."""
        own = {each.name for each in self.steps}
        return tuple(name for name in step.fused_into if name in own) or step.fused_into

    def computed_in(self, step: StepRecord) -> tuple[StepRecord, ...]:
        """The steps without files that led here and were computed in that one's pass, in the order of the recipe."""
        return tuple(each for each in self.steps if step.name in each.fused_into)

    @cached_property
    def sources(self) -> tuple[SourceRecord, ...]:
        """Every source that led here, masks' and training data included."""
        names = self._closure(self.target.entries, through_masks=True)
        return tuple(source for source in self.release.sources if f"sources.{source.name}" in names)

    @cached_property
    def weights(self) -> tuple[SourceRecord, ...]:
        """The models and adapters whose weights are in what is published.

        The model an adapter of this recipe was trained on is its base; where that adapter is folded into another
        model, only the adapter's weights are.
        """
        names = self._closure(self.target.entries, through_masks=False)
        return tuple(
            source
            for source in self.release.sources
            if f"sources.{source.name}" in names and source.kind in _CARRIES_WEIGHTS
        )

    @cached_property
    def folded(self) -> tuple[str, ...]:
        """Full names of the adapters, read or trained, that were merged or folded in."""
        names = self._closure(self.target.entries, through_masks=False)
        sources = [f"sources.{source.name}" for source in self.release.sources if source.kind == "adapter"]
        steps = [step.name for step in self.release.steps if step.makes == "adapter" and step.section == "adapters"]
        return tuple(name for name in sources + steps if name in names)

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """The names by which evals refer to what is published: `healed`, `gguf/Q6_K`."""
        return tuple(self.entry(name) for name in self.target.entries)

    def entry(self, name: str) -> str:
        """The short name of a full name: "stages.healed" -> "healed"."""
        step = self.release.step(name)
        return step.entry if step else name.removeprefix("sources.")

    def kind(self, name: str) -> str:
        """The kind of the step or source of that full name; "" when the release knows none."""
        step = self.release.step(name)
        if step:
            return step.makes
        source = self.release.source(name)
        return source.kind if source else ""

    def published(self, name: str) -> TargetRecord | None:
        """The other target of this release that holds the step or source of that full name."""
        for target in self.release.targets:
            if name in target.entries and target.repo != self.target.repo:
                return target
        return None

    def _closure(self, names: Iterable[str], *, through_masks: bool) -> frozenset[str]:
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            found.add(name)
            step = self.release.step(name)
            if step is None or not (through_masks or _passes_weights(step, self.target)):
                continue
            parents = step.inputs.values()
            waiting += [name for name in parents if through_masks or self.kind(name) in _CARRIES_WEIGHTS]
        return frozenset(found)


def _passes_weights(step: StepRecord, target: TargetRecord) -> bool:
    """Whether weights of the step's inputs are in its output: not through masks, nor from base to trained adapter."""
    if step.makes == "mask" or step.section == "evals":
        return False
    return step.section != "adapters" or step.name in target.entries
