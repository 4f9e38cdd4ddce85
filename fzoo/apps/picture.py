"""A picture of a network: its layers put together into blocks, with the branches between them.

`blocks` is the graph; igraph lays out what has branches, matplotlib draws it, as PNG or SVG.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fzoo.apps.blocks import KERNELS, WORDS, Block, blocks, kernel_shapes, shape_text, short, span, words_of
from fzoo.figures import Figure, make_figure, save_figure
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.record import OPERATION

PLAIN = "#ffffff"


INK, FAINT, EDGE, FRAME = "#1f2328", "#59636e", "#8c959f", "#f6f8fa"


#: Points: of text, between things, and of a line of text before it is broken.
TITLE, BODY, SMALL = 15, 12, 11


GAP, PAD, LEVEL = 14, 8, 26


WIDE = 170


#: Width over height that a picture is to have.
ASPECT = 1.5


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle with round corners."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    outline: str = EDGE


@dataclasses.dataclass(frozen=True)
class Line:
    """Through points; with an arrow's head at the last."""

    points: tuple[tuple[float, float], ...]
    arrow: bool = True


@dataclasses.dataclass(frozen=True)
class Text:
    """One line, its upper left corner at (x, y)."""

    x: float
    y: float
    text: str
    size: int
    color: str = INK


Mark = Box | Line | Text


@functools.cache
def text_width(text: str, size: int) -> float:
    """Measure a line of text, in points."""
    try:
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import text_to_path
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("the pictures are drawn by matplotlib: pip install 'fzoo[picture]'") from e
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0]


def moved(marks: Iterable[Mark], dx: float, dy: float) -> list[Mark]:
    """Move marks."""
    return [
        dataclasses.replace(mark, points=tuple((x + dx, y + dy) for x, y in mark.points))
        if isinstance(mark, Line)
        else dataclasses.replace(mark, x=mark.x + dx, y=mark.y + dy)
        for mark in marks
    ]


