"""The mask page: one row and one part per folder of the repository, ours and those that were there before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hubforge.cards.components import source_link
from hubforge.cards.lineage import Lineage
from hubforge.cards.making import StepView, step_view
from hubforge.cards.markdown import code, link, url
from hubforge.cards.numbers import count, size
from hubforge.cards.pictures import energy_picture, gate_picture, histogram_picture, importance_picture
from hubforge.release import File, Release, StepRecord, TargetRecord

Row = dict[str, str]


@dataclass(frozen=True)
class MaskView:
    """One mask: the step that made it, its files and its pictures."""

    step: StepView
    files: tuple[Row, ...]
    pictures: tuple[tuple[str, str], ...]  # path in the repository, alternative text
    enough: str  # whether there were samples enough; Markdown


@dataclass(frozen=True)
class FolderView:
    """One folder of the repository: the masks of one model."""

    folder: str  # Markdown
    name: str
    own: bool
    row: Row
    masks: tuple[MaskView, ...]


def folder_views(lineage: Lineage, siblings: Sequence[Release]) -> list[FolderView]:
    """Our folder and the siblings', sorted by name; a sibling of the same folder is what we replace."""
    found = {lineage.folder: (lineage, True)}
    for sibling in siblings:
        target = _own_target(sibling, lineage.target)
        if target is None:
            continue
        other = Lineage(sibling, target)
        found.setdefault(other.folder, (other, False))
    return [_folder(*found[name]) for name in sorted(found)]


def mask_pictures(lineage: Lineage) -> dict[str, str]:
    """Path in the repository -> SVG, of the masks of this release."""
    return {path: drawn for step in lineage.made for path, drawn, _ in _drawn(lineage, step)}


def _folder(lineage: Lineage, own: bool) -> FolderView:
    folder = lineage.folder
    steps = [step for step in lineage.made if step.makes == "mask"]
    models = [source_link(source) for source in lineage.sources if source.kind == "model"]
    data = [source_link(source) for source in lineage.sources if source.kind == "dataset"]
    samples = list(dict.fromkeys(count(step.metrics.get("samples")) for step in steps if step.metrics.get("samples")))
    ranks = list(dict.fromkeys(count(_rank(step)) for step in steps if _rank(step)))
    files = [file for step in steps for file in step.files]
    row = {
        "Folder": link(f"{folder}/", f"./{folder}") if folder else "",
        "Model": ", ".join(models),
        "Masks": ", ".join(code(step.entry) for step in steps),
        "Data": ", ".join(data),
        "Samples": ", ".join(samples),
        "Rank": ", ".join(ranks),
        "Size": size(sum(file.size for file in files)) if files else "",
    }
    return FolderView(
        folder=code(folder),
        name=folder,
        own=own,
        row=row,
        masks=tuple(_mask(lineage, step, own) for step in steps),
    )


def _mask(lineage: Lineage, step: StepRecord, own: bool) -> MaskView:
    there = {file.path for file in lineage.target.files}
    pictures = tuple((path, words) for path, _, words in _drawn(lineage, step) if own or path in there)
    rows = tuple(
        {
            "File": code(file.path),
            "What is in it": describe(step, file),
            "Size": size(file.size),
        }
        for file in step.files
    )
    return MaskView(step_view(lineage, step), rows, pictures, enough(step))


def enough(step: StepRecord) -> str:
    """Whether the samples were enough, by split-half reliability; "" when it is not known. Markdown.

    By Spearman and Brown, as many samples again would rank the weights alike to 2 r / (1 + r), r being the correlation
    of the ranks that the two halves give.
    """
    halves, samples = step.metrics.get("reliability"), step.metrics.get("samples")
    if isinstance(halves, bool) or not isinstance(halves, (int, float)) or not 0 < halves <= 1 or not samples:
        return ""
    again = 2 * halves / (1 + halves)
    if again >= 0.95:
        verdict = "were enough"
    elif again >= 0.8:
        verdict = "give the broad picture, and more would still move many weights"
    else:
        verdict = "were too few"
    many = count(samples)
    return (
        f"By one half of the samples the weights rank as by the other to {halves:.3f} (Spearman), so by all of them as "
        f"by {many} others to about {again:.3f}: {many} samples {verdict}."
    )


