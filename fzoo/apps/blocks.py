"""A network's layers as blocks, the steps that repeat taken together."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import jax

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import snake_case
from fzoo.layers.graph import Trace, trace
from fzoo.layers.record import Node

#: More layers than this are no unit that a reader takes in at once: see `units`.
MAX_UNIT = 64


#: What a unit is about, and what leads to it; others (BN, activations, pools) belong to what is before them.
KERNELS = {"Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Sequential", "Dense"}


LEADS = {"ZeroPadding2D", "Rescaling", "Normalization", "GlobalAveragePooling2D", "GlobalMaxPooling2D", "Flatten"}


#: Layers with something to say, by Keras's class: a word, and a colour. Others are named only where they stand alone.
WORDS = {
    "Conv2D": ("Conv", "#cfe3f7"),
    "DepthwiseConv2D": ("Depthwise", "#c9ece6"),
    "SeparableConv2D": ("Separable", "#c9ece6"),
    "Dense": ("Dense", "#e2d5f2"),
    "MaxPooling2D": ("Max pool", "#fbe3c4"),
    "AveragePooling2D": ("Avg pool", "#fbe3c4"),
    "GlobalAveragePooling2D": ("Global avg pool", "#fbe3c4"),
    "GlobalMaxPooling2D": ("Global max pool", "#fbe3c4"),
    "Add": ("Add", "#e4e7eb"),
    "CustomScaleLayer": ("Add", "#e4e7eb"),
    "Multiply": ("Multiply", "#e4e7eb"),
    "Concatenate": ("Concat", "#e4e7eb"),
    "InputLayer": ("Input", "#ffffff"),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """Layers in a row, of which only the last is read by others.

    Attributes:
        name: of its last layer.
        unit: what it is part of; units follow one another.
        nodes: the layers, and the operations between them.
        inputs: names of the blocks that feed it.
        parameters: of all its layers, BN statistics included.
    """

    name: str
    unit: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    parameters: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its output, without the batch."""
        return self.nodes[-1].shape


def blocks(module: Classifier) -> list[Block]:
    """Take the network as blocks, each before those that it feeds; every layer is in exactly one.

    Raises:
        ValueError: this is no network of this package.
    """
    traced = trace(module)
    readers = Counter(name for node in traced.nodes for name in node.inputs)
    made: list[Block] = []
    for title, nodes in units(traced):
        rows: dict[str, list[Node]] = {}  # by the name of its last node so far
        for node in nodes:
            follows = len(node.inputs) == 1 and readers[node.inputs[0]] == 1
            row = rows.pop(node.inputs[0], []) if follows else []
            rows[node.name] = [*row, node]
        for last, row in rows.items():
            count = sum(traced.parameters[node.name] for node in row)
            made.append(Block(last, title, tuple(row), row[0].inputs, count))
    return made


def units(traced: Trace) -> list[tuple[str, list[Node]]]:
    """Cut a network where one array alone passes from what is before to what is after: (title, layers) of each part.

    Where that leaves too much together (a NASNet's cells read the two before them), it is cut at merges that leave
    nothing open but themselves and such merges. Layers in a row are then put together by their names.
    """
    nodes = traced.nodes
    place = {node.name: i for i, node in enumerate(nodes)}
    reach = [0] * len(nodes)  # the furthest reader of each
    above: list[int] = []  # sets of places as bits: what each is computed from, itself included
    for i, node in enumerate(nodes):
        above.append(1 << i)
        for parent in node.inputs:
            reach[place[parent]] = i
            above[i] |= above[place[parent]]
    parts: list[list[Node]] = []
    start, open_until = 0, 0
    for i in range(len(nodes)):
        if open_until <= i:
            part = list(nodes[start : i + 1])
            parts += [part] if len(part) <= MAX_UNIT else cells(part, place, above)
            start = i + 1
        open_until = max(open_until, reach[i])
    return titled(joined(parts))


def cells(part: Sequence[Node], place: dict[str, int], above: Sequence[int]) -> list[list[Node]]:
    """Cut at merges of more than two that leave nothing open but such merges, and what is before the part."""
    places = [place[node.name] for node in part]
    read_by = defaultdict(int)  # the places of an array's readers, as bits
    for i, node in zip(places, part, strict=True):
        for parent in node.inputs:
            read_by[place[parent]] |= 1 << i
    ends = [places[0] - 1]
    for i, node in zip(places, part, strict=True):
        still_open = {j for j, readers in read_by.items() if above[i] >> j & 1 and readers & ~above[i]}
        if len(node.inputs) > 2 and still_open <= {i, *ends}:
            ends.append(i)
    made, done = [], 0
    for end in dict.fromkeys([*ends[1:], places[-1]]):
        made.append([node for i, node in zip(places, part, strict=True) if above[end] & ~done & 1 << i])
        done |= above[end]
    return made