def curve(start: tuple[float, float], end: tuple[float, float], arrow: bool) -> Line:
    """Lead from one point down to another, upright at both ends."""
    (x0, y0), (x1, y1) = start, end
    if x0 == x1:
        return Line((start, end), arrow)
    steps = [i / 16 for i in range(17)]
    # A cubic Bezier curve whose inner points are half-way down.
    return Line(
        tuple((x0 + (x1 - x0) * t * t * (3 - 2 * t), y0 + (y1 - y0) * (1.5 * t * (1 - t) + t**3)) for t in steps),
        arrow,
    )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Marks with their size; the origin is the upper left corner."""

    marks: tuple[Mark, ...]
    width: float
    height: float


def label(lines: Sequence[tuple[str, int, str]], fill: str, outline: str = EDGE) -> Drawing:
    """Draw a box of lines of text, (text, size, color), centred."""
    width = max(text_width(text, size) for text, size, _ in lines) + 2 * PAD
    marks: list[Mark] = []
    y = PAD - 2.0
    for text, size, color in lines:
        marks.append(Text((width - text_width(text, size)) / 2, y, text, size, color))
        y += size + 4
    height = y + PAD - 4
    return Drawing((Box(0, 0, width, height, fill, outline), *marks), width, height)


def broken(words: Sequence[str], size: int) -> list[str]:
    """Break words, separated by commas, into lines of about `WIDE`."""
    lines = [words[0]]
    for word in words[1:]:
        if text_width(f"{lines[-1]}, {word}", size) <= WIDE:
            lines[-1] += f", {word}"
        else:
            lines[-1] += ","
            lines.append(word)
    return lines


#: Where the array of the unit before comes in.
DOT = Drawing((Box(0, 0, 6, 6, EDGE),), 6, 6)


Unit = list[Block]


def repeats(graph: Sequence[Block], shapes: Mapping[str, tuple[int, ...]]) -> list[list[Unit]]:
    """Group the units, those together that repeat one another; of those with branches, the widths may differ."""
    units: list[Unit] = [list(same) for _, same in itertools.groupby(graph, key=lambda block: block.unit)]
    place = {block.name: (i, j) for i, unit in enumerate(units) for j, block in enumerate(unit)}

    def form(i: int, block: Block) -> tuple[object, ...]:
        inputs = [place[name] for name in block.inputs]
        kinds = [node.kind for node in block.nodes]
        shape = block.shape[:-1] if len(units[i]) > 1 else block.shape
        return kinds, words_of(block.nodes, shapes), shape, [(i - above, j * (above == i)) for above, j in inputs]

    forms = [[form(i, block) for block in unit] for i, unit in enumerate(units)]
    return [[units[i] for i in same] for _, same in itertools.groupby(range(len(units)), key=lambda i: forms[i])]


def describe(same: Sequence[Block], shapes: Mapping[str, tuple[int, ...]], title: str = "") -> Drawing:
    """Draw a block, or the same block of repeated units; with a title where it is all of a unit."""
    first, last = same[0], same[-1]
    kinds = [node.kind for node in first.nodes for node in (node.parts or (node,)) if node.kind in WORDS]
    kernels = [kind for kind in kinds if kind in KERNELS] or kinds
    layers = sum(node.kind != OPERATION for node in first.nodes)
    lines = [(title, TITLE, INK)] if title else []
    lines += [(line, BODY, INK) for line in broken(words_of(first.nodes, shapes), BODY)]
    if title or layers > 1 or first.parameters:
        lines.append((shape_text(first.shape, last.shape), SMALL, FAINT))
    if title:
        lines.append((counted(same), SMALL, FAINT))
    elif first.parameters:
        sizes = span(short(first.parameters), short(last.parameters))
        lines.append((f"{plural(layers, 'layer')}, {sizes}", SMALL, FAINT))
    return label(lines, WORDS[kernels[-1]][1] if kernels else PLAIN)


def counted(together: Iterable[Block]) -> str:
    """Write how many layers and parameters there are."""
    together = list(together)
    layers = sum(node.kind != OPERATION for block in together for node in block.nodes)
    parameters = sum(block.parameters for block in together)
    return f"{plural(layers, 'layer')}, {parameters:,} parameters" if parameters else plural(layers, "layer")


def plural(count: int, noun: str) -> str:
    """Write "1 layer", "2 layers"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def panel(same: Sequence[Unit], before: str, shapes: Mapping[str, tuple[int, ...]]) -> Drawing:
    """Draw a unit, once with the units that repeat it: a box, or a frame with its branches."""
    unit = same[0]
    title = span(unit[0].unit, same[-1][0].unit) + (f"   x {len(same)}" if len(same) > 1 else "")
    if len(unit) == 1:
        return describe([repeat[0] for repeat in same], shapes, title)
    drawings = {block.name: describe([repeat[i] for repeat in same], shapes) for i, block in enumerate(unit)}
    edges = [(name, block.name) for block in unit for name in block.inputs]
    outside = dict.fromkeys(name for name, _ in edges if name not in drawings)
    for name in outside:
        from_before = len(outside) == 1 and name == before
        drawings[name] = DOT if from_before else label([(f"from {name}", SMALL, FAINT)], PLAIN)
    graph = layered(drawings, edges)
    shape = shape_text(unit[-1].shape, same[-1][-1].shape)
    note = f"{shape}, {counted(block for repeat in same for block in repeat)}"
    head = TITLE + SMALL + 2 * PAD + 4
    width = max(graph.width, text_width(title, TITLE), text_width(note, SMALL)) + 2 * GAP
    height = head + graph.height + GAP
    marks: list[Mark] = [Box(0, 0, width, height, FRAME, "#d0d7de")]
    marks += [Text(GAP, PAD, title, TITLE), Text(GAP, PAD + TITLE + 4, note, SMALL, FAINT)]
    marks += moved(graph.marks, (width - graph.width) / 2, head)
    return Drawing(tuple(marks), width, height)


