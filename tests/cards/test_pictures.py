"""Pictures: well-formed, self-contained, true to scale, and no two words on top of each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest

from hubforge.cards.lineage import Lineage
from hubforge.cards.pictures import energy_picture, gate_picture, histogram_picture, importance_picture, results_picture
from hubforge.cards.pipeline import pipeline_picture
from hubforge.cards.render import draw
from hubforge.cards.svg import fit, text_width, tick_labels, ticks
from hubforge.cards.training import loss_picture
from hubforge.release import MetricRecord, Release

SVG = "{http://www.w3.org/2000/svg}"


def pictures(release: Release) -> Iterator[tuple[str, str]]:
    for target in release.targets:
        yield from draw(Lineage(release, target)).items()


@dataclass
class Words:
    text: str
    left: float
    right: float
    top: float
    bottom: float


def words(picture: str) -> list[Words]:
    """Each text with the box it takes."""
    found = []
    for element in ElementTree.fromstring(picture).iter(f"{SVG}text"):
        style = element.get("class", "")
        size = 11 if "small" in style else 14 if "title" in style else 13
        width = text_width(element.text or "", size, bold="strong" in style or "title" in style)
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        left = {"start": x, "middle": x - width / 2, "end": x - width}[element.get("text-anchor", "start")]
        found.append(Words(element.text or "", left, left + width, y - 0.8 * size, y + 0.25 * size))
    return found


def test_pictures_stand_alone(rich_release: Release) -> None:
    drawn = dict(pictures(rich_release))
    assert set(drawn) >= {"assets/results.svg", "assets/pipeline.svg", "g4-e4b-it/assets/core-energy.svg"}
    for picture in drawn.values():
        root = ElementTree.fromstring(picture)
        assert root.tag == f"{SVG}svg"
        assert (root.find(f"{SVG}title").text or "").strip()  # type: ignore[union-attr]
        assert (root.find(f"{SVG}desc").text or "").strip()  # type: ignore[union-attr]
        assert not re.search(r"<script|href|url\(|@import|@font-face| on\w+=", picture)
        assert "prefers-color-scheme: dark" in picture
        classes = {name for element in root.iter() for name in element.get("class", "").split()}
        assert all(f".{name} " in picture for name in classes), classes


def test_no_words_overlap_or_leave_the_page(rich_release: Release) -> None:
    for path, picture in pictures(rich_release):
        width, height = (float(value) for value in ElementTree.fromstring(picture).get("viewBox", "").split()[2:])
        boxes = words(picture)
        for index, one in enumerate(boxes):
            assert one.left >= 0 and one.right <= width and one.top >= 0 and one.bottom <= height, (path, one)
            for other in boxes[:index]:
                apart = one.left >= other.right or other.left >= one.right
                assert apart or one.top >= other.bottom or other.top >= one.bottom, (path, one, other)


def test_long_names_are_cut_and_do_not_overlap(rich_release: Release) -> None:
    long = "a_metric_with_a_name_that_goes_on_and_on_until_it_is_longer_than_any_page_could_hold,none"
    metrics = tuple(
        metric.model_copy(update={"metric": f"{metric.metric}{long}", "eval": long, "baseline": long})
        for metric in rich_release.metrics
    )
    picture = results_picture(
        Lineage(rich_release.model_copy(update={"metrics": metrics}), rich_release.targets[0]), "healed"
    )
    for index, one in enumerate(words(picture)):
        assert one.left >= 0 and one.right <= 860
        for other in words(picture)[:index]:
            apart = one.left >= other.right or other.left >= one.right
            assert apart or one.top >= other.bottom or other.top >= one.bottom, (one, other)


def test_dots_stand_where_the_axis_says(rich_release: Release) -> None:
    """The first panel's axis runs from its first to its last tick; value and baseline lie in proportion."""
    picture = results_picture(Lineage(rich_release, rich_release.targets[0]), "healed")
    root = ElementTree.fromstring(picture)
    labels = [
        (float(t.text), float(t.get("x"))) for t in root.iter(f"{SVG}text") if re.fullmatch(r"0\.\d+", t.text or "")
    ]  # type: ignore[arg-type]
    (low, left), (high, right) = labels[0], labels[-1]
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]  # type: ignore[arg-type]
    middle = next(float(t.get("y")) for t in root.iter(f"{SVG}text") if t.text == "prompt_level_strict_acc") - 4.5  # type: ignore[arg-type]
    row = sorted(x for x, y in circles if abs(y - middle) < 0.01)
    expected = [left + (value - low) / (high - low) * (right - left) for value in (0.8133, 0.8244)]
    assert row == pytest.approx(expected, abs=0.02)


def test_bars_are_in_proportion() -> None:
    picture = importance_picture([{"layer": 0, "sum": 1.0}, {"layer": 1, "sum": 3.0}], "Importance")
    heights = [
        float(bar.get("height", 0))
        for bar in ElementTree.fromstring(picture).iter(f"{SVG}rect")
        if bar.get("class") == "bar"
    ]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.02)
    assert "layer 1 has most, 75" in picture


