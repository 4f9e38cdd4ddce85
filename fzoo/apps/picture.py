"""A picture of a network: its layers put together into blocks, with the branches between them.

`blocks` is the graph; the rest lays it out and draws it, as PNG (Pillow) or SVG.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fzoo.apps.blocks import KERNELS, WORDS, Block, blocks, kernel_shapes, shape_text, short, span, words_of
from fzoo.files import replacing
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.record import OPERATION

PLAIN = "#ffffff"


INK, FAINT, EDGE, FRAME = "#1f2328", "#59636e", "#8c959f", "#f6f8fa"


#: Pixels, at a scale of 1: of text, between things, and of a line of text before it is broken.
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
def font(size: int) -> Any:
    """Pillow's own."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """In pixels at a scale of 1, as drawn at one of 2."""
    return font(2 * size).getlength(text) / 2


def moved(marks: Iterable[Mark], dx: float, dy: float) -> list[Mark]:
    """The same marks elsewhere."""
    return [
        dataclasses.replace(mark, points=tuple((x + dx, y + dy) for x, y in mark.points))
        if isinstance(mark, Line)
        else dataclasses.replace(mark, x=mark.x + dx, y=mark.y + dy)
        for mark in marks
    ]


def curve(start: tuple[float, float], end: tuple[float, float], arrow: bool) -> Line:
    """From one point down to another, upright at both ends."""
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
class Piece:
    """Marks with their size; the origin is the upper left corner."""

    marks: tuple[Mark, ...]
    width: float
    height: float


def label(lines: Sequence[tuple[str, int, str]], fill: str, outline: str = EDGE) -> Piece:
    """A box of lines of text, (text, size, color), centred."""
    width = max(text_width(text, size) for text, size, _ in lines) + 2 * PAD
    marks: list[Mark] = []
    y = PAD - 2.0
    for text, size, color in lines:
        marks.append(Text((width - text_width(text, size)) / 2, y, text, size, color))
        y += size + 4
    height = y + PAD - 4
    return Piece((Box(0, 0, width, height, fill, outline), *marks), width, height)


def broken(words: Sequence[str], size: int) -> list[str]:
    """Words, separated by commas, in lines of about `WIDE`."""
    lines = [words[0]]
    for word in words[1:]:
        if text_width(f"{lines[-1]}, {word}", size) <= WIDE:
            lines[-1] += f", {word}"
        else:
            lines[-1] += ","
            lines.append(word)
    return lines


#: Where the array of the unit before comes in.
DOT = Piece((Box(0, 0, 6, 6, EDGE),), 6, 6)


Unit = list[Block]


def repeats(graph: Sequence[Block], shapes: Mapping[str, tuple[int, ...]]) -> list[list[Unit]]:
    """The units, those together that repeat one another; of those with branches, the widths may differ."""
    found: list[Unit] = [list(same) for _, same in itertools.groupby(graph, key=lambda block: block.unit)]
    place = {block.name: (i, j) for i, unit in enumerate(found) for j, block in enumerate(unit)}

    def form(i: int, block: Block) -> Any:
        inputs = [place[name] for name in block.inputs]
        kinds = [node.kind for node in block.nodes]
        shape = block.shape[:-1] if len(found[i]) > 1 else block.shape
        return kinds, words_of(block.nodes, shapes), shape, [(i - above, j * (above == i)) for above, j in inputs]

    forms = [[form(i, block) for block in unit] for i, unit in enumerate(found)]
    return [[found[i] for i in same] for _, same in itertools.groupby(range(len(found)), key=lambda i: forms[i])]


def describe(same: Sequence[Block], shapes: Mapping[str, tuple[int, ...]], title: str = "") -> Piece:
    """A block, or the same block of repeated units; with a title where it is all of a unit."""
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
    """How many layers and parameters there are."""
    together = list(together)
    layers = sum(node.kind != OPERATION for block in together for node in block.nodes)
    parameters = sum(block.parameters for block in together)
    return f"{plural(layers, 'layer')}, {parameters:,} parameters" if parameters else plural(layers, "layer")


