"""Whether the model that a Keras file describes is the network that was asked for by its name."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fzoo.layers.classifier import OF_RUNS, Classifier
from fzoo.layers.computation import computation_of
from fzoo.layers.graph import last_map, trace
from fzoo.layers.record import Node
from fzoo.models.keras_model import KerasModel
from fzoo.pretrained.whole import WholeFile
from fzoo.weights import WeightsMismatch
from fzoo.weights.files import Contents
from fzoo.weights.graph import Plan
from fzoo.weights.mapping import Match, fitted, match, regrouped
from fzoo.weights.names import open_named_layers
from fzoo.weights.whole import match_plan

#: How many layers may stand before a network in a file: those that make its input of an image.
MOST_BEFORE = 16

#: Layers before a network of which the loader says that they are left out.
SAID = ("Rescaling", "Normalization")


class Comparison(NamedTuple):
    """How the model that a file describes compares with a network.

    Attributes:
        difference: the first layer that differs, in words; "" where the file has the network.
        before: what the file's model does before the network, beside the preprocessing that loading tells.
    """

    difference: str
    before: tuple[str, ...] = ()


def check_same_network(module: Classifier, name: str, path: str | os.PathLike, file: WholeFile) -> None:
    """Look whether a network computes what the file describes that its weights are from.

    A warning says where the file's model can't be compared, and what it does before the network.

    Args:
        module: of a family.
        name: the model's.
        path: of the file, whose arrays fit.
        file: what it describes.

    Raises:
        WeightsMismatch: it is another network; the message names the first layer that differs.
    """
    if file.module is None:
        warnings.warn(f"{path}: whether its model is {name} can't be told: {file.problem}", stacklevel=3)
        return
    with open_named_layers(path) as contents:
        comparison = compare(module, contents, str(path), file.module, file.plans)
    if comparison.difference:
        raise WeightsMismatch(
            f"{path} is not {name} as it is known: {comparison.difference}; "
            "fzoo.load_model(path) runs the file as it is",
            [],
        )
    if comparison.before:
        warnings.warn(f"{path}: {', '.join(comparison.before)} before the network left out, of its model", stacklevel=3)


def compare(
    module: Classifier, contents: Contents, source: str, whole: KerasModel, plans: Sequence[Plan]
) -> Comparison:
    """Compare a network with the model that a file describes, in which its arrays are.

    Names of layers do not count, nor does what is nothing in inference; the size of the image is the file's.

    Args:
        module: of a family.
        contents: of the file, which fit.
        source: the file's name, for errors.
        whole, plans: what it describes.
    """
    matched = match(module, contents, source)
    compared = compared_network(module, whole, contents, matched)
    ours = {slot.path: str(array.name) for slot, array in matched.pairs}
    theirs = {slot.path: str(array.name) for slot, array in match_plan(whole, plans, contents.layers, source)}
    ends = matched.within is None and module.include_top
    nearest: tuple[int, str] = (-1, "")
    for view in views_of(whole, theirs):
        for sized in sized_for(compared, view.image):
            digests = computation_of(sized, jax.ShapeDtypeStruct((1, *view.image), "float32")).digests(ours)
            target = trace(sized).outputs[0] if sized.include_top == module.include_top else last_map(trace(sized))
            given = [view.digests[output] for output in view.outputs] if ends else view.digests.values()
            if target is not None and digests[target] in given:
                return Comparison("", tuple(node.name for node in view.before if node.kind not in SAID))
            common = len(set(digests.values()) & set(view.digests.values()))
            if common > nearest[0]:
                nearest = common, difference(view, whole, sized, digests)
    return Comparison(nearest[1])


def compared_network(module: Classifier, whole: KerasModel, contents: Contents, matched: Match) -> Classifier:
    """Return the network to compare: with its top, where the file has one, and an activation."""
    layers = contents.layers
    if matched.within is not None:
        inside = next(layer for layer in layers if layer.name == matched.within)
        layers = regrouped(module, inside.unfolded())
    fields = dataclasses.fields(Classifier)
    usual: dict[str, Any] = {field.name: field.default for field in fields if field.name in OF_RUNS}
    compared = (fitted(module, layers) or module).clone(**usual)
    if not compared.include_top:
        return compared.clone(pooling=None)
    if matched.within is None and module.classifier_activation in (None, "linear"):
        return compared.clone(classifier_activation=whole.classifier_activation)
    return compared


def sized_for(module: Classifier, shape: tuple[int, int, int]) -> Iterator[Classifier]:
    """Yield a network for images of a size, and as Keras builds it where it does not know the size."""
    for shape_known in (shape, (None, None, shape[-1])):
        try:
            yield module.clone(input_shape=shape_known)
        except ValueError:  # too small, or a top that goes with one size
            continue


class View(NamedTuple):
    """The digests of a file's layers, where one of them is taken for the image.

    Attributes:
        digests: of each layer.
        image: (height, width, channels) of what is taken for the image.
        before: the layers that are not looked at, between the input and the network.
        outputs: the names of the outputs of the file's model.
    """

    digests: Mapping[str, str]
    image: tuple[int, int, int]
    before: Sequence[Node]
    outputs: Sequence[str]


def views_of(whole: KerasModel, arrays: Mapping[tuple[str, ...], str]) -> Iterator[View]:
    """Yield the ways in which a network may begin in a model: at its input, or after layers without weights."""
    computation = computation_of(whole)
    traced, owners = trace(whole), {layer for _, layer, *_ in arrays}
    yield View(computation.digests(arrays), whole.example_shape, (), traced.outputs)
    before: list[Node] = []
    for node in traced.layers[:MOST_BEFORE]:
        if node.variables in owners:
            return
        if node.kind != "InputLayer":
            before.append(node)
            if len(node.shape) == 3:
                yield View(computation.digests(arrays, node.name), node.shape, tuple(before), traced.outputs)


def difference(view: View, whole: KerasModel, compared: Classifier, digests: Mapping[str, str]) -> str:
    """Say which layer of a file is the first that the network does not have, and what it is in the network."""
    ours = {digest: name for name, digest in digests.items()}
    by_name = {node.name: node for node in trace(compared).layers}
    places: dict[tuple[str, ...], list[Node]] = {}
    for node in by_name.values():
        places.setdefault(tuple(digests.get(name, name) for name in node.inputs), []).append(node)
    skipped = {node.name for node in view.before}
    for node in trace(whole).layers:
        taken = tuple(view.digests.get(name, name) for name in node.inputs)
        if node.name in skipped or node.kind == "InputLayer" or view.digests[node.name] in ours:
            continue
        if not all(one in ours for one in taken):
            continue
        here = [other for other in places.get(taken, []) if other.kind == node.kind] or places.get(taken, [])
        return f"its layer {node.name}{unlike(node, here[0]) if here else f' ({node.kind}) is not in the network'}"
    return "its layers are put together in another way"


def unlike(file: Node, network: Node) -> str:
    """Say how two layers that take the same differ."""
    if file.kind != network.kind:
        return f" is a {file.kind}, {network.name} a {network.kind}"
    keys = [key for key in file.config if file.config[key] != network.config.get(key)]
    options = ", ".join(f"{key}={file.config[key]!r}, {network.config.get(key)!r} wanted" for key in keys)
    return f" ({file.kind}) differs from {network.name}" + (f": {options}" if options else "")