def layered(drawings: Mapping[str, Drawing], edges: Sequence[tuple[str, str]]) -> Drawing:
    """Lay a graph out in levels from top to bottom, by Sugiyama's method.

    Raises:
        ModuleNotFoundError: igraph is not installed; the message says how to.
    """
    try:
        from igraph import Graph
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("igraph lays the branches out: pip install 'fzoo[picture]'") from e
    place = {name: i for i, name in enumerate(drawings)}
    graph = Graph([(place[start], place[end]) for start, end in edges], n=len(place), directed=True)
    layout: Any = graph.layout_sugiyama()
    points = [(round(x, 6), int(y)) for x, y in layout]
    ways = [[(round(x, 6), int(y)) for x, y in way] for way in layout.edge_routing]  # where edges pass other levels
    widths = [drawing.width for drawing in drawings.values()] + [6.0] * sum(map(len, ways))
    centre, width = column_centres([*points, *itertools.chain(*ways)], widths)

    tall = [0.0] * (1 + max(level for _, level in points))
    for (_, level), drawing in zip(points, drawings.values(), strict=True):
        tall[level] = max(tall[level], drawing.height)
    middle = [sum(tall[:level]) + LEVEL * level + tall[level] / 2 for level in range(len(tall))]
    marks: list[Mark] = []
    for (start, end), way in zip(edges, ways, strict=True):
        (x0, from_level), (x1, to_level) = points[place[start]], points[place[end]]
        below = centre[x0], middle[from_level] + drawings[start].height / 2
        for x, level in way:
            marks.append(curve(below, (centre[x], middle[level] - tall[level] / 2), arrow=False))
            below = centre[x], middle[level] + tall[level] / 2
            marks.append(Line(((centre[x], middle[level] - tall[level] / 2), below), arrow=False))
        marks.append(curve(below, (centre[x1], middle[to_level] - drawings[end].height / 2), arrow=True))
    for (x, level), drawing in zip(points, drawings.values(), strict=True):
        marks += moved(drawing.marks, centre[x] - drawing.width / 2, middle[level] - drawing.height / 2)
    return Drawing(tuple(marks), width, sum(tall) + LEVEL * (len(tall) - 1))


def column_centres(points: Sequence[tuple[float, int]], widths: Sequence[float]) -> tuple[dict[float, float], float]:
    """Place the columns of a layout, which takes all things as equally wide, by how wide they are.

    Args:
        points: (x, level) of each thing.
        widths: of each, in points.

    Returns:
        The centre of each x, and the width of the whole, in points. A column is midway between where it is if all are
        as far to the left as can be, and where it is if all are as far to the right.
    """

    def leftmost(sign: int) -> dict[float, float]:
        centre: dict[float, float] = {}
        taken: dict[int, float] = defaultdict(float)  # of each level
        last = 0.0
        things = sorted((sign * x, level, width) for (x, level), width in zip(points, widths, strict=True))
        for x, column in itertools.groupby(things, key=lambda thing: thing[0]):
            column = list(column)
            last = centre[sign * x] = max([last, *(taken[level] + width / 2 for _, level, width in column)])
            taken |= {level: last + width / 2 + GAP for _, level, width in column}
        return centre

    left, right = leftmost(1), leftmost(-1)
    whole = max(left[x] + width / 2 for (x, _), width in zip(points, widths, strict=True))
    return {x: (left[x] + whole - right[x]) / 2 for x in left}, whole


def draw(module: Classifier, title: str = "") -> Drawing:
    """Draw the whole picture: units from top to bottom, in columns."""
    traced = trace(module)
    shapes = kernel_shapes(traced)
    runs = repeats(blocks(module), shapes)
    drawings: list[Drawing] = []
    before = ""
    for same in runs:
        drawings.append(panel(same, before, shapes))
        before = same[-1][-1].name
    columns = best_columns(drawings)
    head = TITLE + 3 * GAP if title else GAP
    marks: list[Mark] = []
    x, height = 2.0 * GAP, 0.0
    leaving: tuple[float, float] | None = None
    for column in columns:
        wide, y = max(drawing.width for drawing in column), float(head)
        middle = x + wide / 2
        for drawing in column:
            if leaving is not None and leaving[0] == middle:
                marks.append(Line((leaving, (middle, y))))
            elif leaving is not None:  # into the next column, through the space between
                between, (x0, y0) = x - GAP * 1.5, leaving
                way = (
                    (x0, y0),
                    (x0, y0 + GAP),
                    (between, y0 + GAP),
                    (between, y - GAP),
                    (middle, y - GAP),
                    (middle, y),
                )
                marks.append(Line(way))
            marks += moved(drawing.marks, middle - drawing.width / 2, y)
            leaving = middle, y + drawing.height
            y += drawing.height + LEVEL
        height = max(height, y - LEVEL + 2 * GAP)
        x += wide + 3 * GAP
    width = max(x - GAP, text_width(title, TITLE + 2) + 4 * GAP)
    if title:
        marks.append(Text(2 * GAP, GAP, title, TITLE + 2))
    return Drawing(tuple(marks), width, height)