def auto_named(node: Node) -> bool:
    """Tell whether Keras made up the name: it says nothing then."""
    return node.kind == "Model" or re.fullmatch(rf"{snake_case(node.kind)}(_\d+)?", own_name(node)) is not None


def own_name(node: Node) -> str:
    """Return a layer's name without the models that it is in, and without the number of its call."""
    return node.name.rpartition("/")[2].partition(":")[0]


def stem(node: Node) -> str:
    """Return what a layer's name says of its place: up to the first number, and that of a block, or the first word."""
    if auto_named(node):
        return ""
    match = re.match(r"[A-Za-z_]*?\d+[a-z]?(?=_|$)(_block_?\d+(?=_|$))?", own_name(node))
    return match[0] if match else own_name(node).split("_")[0]


def joined(parts: list[list[Node]]) -> list[list[Node]]:
    """Put single layers together with their neighbours, by names and kinds; parts with branches stay apart."""
    made: list[list[Node]] = []
    before, branched = "", False  # what the names of the last unit say, and whether it has branches
    for part in parts:
        stems = Counter(filter(None, map(stem, part))).most_common(1)
        says, single = stems[0][0] if stems else "", len(part) == 1
        kinds = {node.kind for node in made[-1]} if made else {"InputLayer"}
        ended = made and made[-1][-1].kind in ("InputLayer", "MaxPooling2D", "AveragePooling2D")
        leads = not kinds & KERNELS and not branched
        tail = single and not branched and part[0].kind not in KERNELS | LEADS
        same = (single or not branched) and says == before
        if made and not (ended and not (says and same)) and (leads or tail or same):
            made[-1] += part
        else:
            made.append(list(part))
            before, branched = "", False
        before, branched = says or before, branched or not single
    return made


def titled(parts: list[list[Node]]) -> list[tuple[str, list[Node]]]:
    """Title units by what their layers' names have in common, or by one that stands for them; no title twice."""
    made: dict[str, list[Node]] = {}
    for part in parts:
        named_nodes = [node for node in part if not auto_named(node)]
        words = zip(*(own_name(node).split("_") for node in named_nodes), strict=False)
        title = "_".join(same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, words))
        if not title or title in made or (len({stem(node) for node in named_nodes}) > 1 and not has_branches(part)):
            kernels = [own_name(node) for node in named_nodes if node.kind in KERNELS and not has_branches(part)]
            title = [*kernels, *(own_name(node) for node in named_nodes[-1:]), span(part[0].name, part[-1].name)][0]
        made[title if title not in made else part[-1].name] = part
    return list(made.items())


def has_branches(part: Sequence[Node]) -> bool:
    """Tell whether these layers are more than a row."""
    return any(node.inputs != (before.name,) for before, node in itertools.pairwise(part))


def span(first: str, last: str) -> str:
    """Write what goes from one thing to another, or is the same all along."""
    return first if first == last else f"{first} ... {last}"


def shape_text(first: Sequence[int], last: Sequence[int]) -> str:
    """Write an output's shape; of repeated blocks, with the channels of the first and of the last."""
    *sides, _ = first
    return " x ".join([*map(str, sides), span(str(first[-1]), str(last[-1]))])


def short(count: int) -> str:
    """Write a number of parameters in three digits."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 1000 * size else f"{count / size:,.0f}{unit}"
    return str(count)


def words_of(nodes: Iterable[Node], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Write what layers do: "Conv 3x3"; the same twice in a row as "2 x Conv 3x3". `shapes` are the kernels'."""
    nodes = [part for node in nodes for part in (node.parts or (node,))]
    known_nodes = [node for node in nodes if node.kind in WORDS] or nodes
    phrases = []
    for node in known_nodes:
        words = WORDS.get(node.kind, (node.kind.removesuffix("2D"), ""))[0]
        if len(kernel := shapes.get(node.name, ())) == 4:
            words += f" {kernel[0]}x{kernel[1]}"
        if (convolution := node.config.get("convolution")) and convolution.groups > 1:
            words = f"Grouped {words.lower()}"
        phrases.append(words)
    runs = [(words, len(list(same))) for words, same in itertools.groupby(phrases)]
    return [words if count == 1 else f"{count} x {words}" for words, count in runs]


def kernel_shapes(traced: Trace) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's first kernel, by the layer's name."""
    shapes: dict[str, tuple[int, ...]] = {}
    names = {part.name for node in traced.nodes for part in (node, *node.parts)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(traced.variables.get("params", {})):
        keys = [step.key for step in path]
        owner = next((key for key in reversed(keys) if key in names), None)
        if owner is not None and keys[-1] == "kernel":
            shapes.setdefault(owner, leaf.shape)
    return shapes
