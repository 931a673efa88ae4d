"""The picture of how it was made: a box per source and step, columns by the steps behind, an arrow per input."""

from __future__ import annotations

from dataclasses import dataclass

from hubforge.cards.lineage import Lineage
from hubforge.cards.svg import Picture, fit, number, text_width

_BOX_HEIGHT, _ROW, _GAP, _PAD = 44.0, 60.0, 56.0, 20.0
_WIDEST = 1100.0


@dataclass
class _Box:
    name: str
    top: str
    below: str
    style: str
    column: int
    parents: tuple[str, ...]
    dashed: bool = False  # it was computed in the pass of another, and has no files
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0


def pipeline_picture(lineage: Lineage) -> str:
    """The graph behind a target; "" when it is too small (one step) or too large to be worth a look."""
    boxes = _boxes(lineage)
    steps = [box for box in boxes.values() if box.parents]
    columns = max((box.column for box in boxes.values()), default=0) + 1
    if len(steps) < 2 or columns > 7 or len(boxes) > 40:
        return ""
    _place(boxes, columns)
    names = ", ".join(box.name.split(".", 1)[-1] for box in steps)
    width = max(box.x + box.width for box in boxes.values()) + _PAD
    about = f"From the sources on the left, step by step: {names}."
    if any(box.dashed for box in steps):
        about += " What is dashed was computed in the pass of what follows, and has no files."
    picture = Picture(width, "How it was made", about)
    for box in boxes.values():
        for parent in box.parents:
            _arrow(picture, boxes[parent], box, boxes)
    for box in boxes.values():
        picture.rect(box.x, box.y, box.width, _BOX_HEIGHT, box.style, 6, f"{box.top}: {box.below}", box.dashed)
        light = " onend" if box.style == "end" else ""
        inner = box.width - 20
        middle = box.x + box.width / 2
        picture.text(middle, box.y + 19, fit(box.top, inner, 13, bold=True), f"strong{light or ' ink'}", "middle")
        picture.text(middle, box.y + 35, fit(box.below, inner, 11), f"small{light or ' dim'}", "middle")
    picture.height = max(box.y for box in boxes.values()) + _BOX_HEIGHT + _PAD
    return picture.render()


def _boxes(lineage: Lineage) -> dict[str, _Box]:
    """Sources and steps by full name, each step one column right of the last of its inputs."""
    boxes: dict[str, _Box] = {}
    for source in lineage.sources:
        name = f"sources.{source.name}"
        boxes[name] = _Box(name, source.name, source.repo or f"local {source.kind}", "box", 0, ())
    merged: dict[str, str] = {}
    for step in lineage.steps:
        if step.section == "publish":
            continue
        parents = tuple(dict.fromkeys(merged.get(name, name) for name in step.inputs.values()))
        parents = tuple(name for name in parents if name in boxes)
        column = 1 + max((boxes[name].column for name in parents), default=0)
        style = "end" if step.name in lineage.target.entries else "made"
        # Entries of one list (the quants of a model) are one box: they differ only in their name.
        head = step.entry.split("/", 1)[0]
        group = f"{step.section}.{head}"
        if "/" in step.entry and group in boxes:
            boxes[group].style = style if style == "end" else boxes[group].style
            boxes[group].below += f", {step.entry.split('/', 1)[1]}"
            merged[step.name] = group
            continue
        if "/" in step.entry:
            merged[step.name] = group
            boxes[group] = _Box(group, head, step.entry.split("/", 1)[1], style, column, parents)
        else:
            fused = bool(step.fused_into)
            below = f"{step.op}, no files" if fused else step.op
            boxes[step.name] = _Box(step.name, step.entry, below, style, column, parents, dashed=fused)
    for box in boxes.values():  # a source first used late stands just before its user
        if not box.parents:
            uses = [other.column for other in boxes.values() if box.name in other.parents]
            box.column = max(0, min(uses, default=1) - 1)
    return boxes


