"""Draw the figures of docs/merging.md from the lab's trained models.

usage: merging_figures.py LAB [OUT [NAME ...]]

LAB is what `hubforge lab` trained (a pretrained model, an instruct model made from it, three adapters); OUT is
docs/figures; NAME a figure, by default all. The models are merged by the ops themselves; numbers are means over all
matrices of the decoder's layers, but for losses.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from hubforge.cards.svg import Picture, text_width, tick_labels, ticks
from hubforge.masks.fisher import Fisher
from hubforge.models import load_model, load_tokenizer
from hubforge.op import Artifact, Context, Kind, Op, Place, Settings, TensorOp
from hubforge.stages._models import Merge
from hubforge.stages._task_vectors import TaskVectors
from hubforge.stages.apply import Apply
from hubforge.stages.breadcrumbs import Breadcrumbs
from hubforge.stages.dare_linear import DareLinear
from hubforge.stages.fisher_average import FisherAverage
from hubforge.stages.karcher import Karcher
from hubforge.stages.linear import Linear
from hubforge.stages.model_stock import ModelStock
from hubforge.stages.nuslerp import Nuslerp
from hubforge.stages.ties_models import TiesModels
from hubforge.tensors.adapter import delta, open_adapter
from hubforge.tensors.engine import run_tensor_op
from hubforge.tensors.rounding import gain_sums, round_to

if TYPE_CHECKING:
    from torch import Tensor

DENSITIES = [0.02, 0.05, *(i / 10 for i in range(1, 11))]
STYLES = ("good", "bad", "plain")
Curves = Mapping[str, Sequence[tuple[float, float]]]


def chart(title: str, words: str, x_label: str, y_label: str, curves: Curves, *, log: bool = False) -> str:
    """Curves over one pair of axes. log: the x axis is logarithmic to base 10."""
    picture = Picture(640, title, words)
    picture.height = 340
    left, right, top, bottom = 64.0, 610.0, 76.0, 284.0
    points = [point for curve in curves.values() for point in curve]
    xs = [math.log10(x) if log else x for x, _ in points]
    x_ticks = ticks(min(xs), max(xs)) if not log else [float(i) for i in range(round(min(xs)), round(max(xs)) + 1)]
    y_ticks = ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = ((math.log10(x) if log else x) - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return left + across * (right - left), bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    picture.text(20, 28, title, "ink title")
    at = 20.0
    for name, style in zip(curves, STYLES, strict=False):
        picture.line(at, 48, at + 18, 48, f"{style} whisker")
        picture.text(at + 24, 52, name, "dim")
        at += 24 + text_width(name) + 24
    for value, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = place(10 ** x_ticks[0] if log else x_ticks[0], value)[1]
        picture.line(left, y, right, y)
        picture.text(left - 8, y + 4, label, "dim small", "end")
    labels = [f"10^{value:.0f}".replace("-", "−") for value in x_ticks] if log else tick_labels(x_ticks)
    for value, label in zip(x_ticks, labels, strict=True):
        x = place(10**value if log else value, 0)[0]
        picture.line(x, bottom, x, bottom + 4, "axis")
        picture.text(x, bottom + 18, label, "dim small", "middle")
    picture.line(left, bottom, right, bottom, "axis")
    picture.text((left + right) / 2, bottom + 40, x_label, "dim", "middle")
    picture.text(left, top - 6, y_label, "dim small")
    for curve, style in zip(curves.values(), STYLES, strict=False):
        placed = [place(x, y) for x, y in curve]
        for one, other in pairwise(placed):
            picture.line(*one, *other, f"{style} whisker")
        for x, y in placed:
            picture.circle(x, y, 2.5, style)
    return picture.render()


def family(lab: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The pretrained model's matrices, and task vectors by name: of the instruct model and of each adapter; float32."""
    base = {
        name: tensor.float()
        for file in (lab / "pretrained").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    tuned = {
        name: tensor.float()
        for file in (lab / "instruct").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    base = {name: tensor for name, tensor in base.items() if tensor.dim() == 2 and ".layers." in name}
    found = {"instruct": {name: tuned[name] - tensor for name, tensor in base.items()}}
    for folder in sorted((lab / "adapters").iterdir()):
        if (folder / "adapter_config.json").is_file():
            with open_adapter(folder) as adapter:
                modules = adapter.modules
                found[folder.name] = {
                    f"{name}.weight": delta(module, *adapter.factors(name)) for name, module in modules.items()
                }
    return base, found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measured(op: TensorOp, w: Mapping[str, Tensor], name: str) -> Place:
    """The place of a whole tensor, with what the op's measuring passes find of it."""
    place = Place(name, 0, tuple(next(iter(w.values())).shape), known=1)
    for turn in range(op.measures()):
        place = replace(place, turn=turn)
        place = replace(place, totals=op.combine([op.measure(w, place)], place))
    return place


def thinned(op: TaskVectors, vector: Tensor, name: str) -> Tensor:
    """A task vector with what the op drops set to zero."""
    return op.thinned(vector, 0, measured(op, {"m": torch.zeros_like(vector), "a": vector}, name))


def kept(vectors: Mapping[str, Tensor]) -> str:
    """How much of a task vector's energy each way to thin it out keeps."""

    def energy(thinned: Tensor, whole: Tensor) -> float:
        return float(thinned.double().square().sum() / whole.double().square().sum())

    def of(op: TaskVectors) -> float:
        return mean([energy(thinned(op, d, name), d) for name, d in vectors.items()])

    common = {"base_model": "m", "models": ["a"]}
    curves = {
        "largest (ties, sce)": [(d, of(TiesModels(**common, density=d))) for d in DENSITIES],
        "largest but 1 % outliers (breadcrumbs)": [
            (d, of(Breadcrumbs(**common, density=d, gamma=min(0.01, 1 - d)))) for d in DENSITIES
        ],
        "at random (dare)": [(d, of(DareLinear(**common, density=d, rescale=False))) for d in DENSITIES],
    }
    words = "Share of the squared task vector that is kept, by density: the largest elements hold most of it."
    return chart("What thinning out keeps of a task vector", words, "density", "share of its energy", curves)


def conflict(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """How often two task vectors want opposite changes, before and after each is trimmed."""
    names = sorted(set(one) & set(other))

    def at(density: float) -> tuple[float, float]:
        op = TiesModels(base_model="m", models=["a"], density=density)
        clash, both = [], []
        for name in names:
            a, b = thinned(op, one[name], name), thinned(op, other[name], name)
            either = (a != 0) | (b != 0)
            clash.append(float((a * b < 0).sum() / either.sum()))
            both.append(float((a * b != 0).sum() / either.sum()))
        return mean(clash), mean(both)

    found = {density: at(density) for density in DENSITIES}
    curves = {
        "both change it": [(d, both) for d, (_, both) in found.items()],
        "in opposite directions": [(d, clash) for d, (clash, _) in found.items()],
    }
    words = "Share of the changed elements that both of two adapters change, and change oppositely, by TIES's density."
    return chart("Where two adapters meet, after trimming", words, "density", "share of all that is changed", curves)


def arc(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The length of a mix of two task vectors, relative to the straight line between their lengths."""
    names = sorted(set(one) & set(other))
    steps = [i / 10 for i in range(11)]

    def along(t: float, name: str) -> tuple[float, float]:
        op = Nuslerp(models=["a", "b"], weights=[1 - t, t])
        w = {"a": one[name], "b": other[name]}
        turned = op.tensor(w, measured(op, w, name))
        straight = (1 - t) * w["a"] + t * w["b"]
        length = (1 - t) * float(w["a"].norm()) + t * float(w["b"].norm())
        return float(turned.norm()) / length, float(straight.norm()) / length

    found = {t: [along(t, name) for name in names] for t in steps}
    curves = {
        "along the arc (slerp, nuslerp)": [(t, mean([arc for arc, _ in each])) for t, each in found.items()],
        "straight (linear, task_arithmetic)": [(t, mean([line for _, line in each])) for t, each in found.items()],
    }
    words = (
        "Length of the mix of two adapters' task vectors over t: the straight line loses up to a third, the arc none."
    )
    return chart("What mixing does to a task vector's length", words, "t", "length over that of the ends", curves)


def gain(base: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> str:
    """How much of a change is left after rounding to bfloat16, by the size of the change."""
    sizes = [10 ** (i / 4) for i in range(-16, -3)]

    def at(size: float, how: str) -> float:
        found = []
        for name, d in vectors.items():
            w = base[name].bfloat16().float()
            merged = w + d * (size * w.norm() / d.norm())
            left, wanted = gain_sums(w, merged, round_to(merged, torch.bfloat16, how, 0, name, 0))
            found.append(left / wanted)
        return mean(found)

    curves = {
        f"rounded {words}": [(size, at(size, how)) for size in sizes]
        for how, words in [("nearest", "to nearest"), ("stochastic", "stochastically")]
    }
    words = "Effective gain of a change after rounding to bfloat16, by its size relative to the weights."
    label = "length of the change / length of the weights"
    return chart("What bfloat16 leaves of a small change", words, label, "effective gain", curves, log=True)


def ranks(vectors: Mapping[str, Tensor]) -> str:
    """How much of a fine-tuned model's change an adapter of each rank holds."""
    energies = [torch.linalg.svdvals(d.double()).square() for d in vectors.values()]
    found = [1, 2, 4, 8, 16, 32, 64, 128]
    found = [rank for rank in found if rank <= min(len(e) for e in energies)]
    curves = {
        "instruct − pretrained": [(float(r), mean([float(e[:r].sum() / e.sum()) for e in energies])) for r in found]
    }
    words = "Share of the squared task vector of instruct tuning that the best adapter of each rank holds."
    return chart("What an extracted adapter holds of a model", words, "rank", "share of its energy", curves)


def unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.norm()


def stock(common: Mapping[str, Tensor], own: Sequence[Mapping[str, Tensor]]) -> str:
    """What model_stock keeps of the mean of fine-tunes that have more or less of their changes in common."""
    names = sorted(set(common).intersection(*own))
    shares = [i / 10 for i in range(11)]

    def of(count: int, shared: float) -> tuple[float, float]:
        """The cosine between two of the changes, and the share of their mean; means over the matrices."""
        refs = "abc"[:count]
        op, cosines, kept = ModelStock(base_model="m", models=list(refs)), [], []
        for name in names:
            parts = [unit(each[name]) for each in own[:count]]
            changes = [shared**0.5 * unit(common[name]) + (1 - shared) ** 0.5 * part for part in parts]
            w = {"m": torch.zeros_like(changes[0])} | dict(zip(refs, changes, strict=True))
            merged, plain = op.tensor(w, measured(op, w, name)), torch.stack(changes).mean(0)
            cosines.append(float((unit(changes[0]) * unit(changes[1])).sum()))
            kept.append(float(merged.norm() / plain.norm()))
        return mean(cosines), mean(kept)

    curves = {f"{words} fine-tunes": [of(count, s) for s in shares] for count, words in ((2, "two"), (3, "three"))}
    curves["linear"] = [(x, 1.0) for x, _ in curves["two fine-tunes"]]
    words = "Share of the fine-tunes' mean change that model_stock keeps, by the cosine between their changes."
    label = "cosine between the changes of two fine-tunes"
    return chart("What model_stock keeps of the mean", words, label, "share of the mean change", curves)


def sphere(own: Sequence[Mapping[str, Tensor]]) -> str:
    """Where the mean of three task vectors points as one of them grows."""
    names = sorted(set(own[0]).intersection(*own))
    refs = ["a", "b", "c"]
    sizes = [0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4]

    def of(op: TensorOp, size: float) -> float:
        angles = []
        for name in names:
            w = dict(zip(refs, [unit(each[name]) for each in own], strict=True))
            w["a"] = w["a"] * size
            merged = op.tensor(w, measured(op, w, name))
            angles.append(math.degrees(math.acos(min(1.0, float((unit(merged) * unit(w["a"])).sum())))))
        return mean(angles)

    curves = {
        "straight (linear)": [(size, of(Linear(models=refs), size)) for size in sizes],
        "on the sphere (karcher)": [(size, of(Karcher(models=refs), size)) for size in sizes],
    }
    words = "Angle between the mean of three task vectors and the first of them, as that one grows longer."
    label = "length of the first / length of each of the others"
    return chart("Whose direction a mean takes", words, label, "degrees from the first", curves)


def averages(lab: Path) -> str:
    """How well a mean of two fine-tunes does on what each of them was trained on."""
    styles, steps = ("prose", "dialogue"), [i / 6 for i in range(7)]
    refs = list(styles)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        inputs = {"instruct": Artifact("instruct", "model", "instruct", lab / "instruct")}

        def run(op: Op, name: str, kind: Kind) -> None:
            """The op's output, as one more input."""
            ctx = Context(name, made / name, inputs, Settings(device="cpu"))
            ctx.out.mkdir()
            _ = run_tensor_op(op, ctx, 1) if isinstance(op, TensorOp) else op.run(ctx)
            inputs[name] = Artifact(name, kind, name, ctx.out)

        for style in styles:
            inputs[f"lora-{style}"] = Artifact(style, "adapter", style, lab / "adapters" / style)
            inputs[f"texts-{style}"] = Artifact(style, "dataset", style, lab / "data" / "styles" / f"{style}.jsonl")
            run(Apply(model="instruct", adapters=[f"lora-{style}"], dtype="float32"), style, "model")
            fisher = Fisher(model=style, data=f"texts-{style}", column="response", chat_template=False, samples=100)
            run(fisher, f"fisher-{style}", "mask")
        texts = {style: lab / "data" / "styles" / f"{style}_held_out.jsonl" for style in styles}
        best = {style: loss_on(made / style, texts[style]) for style in styles}

        def above(number: int, op: Merge) -> float:
            """By how many nats a token it is worse than each text's own model; the mean over the texts."""
            name = f"{type(op).__name__}-{number}"
            run(op, name, "model")
            found = mean([loss_on(made / name, texts[style]) - best[style] for style in styles])
            shutil.rmtree(made / name)
            return found

        fishers = [f"fisher-{style}" for style in styles]
        curves = {"linear": [], "fisher_average": []}
        for number, t in enumerate(steps):
            curves["linear"].append((t, above(number, Linear(models=refs, weights=[1 - t, t]))))
            op = FisherAverage(models=refs, fishers=fishers, weights=[1 - t, t])
            curves["fisher_average"].append((t, above(number, op)))
        stocked = above(0, ModelStock(base_model="instruct", models=refs))
        curves["model_stock"] = [(t, stocked) for t in steps]
    words = (
        "Loss of means of a prose and a dialogue model on held-out texts of both, above that of the text's own model."
    )
    return chart("What a mean of two fine-tunes loses", words, "weight of the dialogue model", "nats per token", curves)


def loss_on(folder: Path, texts: Path) -> float:
    """The mean loss per token of a model on the texts of a file."""
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32), load_tokenizer(folder)
    total, count = 0.0, 0
    with torch.inference_mode():
        for line in texts.read_text(encoding="utf-8").splitlines():
            ids = torch.tensor([tokenizer(json.loads(line)["response"])["input_ids"][:256]])
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def main() -> None:
    torch.set_num_threads(1)  # Matrices this small gain nothing from a second.
    lab, out = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/figures")
    base, vectors = family(lab)
    instruct, *adapters = vectors.values()
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "thinning": lambda: kept(instruct),
        "conflict": lambda: conflict(*adapters[:2]),
        "arc": lambda: arc(*adapters[:2]),
        "sphere": lambda: sphere(adapters),
        "stock": lambda: stock(instruct, adapters),
        "averages": lambda: averages(lab),
        "gain": lambda: gain(base, instruct),
        "ranks": lambda: ranks(instruct),
    }
    for name in sys.argv[3:] or pictures:
        (out / f"{name}.svg").write_text(pictures[name](), encoding="utf-8")
        print(out / f"{name}.svg")


if __name__ == "__main__":
    main()