def test_energy_is_drawn_from_zero_to_all_of_it() -> None:
    layers = [{"layer": 0, "energy_captured": {"mean": 0.5, "min": 0.25, "max": 1.0}}]
    root = ElementTree.fromstring(energy_picture(layers, "Energy"))
    (bar,) = (rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "bar2")
    (line,) = (one for one in root.iter(f"{SVG}line") if one.get("class") == "over")
    assert float(bar.get("height", 0)) == pytest.approx(100)
    assert abs(float(line.get("y1", 0)) - float(line.get("y2", 0))) == pytest.approx(150)


def test_a_histogram_is_of_shares() -> None:
    """Of a gate by steps of its values, of a Fisher by powers of ten."""
    steps = histogram_picture([1, 0, 0, 3], "Gate")
    assert "75 % of them at 0.75" in steps and "0.25: 0 %" in steps
    assert "1e-7: 80 %" in histogram_picture({"-8": 1, "-7": 4}, "Fisher")


def test_a_gate_is_drawn_from_zero_to_one() -> None:
    root = ElementTree.fromstring(gate_picture([{"layer": 0, "gate": 0.25}, {"layer": 1, "importance": 1.0}], "Gate"))
    heights = [float(bar.get("height", 0)) for bar in root.iter(f"{SVG}rect") if bar.get("class") == "bar"]
    assert heights == pytest.approx([50, 200])


def test_nothing_to_draw_draws_nothing(sparse_release: Release) -> None:
    assert importance_picture([], "x") == gate_picture([{"layer": 0, "sum": 1.0}], "x") == ""
    assert histogram_picture(None, "x") == histogram_picture([0, 0], "x") == ""
    assert importance_picture([{"layer": 0, "sum": 0.0}], "x") == ""
    assert energy_picture([{"layer": 0, "sum": 1.0, "mean": 0.2}], "x") == ""
    assert dict(pictures(sparse_release)).keys() == {"assets/pipeline.svg"}
    lineage = Lineage(sparse_release, sparse_release.targets[0])
    assert results_picture(lineage, "out") == ""
    assert pipeline_picture(lineage) == ""


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-9, 1e12])
def test_a_single_point_still_has_an_axis(value: float, rich_release: Release) -> None:
    metric = MetricRecord(eval="e", on="healed", metric="x", value=value, baseline="b", baseline_value=value)
    release = rich_release.model_copy(update={"metrics": (metric,)})
    assert "<circle" in results_picture(Lineage(release, release.targets[0]), "healed")


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0.779, 0.901) == [0.75, 0.8, 0.85, 0.9, 0.95]
    assert ticks(0, 15.7) == [0, 5, 10, 15, 20]
    assert tick_labels([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_labels([-5, 0, 5], " %") == ["−5 %", "0 %", "5 %"]


def test_fit_keeps_both_ends() -> None:
    assert fit("short", 200) == "short"
    cut = fit("model-00001-of-00002.safetensors", 120)
    assert cut.startswith("model-")
    assert cut.endswith("tensors"[-3:])
    assert "…" in cut
    assert text_width(cut) <= 120


def test_a_loss_curve_runs_where_the_axes_say() -> None:
    metrics = {"curve": [[1, 3.0], [50, 2.0], [100, 1.0]], "eval_curve": [[50, 2.5], [100, 1.5]], "best_step": 100}
    picture = loss_picture(metrics, "Loss of chat")
    root = ElementTree.fromstring(picture)
    (line,) = (path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("class") == "curve")
    drawn = [tuple(map(float, point.split())) for point in line.removeprefix("M").split(" L")]
    middle = (drawn[0][1] + drawn[2][1]) / 2
    assert drawn[1][1] == pytest.approx(middle, abs=0.01)  # 2 lies half way between 3 and 1
    assert (drawn[1][0] - drawn[0][0]) / (drawn[2][0] - drawn[0][0]) == pytest.approx(49 / 99, abs=1e-3)
    assert drawn[2][0] == pytest.approx(840, abs=0.01)  # the last step is where the axis ends
    dots = [one for one in root.iter(f"{SVG}circle") if one.get("class") == "bad"][1:]  # the first is the legend's
    assert [float(dot.get("cx", 0)) for dot in dots] == pytest.approx([drawn[1][0], drawn[2][0]], abs=0.01)
    assert [dot.get("r") for dot in dots] == ["3", "4.5"]
    assert "from 3 at step 1 to 1 at step 100; on held-out rows least, 1.5, at step 100." in picture


CURVES = (None, "curve", [], [[1, 2.0]], [[1, math.nan], [2, 1.0]], [[2, 1.0], [1, 2.0]], [1, 2])


@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_of_fewer_than_two_points_is_not_drawn(curve: object) -> None:
    assert loss_picture({"curve": curve}, "x") == ""


def test_a_flat_curve_has_an_axis() -> None:
    assert "<path" in loss_picture({"curve": [[1, 2.0], [2, 2.0]]}, "x")