def _place(boxes: dict[str, _Box], columns: int) -> None:
    """Boxes in columns; within one, ordered by where their neighbours are, so that few arrows cross."""
    grid = [[box for box in boxes.values() if box.column == column] for column in range(columns)]
    order = {box.name: float(index) for column in grid for index, box in enumerate(column)}
    for sweep in range(8):
        forward = sweep % 2 == 0
        for column in grid if forward else reversed(grid):
            for box in column:
                near = box.parents if forward else [other.name for other in boxes.values() if box.name in other.parents]
                if near:
                    order[box.name] = sum(order[name] for name in near) / len(near)
            column.sort(key=lambda box: (order[box.name], box.name))
            for index, box in enumerate(column):
                order[box.name] = index - (len(column) - 1) / 2
    widths = [_wanted(column) for column in grid]
    if sum(widths) + _GAP * (columns - 1) + 2 * _PAD > _WIDEST:
        room = (_WIDEST - 2 * _PAD - _GAP * (columns - 1)) / columns
        widths = [min(width, max(room, 110.0)) for width in widths]
    tallest = max(len(column) for column in grid)
    x = _PAD
    for column, width in zip(grid, widths, strict=True):
        start = _PAD + (tallest - len(column)) * _ROW / 2
        for index, box in enumerate(column):
            box.x, box.y, box.width = x, start + index * _ROW, width
        x += width + _GAP


def _wanted(column: list[_Box]) -> float:
    """The width at which every name of a column can be read, within reason."""
    words = [max(text_width(box.top, 13, bold=True), text_width(box.below, 11)) for box in column]
    return max(84.0, min(max(words, default=0.0) + 24, 230.0))


def _arrow(picture: Picture, start: _Box, end: _Box, boxes: dict[str, _Box]) -> None:
    """A curve from the right side of one box to the left side of the other, its end spread over the box's height."""
    siblings = sorted((boxes[name] for name in end.parents), key=lambda box: (box.y, box.x))
    share = (siblings.index(start) + 1) / (len(siblings) + 1)
    x1, y1 = start.x + start.width, start.y + _BOX_HEIGHT / 2
    x2, y2 = end.x - 6, end.y + _BOX_HEIGHT * share
    lane = x1
    path = f"M{number(x1)} {number(y1)}"
    if end.column - start.column > 1:
        # Pass boxes between in the gap of rows, then bend at the last gap between columns.
        lane = end.x - _GAP + 6
        free = _free_row(start, end, boxes)
        first = x1 + _GAP / 2
        path += (
            f" C{number(first)} {number(y1)} {number(first - 8)} {number(free)} {number(x1 + _GAP - 8)} {number(free)}"
        )
        path += f" L{number(lane)} {number(free)}"
        y1 = free
    bend = (lane + x2) / 2
    path += f" C{number(bend)} {number(y1)} {number(bend)} {number(y2)} {number(x2)} {number(y2)}"
    picture.path(path, "edge")
    picture.path(
        f"M{number(x2)} {number(y2 - 4)} L{number(x2 + 6)} {number(y2)} L{number(x2)} {number(y2 + 4)} Z", "plain"
    )


def _free_row(start: _Box, end: _Box, boxes: dict[str, _Box]) -> float:
    """The height nearest to the straight way at which no box of the columns between is crossed."""
    between = [box for box in boxes.values() if start.column < box.column < end.column]
    wish = start.y + _BOX_HEIGHT / 2
    edges = [wish] + [box.y - (_ROW - _BOX_HEIGHT) / 2 for box in between]
    edges += [box.y + _BOX_HEIGHT + (_ROW - _BOX_HEIGHT) / 2 for box in between]
    free = [y for y in edges if all(not box.y - 4 < y < box.y + _BOX_HEIGHT + 4 for box in between)]
    return min(free, key=lambda y: (abs(y - wish) + abs(y - end.y - _BOX_HEIGHT / 2) * 0.5, y), default=wish)
