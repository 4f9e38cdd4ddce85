"""Which array of a Keras file is which variable of a network.

A network's parameters carry Keras's names of layers, so no family needs a table: this file says which arrays a layer
of each Keras class has, in Keras's order, and pairs a file's layers with a network's.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import h5py
import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import snake_case
from fzoo.layers.graph import trace
from fzoo.layers.record import Node
from fzoo.types import MutableVariables, Variables
from fzoo.weights.files import Contents, FileLayer, WeightsMismatch, array_path, by_number

_KERNEL, _BIAS = ("kernel", ("params", "kernel")), ("bias", ("params", "bias"))
_SEPARABLE = (
    ("depthwise_kernel", ("params", "depthwise", "kernel")),
    ("pointwise_kernel", ("params", "pointwise", "kernel")),
    ("bias", ("params", "pointwise", "bias")),
)

#: For each Keras class: its arrays in the file's order (trainable first) by Keras's name, and the variable (collection,
#: path below the layer). An array that a layer does not have (use_bias=False, scale=False) is left out.
ARRAYS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "Conv2D": (_KERNEL, _BIAS),
    "DepthwiseConv2D": (_KERNEL, _BIAS),
    "Dense": (_KERNEL, _BIAS),
    "Conv2DTranspose": (_KERNEL, _BIAS),
    "Conv1D": (_KERNEL, _BIAS),
    "DepthwiseConv1D": (_KERNEL, _BIAS),
    "SeparableConv2D": _SEPARABLE,
    "SeparableConv1D": _SEPARABLE,
    "BatchNormalization": (
        ("gamma", ("params", "scale")),
        ("beta", ("params", "bias")),
        ("moving_mean", ("batch_stats", "mean")),
        ("moving_variance", ("batch_stats", "var")),
    ),
    "LayerNormalization": (("gamma", ("params", "scale")), ("beta", ("params", "bias"))),
    "GroupNormalization": (("gamma", ("params", "scale")), ("beta", ("params", "bias"))),
    "PReLU": (("alpha", ("params", "alpha")),),
    "LayerScale": (("gamma", ("params", "gamma")),),
    "Normalization": (
        ("mean", ("batch_stats", "mean")),
        ("variance", ("batch_stats", "var")),
        ("count", ("batch_stats", "count")),
    ),
}


#: What is said of a network that was optimized, where it can't be.
PLAIN = "optimize_for_inference made this network; the plain one, from which it came, is wanted here"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array: its place in Keras's layer, and in the variables.

    Attributes:
        layer: Keras's name of the layer.
        part: Keras's name of the layer inside of that one, if it is a Sequential; otherwise None.
        array: Keras's name of the array.
        path: (collection, layer, ...) in the variables.
        keras_shape: as Keras keeps it; a reshape leads to `shape` and back, where there are no groups.
        shape: as Flax keeps it.
        dtype: of the variable.
        groups: of a grouped convolution that Keras's files keep as a depthwise one, whose outputs are summed; else 1.
    """

    layer: str
    part: str | None
    array: str
    path: tuple[str, ...]
    keras_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    groups: int = 1

    @property
    def name(self) -> str:
        """The array's name below the layer."""
        return f"{self.part}/{self.array}" if self.part else self.array

    def from_keras(self, array: np.ndarray | np.generic) -> np.ndarray | np.generic:
        """Turn an array of a file into the variable's layout."""
        if self.groups > 1:
            height, width, channels, multiplier = self.keras_shape
            array = array.reshape(height, width, self.groups, channels // self.groups, multiplier).swapaxes(2, 3)
        return array.reshape(self.shape)

    def to_keras(self, value: np.ndarray) -> np.ndarray:
        """Turn a variable into the layout of a file."""
        if self.groups > 1:
            height, width, channels, features = self.shape
            value = value.reshape(height, width, channels, self.groups, features // self.groups).swapaxes(2, 3)
        return np.reshape(value, self.keras_shape)


def slots(module: Classifier) -> dict[str, list[Slot]]:
    """List the arrays of every layer of a network that has any, in Keras's order; a layer's trainable ones first."""
    nodes, variables = trace(module).nodes, trace(module).variables
    if module.prepared:
        raise ValueError(PLAIN)
    by_name = {node.name: node for node in nodes}
    by_layer: dict[str, list[Slot]] = {}
    for layer in nodes:
        for node in layer.parts or (layer,):
            part = None if node is layer else node.name
            for array, (collection, *below) in ARRAYS.get(node.kind, ()):
                path = (collection, layer.name, *([part] if part else []), *below)
                leaf = lookup(variables, path)
                if leaf is None:
                    continue
                keras_shape, groups = leaf.shape, 1
                if (node.kind.startswith("DepthwiseConv") and array == "kernel") or array == "depthwise_kernel":
                    # Keras: (h, w, channels, multiplier). Flax: (h, w, 1, channels * multiplier).
                    channels = by_name[node.inputs[0]].shape[-1]
                    keras_shape = (*leaf.shape[:-2], channels, leaf.shape[-1] // channels)
                elif module.groups_as_depthwise and node.kind == "Conv2D" and array == "kernel":
                    channels = by_name[node.inputs[0]].shape[-1]
                    groups = channels // leaf.shape[-2]
                    keras_shape = (*leaf.shape[:-2], channels, leaf.shape[-1] // groups) if groups > 1 else leaf.shape
                slot = Slot(layer.name, part, array, path, keras_shape, leaf.shape, leaf.dtype, groups)
                by_layer.setdefault(layer.name, []).append(slot)
    for arrays in by_layer.values():
        arrays.sort(key=lambda slot: slot.path[0] != "params")
    return by_layer


def lookup(tree: PyTree, path: Sequence[str]) -> PyTree:
    """Return the leaf at a path of nested mappings, or None."""
    for key in path:
        if not hasattr(tree, "keys") or key not in tree:
            return None
        tree = tree[key]
    return tree


def put(tree: MutableVariables, slot: Slot, value: jax.Array | np.ndarray | np.generic) -> None:
    """Put an array's value at its path in a tree of variables."""
    at = tree
    for key in slot.path[:-1]:
        at = at.setdefault(key, {})
    at[slot.path[-1]] = value


def check_variables(module: Classifier, variables: Variables) -> list[tuple[Slot, ArrayLike]]:
    """List every array of a network beside its value.

    Raises:
        WeightsMismatch: the variables are not this network's.
    """
    expected = [slot for layer in slots(module).values() for slot in layer]
    check_shapes(module, variables, {slot.path: slot.shape for slot in expected})
    return [(slot, lookup(variables, slot.path)) for slot in expected]


def arrays_of(module: Classifier) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """List the arrays of a network, which may be prepared for inference, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(trace(module).variables)
    return {tuple(step.key for step in path): leaf for path, leaf in leaves}


def check_shapes(
    module: Classifier, variables: PyTree, expected: Mapping[tuple[str, ...], tuple[int, ...]] | None = None
) -> None:
    """Raise WeightsMismatch unless variables have these paths and shapes, and no others; by default the network's."""
    expected = {keys: leaf.shape for keys, leaf in arrays_of(module).items()} if expected is None else expected
    given = {
        tuple(str(getattr(k, "key", k)) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    }
    problems = [f"{'/'.join(path)} is left over" for path in sorted(given - expected.keys())]
    for path, shape in expected.items():
        value = lookup(variables, path)
        if np.shape(value) != shape:
            is_what = "missing" if value is None else f"{np.shape(value)}"
            problems.append(f"{'/'.join(path)} is {is_what}, {shape} wanted")
    if problems:
        raise WeightsMismatch(f"these are not the variables of this {type(module).__name__}", problems)


@dataclasses.dataclass(frozen=True)
class Match:
    """A network found in a file.

    Attributes:
        pairs: every variable of the network, and its array.
        within: the layer of the file that is the network, if that is nested in another model; otherwise None.
        left_out: what else the file holds: the full path of each array in it with the array's shape, after the layer's
            name where the path has it not; the names of layers that preprocess.
        preprocessing: how many layers of each class in `PREPROCESSING` the file's network has; None if it doesn't tell.
    """

    pairs: list[tuple[Slot, h5py.Dataset]]
    within: str | None
    left_out: list[str]
    preprocessing: Counter[str] | None


#: Layers that change what a network takes and need no array, in snake case, as a file calls them or their class.
PREPROCESSING = re.compile(r"(?:.*_prestem_)?(rescaling|normalization)(?:_\d+)?")


def preprocessing(listed: Sequence[str]) -> Counter[str] | None:
    """Count the layers of a list that preprocess; None for an empty list, which says nothing."""
    matches = filter(None, map(PREPROCESSING.fullmatch, listed))
    return Counter(match[1] for match in matches) if listed else None


def own_preprocessing(module: Classifier) -> Counter[str]:
    """Count a network's layers that preprocess."""
    return preprocessing([snake_case(node.kind) for node in trace(module).layers]) or Counter()


def match(module: Classifier, contents: Contents, source: str, chosen: FileLayer | None = None) -> Match:
    """Pair every variable of a network with its array in a file.

    Keras loads by position, since names in its published files differ from today's. So do we, with the names as a
    check: a layer that the file calls as the network does is paired by that name. A file with the top fits a network
    without it; its top is left out. Where the network is one layer of a larger model, as transfer learning makes them,
    that layer is taken, and the rest left out.

    Args:
        module: the network.
        contents: of the file.
        source: the file's name, for errors.
        chosen: the layer of the file that is the network; None to look for it.

    Raises:
        WeightsMismatch: naming the arrays that are missing, left over, or of another shape.
    """
    layers = contents.layers
    if chosen is None and (around := with_head(module, layers)) is not None:
        listed = [*contents.listed, *around.listed] if contents.listed and around.listed else []
        return Match(match_layers(module, list(around.parts), source), None, [], preprocessing(listed))
    if chosen is None:
        models = [model for model in layers if model.unfolded()]
        fitting = [model for model in models if fitted(module, regrouped(module, model.unfolded())) is not None]
        if fitted(module, layers) is not None or not fitting:
            pairs = match_layers(module, layers, source)
            return Match(pairs, None, dropped(module, layers), preprocessing(contents.listed))
        if len(fitting) > 1:
            names = ", ".join(model.name for model in fitting)
            hint = f"fzoo.load_keras_weights(module, path, layer={fitting[0].name!r}) takes that one"
            raise WeightsMismatch(f"{source} holds more than one such network: {names}; {hint}", [])
        (chosen,) = fitting
    parts = regrouped(module, chosen.unfolded())
    pairs = match_layers(module, parts, f"{chosen.name} in {source}")
    others = described_beside(chosen, layers)
    others += [name for name in contents.listed if PREPROCESSING.fullmatch(name)]
    return Match(pairs, chosen.name, [*others, *dropped(module, parts)], preprocessing(chosen.listed))


def with_head(module: Classifier, layers: list[FileLayer]) -> FileLayer | None:
    """Lay a model inside of a file flat, before the layers around it, where both together are a network with its head.

    Returns:
        The model, whose parts are all layers of the network; None where they are not, or the file has no such model.
    """
    models = [layer for layer in layers if layer.unfolded()]
    if not module.include_top or len(models) != 1 or fitted(module, layers) is not None:
        return None
    (model,) = models
    parts = regrouped(module, [*model.unfolded(), *(layer for layer in layers if layer is not model)])
    return dataclasses.replace(model, parts=tuple(parts)) if fitted(module, parts) is module else None


def regrouped(module: Classifier, layers: list[FileLayer]) -> list[FileLayer]:
    """Put together as one the layers that the network has inside of a Sequential."""
    owners = {part.name: node.name for node in trace(with_top(module)).nodes for part in node.parts}
    groups: dict[str, list[FileLayer]] = {}
    for layer in layers:
        groups.setdefault(owners.get(layer.name, layer.name), []).append(layer)
    return [
        group[0] if len(group) == 1 else FileLayer(name, None, tuple(a for g in group for a in g.arrays), mixed=True)
        for name, group in groups.items()
    ]


def fitted(module: Classifier, layers: list[FileLayer]) -> Classifier | None:
    """Choose the network whose layers these may be, by number: the module, or with its top added; None for neither."""
    if len(layers) == len(slots(module)):
        return module
    if not module.include_top and len(layers) == len(slots(with_top(module))):
        return with_top(module)
    return None


def dropped(module: Classifier, layers: list[FileLayer]) -> list[str]:
    """List the arrays of a top that the network has not."""
    whole = fitted(module, layers)
    if whole is None or whole is module:
        return []
    _, rest = separate_top(module, whole, pair_up(whole, layers, ""))
    return [describe_array(file, array) for file in rest for array in file.all_arrays()]


def separate_top(
    module: Classifier, whole: Classifier, pairs: dict[str, FileLayer]
) -> tuple[dict[str, FileLayer], list[FileLayer]]:
    """Return, of the pairs for a network with its top, those for the same without it, and what is left of the file.

    A layer that only the network without the top has is one of the top's under another name: ConvNeXt's last LayerNorm.
    """
    names = names_with_top(module, whole)
    kept = {layer: pairs[name] for layer, name in names.items()}
    taken = set(names.values())
    return kept, [file for name, file in pairs.items() if name not in taken]


def names_with_top(module: Classifier, whole: Classifier) -> dict[str, str]:
    """Return what the layers of a network are called in the same network with its top."""
    ours, theirs = slots(module), slots(whole)
    kinds = {node.name: node.kind for network in (module, whole) for node in trace(network).nodes}
    others = [name for name in theirs if name not in ours]
    names = {}
    for layer in ours:
        same = layer if layer in theirs else next(name for name in others if kinds[name] == kinds[layer])
        names[layer] = same
    return names


def below_top(module: Classifier, whole: Classifier, variables: Variables) -> MutableVariables:
    """Return the variables of a network without its top, of those of the same network with it."""
    names = names_with_top(module, whole)
    return {
        collection: {layer: layers[name] for layer, name in names.items() if name in layers}
        for collection, layers in variables.items()
    }


def describe_array(layer: FileLayer, array: h5py.Dataset) -> str:
    """Write an array, for a list: its full path in the file, after the layer's name where the path has it not."""
    path = array_path(array)
    tells = f"/{layer.name}/" in f"/{path}"
    return f"{path if tells else f'{layer.name}: {path}'} {array.shape}"


def described_beside(chosen: FileLayer, layers: Sequence[FileLayer]) -> list[str]:
    """List the arrays of a file that are none of one of its layers."""
    inside = {array.name for array in chosen.all_arrays()}
    return [
        describe_array(layer, array) for layer in layers for array in layer.all_arrays() if array.name not in inside
    ]


def match_layers(module: Classifier, layers: list[FileLayer], source: str) -> list[tuple[Slot, h5py.Dataset]]:
    """Do what `match` does, for the layers of one network."""
    layer_slots = slots(module)
    name = type(module).__name__
    summary = f"{source} does not fit this {name}"
    whole = fitted(module, layers)
    if whole is None:
        if module.include_top and len(layers) == len(slots(without_top(module))):
            summary = (
                f"{source} has no top, and this {name} has: create it with include_top=False, or give a file with it"
            )
        raise WeightsMismatch(summary, counted(layer_slots, layers))
    pairs, _ = separate_top(module, whole, pair_up(whole, layers, summary))

    parts = {node.name: node.parts for node in trace(module).nodes}
    matched, problems = [], []
    for layer, expected in layer_slots.items():
        file = pairs[layer]
        arrays = in_order(file, expected, parts[layer])
        if len(arrays) != len(expected):
            problems.append(f"{file.name} has {len(arrays)} arrays, {layer} {len(expected)}")
            continue
        for slot, array in zip(expected, arrays, strict=True):
            problem = check_array(slot, array, file.name)
            problems += [problem] if problem else []
            matched.append((slot, array))
    if problems:
        raise WeightsMismatch(summary + classes_hint(module, pairs, problems), problems)
    return matched


def check_array(slot: Slot, array: h5py.Dataset, name: str) -> str:
    """Say what keeps an array of a file's layer from being a variable; "" if nothing does."""
    if array.shape != slot.keras_shape or not (array.dtype.kind in "fiu" or array.dtype == "V2"):
        is_what = f"{name}/{slot.name} is {array.dtype!s:.60} {array.shape} in the file, {slot.keras_shape} wanted"
        return is_what + (f" by {slot.layer}" if slot.layer != name else "")
    if array.id.get_storage_size() < array.nbytes:  # HDF5 would make up zeros
        return f"{name}/{slot.name} has a shape, but its values were never written"
    return ""


def in_order(file: FileLayer, expected: list[Slot], parts: tuple[Node, ...]) -> list[h5py.Dataset]:
    """Return a layer's arrays in the order of its slots; of a Sequential that the file keeps layer by layer, too."""
    if not file.parts:
        return list(file.arrays)
    by_name: dict[tuple[str | None, str], h5py.Dataset] = {}
    rest = list(file.parts)
    for part in parts:
        inside = next((p for p in rest if p.kind == snake_case(part.kind)), None)
        names = [slot.array for slot in expected if slot.part == part.name]
        if inside is None or len(inside.arrays) != len(names):
            return []
        rest.remove(inside)
        by_name |= {(part.name, name): array for name, array in zip(names, inside.arrays, strict=True)}
    return [by_name[slot.part, slot.array] for slot in expected] if not rest else []


def pair_up(module: Classifier, layers: list[FileLayer], summary: str) -> dict[str, FileLayer]:
    """Pair {the network's layer: the file's}, by name where both know it, otherwise by position.

    A file that groups its layers by class is paired class by class.
    """
    layer_slots = slots(module)
    nodes = [node for node in trace(module).nodes if node.name in layer_slots]
    pairs: dict[str, FileLayer] = {}
    for kind in {layer.kind for layer in layers}:
        theirs = [layer for layer in layers if layer.kind == kind]
        ours = [node for node in nodes if kind in (None, snake_case(node.kind))]
        if len(ours) != len(theirs):
            raise WeightsMismatch(summary, counted({n.name: layer_slots[n.name] for n in ours}, theirs))
        known = {module.current_name(layer.name): layer for layer in theirs}
        if len(known) != len(theirs):
            raise WeightsMismatch(f"{summary}: it lists a layer twice", [])
        by_name = {node.name: known[node.name] for node in ours if node.name in known and not is_numbered(node)}
        taken = {layer.name for layer in by_name.values()}
        rest = [layer for layer in theirs if layer.name not in taken]
        unnamed = [node for node in ours if node.name not in by_name]
        if any(layer.mixed for layer in rest):  # not in the network's order: by the numbers in their names
            rest.sort(key=lambda layer: by_number(layer.name))
            unnamed.sort(key=lambda node: by_number(node.name))
        pairs |= by_name | {node.name: layer for node, layer in zip(unnamed, rest, strict=True)}
    if len(pairs) != len(nodes):
        raise WeightsMismatch(summary, counted(layer_slots, layers))
    return pairs


def is_numbered(node: Node) -> bool:
    """Tell whether Keras numbers this layer, so that its name says nothing."""
    return re.fullmatch(rf"{snake_case(node.kind)}(_\d+)?", node.name.rpartition("/")[2]) is not None


def counted(layer_slots: dict[str, list[Slot]], layers: list[FileLayer]) -> list[str]:
    """List the problems of a file with another number of layers: what it lacks by name, and what it has left over."""
    names = {layer.name for layer in layers}
    missing = [
        f"{s.layer}/{s.name} {s.keras_shape} is missing" for n in layer_slots if n not in names for s in layer_slots[n]
    ]
    left_over = [
        f"{describe_array(layer, array)} is left over"
        for layer in layers
        if layer.name not in layer_slots
        for array in layer.all_arrays()
    ]
    count = [f"{len(layers)} layers with weights in the file, {len(layer_slots)} in the model"]
    return [*count, *(problem for both in itertools.zip_longest(missing, left_over) for problem in both if problem)]


def classes_hint(module: Classifier, pairs: dict[str, FileLayer], problems: list[str]) -> str:
    """Say what would do, where all but the classifier fits."""
    if not module.include_top:
        return ""
    backbone = slots(without_top(module))
    head = [layer for layer in slots(module) if layer not in backbone]
    last = pairs[head[-1]]
    if not last.arrays or not all(p.startswith(f"{last.name}/") for p in problems):
        return ""
    classes = last.arrays[0].shape[-1] if last.arrays[0].shape else 0
    would_do = f"classes={classes} or include_top=False would do"
    return f": the file has {classes} classes, the model {module.classes} ({would_do})"


def with_top(module: Classifier) -> Classifier:
    """Return the same network with the top; which layers it has does not depend on the input's size."""
    return module.clone(include_top=True, pooling=None, input_shape=None)


def without_top(module: Classifier) -> Classifier:
    """Return the same network without the top."""
    return module.clone(include_top=False, head=None, input_shape=None)