def best_columns(drawings: Sequence[Drawing]) -> list[list[Drawing]]:
    """Cut a row of drawings into columns, so that the whole is nearest to `ASPECT`."""

    def cut(limit: float) -> list[list[Drawing]]:
        columns: list[list[Drawing]] = [[]]
        for drawing in drawings:
            if columns[-1] and tall([*columns[-1], drawing]) > limit:
                columns.append([])
            columns[-1].append(drawing)
        return columns

    def tall(column: Sequence[Drawing]) -> float:
        return sum(drawing.height + LEVEL for drawing in column)

    def off(columns: list[list[Drawing]]) -> float:
        width = sum(max(drawing.width for drawing in column) + 3 * GAP for column in columns)
        return abs(math.log(width / max(map(tall, columns)) / ASPECT))

    # The lowest columns of each count: these are as high as some of the drawings that follow one another.
    limits = sorted(tall(drawings[i:j]) for i, j in itertools.combinations(range(len(drawings) + 1), 2))
    lowest = {len(columns): columns for columns in map(cut, reversed(limits))}
    return min(lowest.values(), key=off)


def render(drawing: Drawing) -> Figure:
    """Draw as a figure of matplotlib, in which a unit is a point."""
    figure = make_figure(drawing.width / 72, drawing.height / 72, extra="picture", dpi=144, layout=None)
    from matplotlib.lines import Line2D
    from matplotlib.markers import CARETDOWN
    from matplotlib.patches import FancyBboxPatch

    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    ax.set_axis_off()
    for order, mark in enumerate(drawing.marks):
        if isinstance(mark, Box):
            style = f"round, pad=0, rounding_size={min(5, mark.width / 2)}"
            at = mark.x, mark.y
            ax.add_patch(
                FancyBboxPatch(at, mark.width, mark.height, style, fc=mark.fill, ec=mark.outline, zorder=order)
            )
        elif isinstance(mark, Text):
            style = {"size": mark.size, "color": mark.color, "va": "top", "parse_math": False}  # no text is a formula
            ax.text(mark.x, mark.y, mark.text, style, zorder=order)
        else:
            xs, ys = zip(*mark.points, strict=True)
            head: Any = CARETDOWN if mark.arrow else None
            ax.add_line(Line2D(xs, ys, color=EDGE, lw=1.25, marker=head, ms=9, markevery=[-1], zorder=order))
    return figure


def save_picture(module: Classifier, path: str | os.PathLike, title: str = "") -> None:
    """Draw a network's blocks: what each does, its output, its layers and parameters; units that repeat are drawn once.

    Args:
        module: from `fzoo.create`.
        path: the file to write, .png or .svg.
        title: a line above.

    Raises:
        ValueError: the name ends otherwise, or this is no network of this package.
        ModuleNotFoundError: igraph or matplotlib is not installed; the message says how to.
        OSError: it can't be written.
    """
    path = Path(path)
    check_picture(path, (".png", ".svg"))
    save_figure(render(draw(module, title)), path)


def check_picture(path: str | os.PathLike, endings: Sequence[str] = (".png",)) -> None:
    """Raise ValueError unless a picture of this name can be written."""
    if Path(path).suffix not in endings:
        raise ValueError(f"{path}: a name that ends in {' or '.join(endings)} expected")
