"""How an adapter was trained: the curve of its loss, and what of its change lies in the subspace it was held out of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hubforge.cards.lineage import Lineage
from hubforge.cards.markdown import code, url
from hubforge.cards.numbers import count, short
from hubforge.cards.svg import Picture, fit, number, text_width, tick_labels, ticks
from hubforge.release import StepRecord

WIDTH, _PAD = 860.0, 20.0
_TOP, _BOTTOM = 64.0, 264.0
Points = list[tuple[float, float]]


def training_pictures(lineage: Lineage) -> dict[str, str]:
    """Path in the repository -> SVG: a loss curve for each adapter that was trained on the way here."""
    drawn = {loss_path(lineage, step): loss_picture(step.metrics, f"Loss of {step.entry}") for step in lineage.steps}
    return {path: picture for path, picture in drawn.items() if picture}


def loss_path(lineage: Lineage, step: StepRecord) -> str:
    return url(lineage.place(f"assets/{step.entry.replace('/', '-')}-loss.svg"))


def loss_picture(metrics: Mapping[str, Any], title: str) -> str:
    """The training loss over the steps as a line, that of held-out rows as dots; "" where fewer than two are known.

    metrics: `curve` and `eval_curve`, lists of (step, loss); `best_step`.
    """
    curve, held_out = points(metrics.get("curve")), points(metrics.get("eval_curve"))
    if len(curve) < 2:
        return ""
    every = curve + held_out
    last = max(step for step, _ in every)
    across, up = ticks(0.0, last, 7), ticks(min(loss for _, loss in every), max(loss for _, loss in every))
    # The axis ends with the last step, not with the tick that would come after it.
    across = [mark for mark in across if mark <= last]
    labels = tick_labels(up)
    words = (
        f"Training loss from {short(curve[0][1])} at step {count(int(curve[0][0]))} to {short(curve[-1][1])} "
        f"at step {count(int(curve[-1][0]))}"
    )
    if held_out:
        lowest = min(held_out, key=lambda point: point[1])
        words += f"; on held-out rows least, {short(lowest[1])}, at step {count(int(lowest[0]))}"
    picture = Picture(WIDTH, title, words + ".")
    picture.text(_PAD, 28, fit(title, WIDTH - 2 * _PAD, 14, bold=True), "ink title")
    _legend(picture, bool(held_out))
    left, right = _PAD + max(text_width(label, 11) for label in labels) + 8, WIDTH - _PAD

    def x(step: float) -> float:
        return left + step / last * (right - left)

    def y(loss: float) -> float:
        return _BOTTOM - (loss - up[0]) / (up[-1] - up[0]) * (_BOTTOM - _TOP)

    for mark, label in zip(up, labels, strict=True):
        picture.line(left, y(mark), right, y(mark), "axis" if mark == up[0] else "line")
        picture.text(left - 6, y(mark) + 4, label, "dim small", "end")
    for mark in across:
        label = count(int(mark))
        room = text_width(label, 11) / 2
        picture.text(min(max(x(mark), left + room), right - room), _BOTTOM + 17, label, "dim small", "middle")
    line = " L".join(f"{number(x(step))} {number(y(loss))}" for step, loss in curve)
    picture.path(f"M{line}", "curve")
    for step, loss in held_out:
        picture.circle(x(step), y(loss), 4.5 if step == metrics.get("best_step") else 3, "bad")
    picture.text((left + right) / 2, _BOTTOM + 36, "step", "dim small", "middle")
    picture.height = _BOTTOM + 48
    return picture.render()


def _legend(picture: Picture, has_held_out: bool) -> None:
    words = "training loss, nats per token"
    picture.line(_PAD, 44, _PAD + 20, 44, "curve")
    picture.text(_PAD + 28, 48, words, "dim small")
    if has_held_out:
        at = _PAD + 28 + text_width(words, 11) + 24
        picture.circle(at, 44, 3, "bad")
        picture.text(at + 10, 48, "on held-out rows (large: the one that was kept)", "dim small")


def points(value: object) -> Points:
    """The (step, loss) pairs of a curve that are finite numbers, steps above zero and rising."""
    found: Points = []
    for pair in value if isinstance(value, Sequence) and not isinstance(value, str) else ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            continue
        if all(isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in pair):
            step, loss = float(pair[0]), float(pair[1])
            if step > (found[-1][0] if found else 0):
                found.append((step, loss))
    return found


def leak(value: object) -> str:
    """ "4.6e-8 into U and 4.4e-8 into V on average, at worst 6.6e-8, in `model.layers.0.mlp.up_proj`". Markdown."""
    if not isinstance(value, Mapping):
        return ""
    left, right, worst = (short(value.get(name), 2) for name in ("mean_left", "mean_right", "worst"))
    if not (left and right and worst):
        return ""
    said = f"{left} into U and {right} into V on average, at worst {worst}, in {code(value.get('worst_matrix', ''))}"
    both, at_worst = (short(value.get(name), 2) for name in ("mean_core", "worst_core"))
    if value.get("projection") == "core" and both and at_worst:
        said += f"; what `core` holds out, Uᵀ·ΔW·V, is {both} of it, at worst {at_worst}"
    return said