def _drawn(lineage: Lineage, step: StepRecord) -> list[tuple[str, str, str]]:
    """The pictures of one mask: path in the repository, SVG, alternative text."""
    layers = layers_of(step)
    gated = any("importance" in layer for layer in layers)  # `op: layers`: its sums are another mask's picture
    about = lineage.folder or lineage.target.repo.rsplit("/", 1)[-1]
    drawings = [
        (
            "layers",
            importance_picture([] if gated else layers, f"Layer importance, {about}"),
            f"Importance of each layer, {about}",
        ),
        ("energy", energy_picture(layers, f"Energy captured, {about}"), f"Energy captured in each layer, {about}"),
        ("gate", gate_picture(layers, f"How much each layer is spared, {about}"), f"Importance of each layer, {about}"),
        (
            "histogram",
            histogram_picture(
                step.metrics.get("histogram") or step.metrics.get("log10_histogram"), f"Importance of weights, {about}"
            ),
            f"Histogram of the importance of each weight, {about}",
        ),
    ]
    return [
        (url(lineage.place(f"assets/{step.entry.replace('/', '-')}-{name}.svg")), drawn, words)
        for name, drawn, words in drawings
        if drawn
    ]


def layers_of(step: StepRecord) -> list[dict[str, Any]]:
    """What a mask's step says of each layer: kept as a list, or as a mapping from the layer's number."""
    layers = step.metrics.get("layers")
    if isinstance(layers, dict):
        found = [{"layer": name, **facts} for name, facts in layers.items() if isinstance(facts, dict)]
        return sorted(found, key=lambda facts: (not str(facts["layer"]).isdigit(), _number(facts["layer"])))
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, (list, tuple)) else []


def describe(step: StepRecord, file: File) -> str:
    """What is in a file of a mask, in words; "" for one hubforge has no words for. Markdown."""
    name = file.path.rsplit("/", 1)[-1]
    if name == "layer_importance.json":
        return "the sum and the mean of the importance in each layer"
    if name == "gate.json":
        return "the mean importance in each layer, and how many weights have which"
    if name == "layers.json":
        return "the importance of each layer, and the tensors that lie in them"
    if name.endswith(".safetensors") and step.op == "combine":
        return "for each weight tensor, under its name in the checkpoint, importance in [0, 1]; 1 is not to be changed"
    if name == "subspace.json":
        return "for each matrix: the rank kept, the energy captured and the residual"
    if name.endswith(".safetensors.index.json"):
        return "which tensor is in which file"
    if name.endswith(".safetensors") and step.op == "fisher":
        return "for each weight tensor, under its name in the checkpoint, the importance of each weight"
    if name == "fisher.pt":
        return "the same tensors as a dictionary, for `torch.load(..., weights_only=True)`"
    if name.endswith(".safetensors") and step.op in ("subspace", "random_subspace"):
        return (
            "for each matrix `W`: `W.U` (out × rank), `W.S` (rank), `W.V` (in × rank), under its name in the checkpoint"
        )
    return ""


def _number(name: object) -> int:
    return int(str(name)) if str(name).isdigit() else 0


def _rank(step: StepRecord) -> object:
    return step.metrics.get("rank") or step.fields.get("rank")


def _own_target(sibling: Release, ours: TargetRecord) -> TargetRecord | None:
    """Which target of a sibling's release is in this repository: the one its file names, else by repository."""
    targets = [target for target in sibling.targets if target.kind == "mask" and target.repo == ours.repo]
    return next((target for target in targets if target.name == sibling.target), targets[0] if targets else None)