def plural(count: int, what: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{count} {what}{'s' * (count != 1)}"


def panel(same: Sequence[Unit], before: str, shapes: Mapping[str, tuple[int, ...]]) -> Piece:
    """A unit, drawn once with the units that repeat it: a box, or a frame with its branches."""
    unit = same[0]
    title = span(unit[0].unit, same[-1][0].unit) + (f"   x {len(same)}" if len(same) > 1 else "")
    if len(unit) == 1:
        return describe([each[0] for each in same], shapes, title)
    pieces = {block.name: describe([each[i] for each in same], shapes) for i, block in enumerate(unit)}
    edges = [(name, block.name) for block in unit for name in block.inputs]
    outside = dict.fromkeys(name for name, _ in edges if name not in pieces)
    for name in outside:
        from_before = len(outside) == 1 and name == before
        pieces[name] = DOT if from_before else label([(f"from {name}", SMALL, FAINT)], PLAIN)
    graph = layered(pieces, edges)
    shape = shape_text(unit[-1].shape, same[-1][-1].shape)
    note = f"{shape}, {counted(block for each in same for block in each)}"
    head = TITLE + SMALL + 2 * PAD + 4
    width = max(graph.width, text_width(title, TITLE), text_width(note, SMALL)) + 2 * GAP
    height = head + graph.height + GAP
    marks: list[Mark] = [Box(0, 0, width, height, FRAME, "#d0d7de")]
    marks += [Text(GAP, PAD, title, TITLE), Text(GAP, PAD + TITLE + 4, note, SMALL, FAINT)]
    marks += moved(graph.marks, (width - graph.width) / 2, head)
    return Piece(tuple(marks), width, height)


def layered(pieces: Mapping[str, Piece], edges: Sequence[tuple[str, str]]) -> Piece:
    """Lay a graph out in levels from top to bottom; `pieces` in an order in which each is before what it feeds.

    Edges over more than a level get a place of their own in those between, so that they pass no piece. Within a level
    the order is that of the means of what they hang from, and then of what hangs from them, a few times over.
    """
    level: dict[str, int] = {}
    inputs: dict[str, list[str]] = defaultdict(list)
    for start, end in edges:
        inputs[end].append(start)
    order = [name for name in pieces if not inputs[name]]
    order += [name for name in pieces if inputs[name]]
    for name in order:
        level[name] = 1 + max((level[parent] for parent in inputs[name]), default=-1)
    width = {name: piece.width for name, piece in pieces.items()}
    chains: list[list[str]] = []  # each edge with its places on the way
    for start, end in edges:
        way = [f"{start} > {end} @ {at}" for at in range(level[start] + 1, level[end])]
        level |= {name: level[start] + 1 + i for i, name in enumerate(way)}
        width |= dict.fromkeys(way, 6)
        chains.append([start, *way, end])
    rows = [[name for name in level if level[name] == at] for at in range(max(level.values()) + 1)]
    near: dict[tuple[str, int], list[str]] = defaultdict(list)  # what a piece is joined to, upwards and downwards
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            near[upper, 1].append(lower)
            near[lower, -1].append(upper)
    centre: dict[str, float] = {}
    for row in rows:
        centre |= spread_out(row, dict.fromkeys(row, 0.0), width)
    for turn in range(12):
        way = -1 if turn % 2 == 0 else 1
        for row in rows if way == -1 else reversed(rows):
            wanted = {name: mean(near[name, way] or [name], centre, width) for name in row}
            if turn < 8:
                row.sort(key=wanted.__getitem__)
            centre |= spread_out(row, wanted, width)
    left = min(centre[name] - width[name] / 2 for name in centre)
    marks: list[Mark] = []
    top: dict[str, float] = {}
    height: dict[str, float] = {}
    y = 0.0
    for row in rows:
        tall = max((pieces[name].height for name in row if name in pieces), default=0.0)
        for name in row:
            top[name], height[name] = y, tall
            if name in pieces:
                height[name] = pieces[name].height
                top[name] = y + (tall - height[name]) / 2
                marks += moved(pieces[name].marks, centre[name] - left - width[name] / 2, top[name])
        y += tall + LEVEL
    lines: list[Mark] = []
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            start = centre[upper] - left, top[upper] + height[upper]
            lines.append(curve(start, (centre[lower] - left, top[lower]), arrow=lower in pieces))
            if lower not in pieces:
                x = centre[lower] - left
                lines.append(Line(((x, top[lower]), (x, top[lower] + height[lower])), arrow=False))
    right = max(centre[name] + width[name] / 2 for name in centre)
    return Piece((*lines, *marks), right - left, y - LEVEL)


def mean(names: Sequence[str], values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean of some of the values."""
    return sum(values[name] * weights[name] for name in names) / sum(weights[name] for name in names)


def spread_out(row: Sequence[str], wanted: Mapping[str, float], width: Mapping[str, float]) -> dict[str, float]:
    """Centres of a row's pieces, in their order, near to those wanted, and apart."""
    found: dict[str, float] = {}
    edge = -math.inf
    for name in row:
        found[name] = max(wanted[name], edge + width[name] / 2)
        edge = found[name] + width[name] / 2 + GAP
    shift = mean(row, wanted, width) - mean(row, found, width)
    return {name: x + shift for name, x in found.items()}


def draw(module: Classifier, title: str = "") -> Piece:
    """The whole picture: units from top to bottom, in columns."""
    found = trace(module)
    shapes = kernel_shapes(found)
    runs = repeats(blocks(module), shapes)
    pieces: list[Piece] = []
    before = ""
    for same in runs:
        pieces.append(panel(same, before, shapes))
        before = same[-1][-1].name
    columns = best_columns(pieces)
    head = TITLE + 3 * GAP if title else GAP
    marks: list[Mark] = []
    x, height = 2.0 * GAP, 0.0
    leaving: tuple[float, float] | None = None
    for column in columns:
        wide, y = max(piece.width for piece in column), float(head)
        middle = x + wide / 2
        for piece in column:
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
            marks += moved(piece.marks, middle - piece.width / 2, y)
            leaving = middle, y + piece.height
            y += piece.height + LEVEL
        height = max(height, y - LEVEL + 2 * GAP)
        x += wide + 3 * GAP
    width = max(x - GAP, text_width(title, TITLE + 2) + 4 * GAP)
    if title:
        marks.append(Text(2 * GAP, GAP, title, TITLE + 2))
    return Piece(tuple(marks), width, height)


def best_columns(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Cut a row of pieces into columns, so that the whole is nearest to `ASPECT`."""

    def cut(limit: float) -> list[list[Piece]]:
        columns: list[list[Piece]] = [[]]
        for piece in pieces:
            if columns[-1] and tall([*columns[-1], piece]) > limit:
                columns.append([])
            columns[-1].append(piece)
        return columns

    def tall(column: Sequence[Piece]) -> float:
        return sum(piece.height + LEVEL for piece in column)

    def off(columns: list[list[Piece]]) -> float:
        width = sum(max(piece.width for piece in column) + 3 * GAP for column in columns)
        return abs(math.log(width / max(map(tall, columns)) / ASPECT))

    # The lowest columns of each count: these are as high as some of the pieces that follow one another.
    limits = sorted(tall(pieces[i:j]) for i, j in itertools.combinations(range(len(pieces) + 1), 2))
    lowest = {len(columns): columns for columns in map(cut, reversed(limits))}
    return min(lowest.values(), key=off)


def png(picture: Piece, scale: int = 2) -> Image.Image:
    """As pixels, `scale` to each of the layout's."""
    image = Image.new("RGB", (math.ceil(picture.width * scale), math.ceil(picture.height * scale)), "white")
    canvas = ImageDraw.Draw(image)
    for mark in picture.marks:
        if isinstance(mark, Box):
            corners = [scale * v for v in (mark.x, mark.y, mark.x + mark.width, mark.y + mark.height)]
            canvas.rounded_rectangle(corners, 5 * scale, mark.fill, mark.outline, scale)
        elif isinstance(mark, Text):
            canvas.text((mark.x * scale, mark.y * scale), mark.text, mark.color, font(mark.size * scale))
        else:
            points = [(x * scale, y * scale) for x, y in mark.points]
            canvas.line(points, EDGE, round(1.25 * scale), joint="curve")
            if mark.arrow:
                canvas.polygon([(x * scale, y * scale) for x, y in arrow_head(mark)], EDGE)
    return image


def arrow_head(line: Line) -> list[tuple[float, float]]:
    """The corners of a triangle at the end of a line that comes from above."""
    x, y = line.points[-1]
    return [(x, y), (x - 3.5, y - 7), (x + 3.5, y - 7)]


def svg(picture: Piece) -> str:
    """As text."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture.width:.0f} {picture.height:.0f}" '
        f'width="{picture.width:.0f}" height="{picture.height:.0f}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for mark in picture.marks:
        if isinstance(mark, Box):
            lines.append(
                f'<rect x="{mark.x:.1f}" y="{mark.y:.1f}" width="{mark.width:.1f}" height="{mark.height:.1f}" rx="5" '
                f'fill="{mark.fill}" stroke="{mark.outline}"/>'
            )
        elif isinstance(mark, Text):  # as wide as measured, whatever font there is
            lines.append(
                f'<text x="{mark.x:.1f}" y="{mark.y + mark.size:.1f}" font-size="{mark.size}" fill="{mark.color}" '
                f'textLength="{text_width(mark.text, mark.size):.1f}" lengthAdjust="spacingAndGlyphs" '
                f'xml:space="preserve">{html.escape(mark.text)}</text>'
            )
        else:
            way = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
            lines.append(f'<polyline points="{way}" fill="none" stroke="{EDGE}" stroke-width="1.25"/>')
            if mark.arrow:
                corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in arrow_head(mark))
                lines.append(f'<polygon points="{corners}" fill="{EDGE}"/>')
    return "\n".join([*lines, "</svg>", ""])


def save_picture(module: Classifier, path: str | os.PathLike, title: str = "") -> None:
    """Draw a network's blocks: what each does, its output, its layers and parameters; units that repeat are drawn once.

    Args:
        module: from `fzoo.create`.
        path: the file to write, .png or .svg.
        title: a line above.

    Raises:
        ValueError: the name ends otherwise, or this is no network of this package.
        OSError: it can't be written.
    """
    path = Path(path)
    check_picture(path, (".png", ".svg"))
    picture = draw(module, title)
    with replacing(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(svg(picture), encoding="utf-8")
        else:
            png(picture).save(temporary)


def check_picture(path: str | os.PathLike, endings: Sequence[str] = (".png",)) -> None:
    """Raise ValueError unless a picture of this name can be written."""
    if Path(path).suffix not in endings:
        raise ValueError(f"{path}: a name that ends in {' or '.join(endings)} expected")
