"""What of a file fits a network by name and shape, as Keras's `load_weights(by_name=True, skip_mismatch=True)`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import h5py

from fzoo.errors import unknown
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.record import Node
from fzoo.weights.files import Contents, FileLayer, WeightsMismatch, array_path, find_layer
from fzoo.weights.graph import MODELS, Plan
from fzoo.weights.mapping import Slot, check_array, in_order, is_numbered, slots
from fzoo.weights.names import are_named
from fzoo.weights.whole import of_a_model


@dataclasses.dataclass(frozen=True)
class Unmatched:
    """What a partial loading did not match: variables that kept their initial values, arrays that were not taken.

    Attributes:
        missing: why, for each variable of the network that the file has no fitting array for, by its path:
            {"params/predictions/kernel": "predictions/kernel is float32 (8, 5) in the file, (8, 3) wanted"}.
        unused: the shape of each array of the file's layers that was not taken, by its full path in the file, with
            which `fzoo.open_weights` gives it: {"predictions/predictions/kernel": (8, 5)}.
    """

    missing: Mapping[str, str]
    unused: Mapping[str, tuple[int, ...]]


def select_layer(layers: Sequence[FileLayer], path: str, source: str) -> FileLayer:
    """Find a layer of a file that is a model itself.

    Args:
        layers: of the file.
        path: its name, or the names on the way to it: "outer/inner".
        source: the file's name, for errors.

    Raises:
        ValueError: there is no such layer, or it is no model.
    """
    selected = find_layer(layers, path)
    models = [layer.name for layer in layers if is_model(layer)]
    if selected is None:
        raise ValueError(f"{source}: {unknown('layer', path, models or [layer.name for layer in layers])}")
    if not is_model(selected):
        expected = ", ".join(models) or "but it has none"
        raise ValueError(f"{source}: the layer {path} is no model, one that is expected: {expected}")
    return selected


def is_model(layer: FileLayer) -> bool:
    """Tell whether a layer of a file is a model, with layers inside."""
    return bool(layer.parts or inner_layers(layer))


def inner_layers(layer: FileLayer) -> dict[str, list[h5py.Dataset]]:
    """Return the arrays of each layer inside of a model that a legacy file has in one list, by the layers' paths below.

    An array's name tells them: "inner/conv1/kernel:0". A layer that is no model has none. TensorFlow numbered the names
    of such a layer's arrays where a graph had these before ("conv1_1/kernel:0" of conv1).
    """
    arrays: dict[str, list[h5py.Dataset]] = {}
    for name, array in zip(layer.names, layer.arrays, strict=True) if layer.kind is None else ():
        arrays.setdefault(name.removeprefix(f"{layer.name}/").rpartition("/")[0] or layer.name, []).append(array)
    own = len(arrays) == 1 and re.fullmatch(rf"{re.escape(layer.name)}(_\d+)?", next(iter(arrays)))
    return {} if own else arrays


def match_by_name(
    module: Classifier, plans: Sequence[Plan], contents: Contents, source: str, layer: str | None = None
) -> tuple[list[tuple[Slot, h5py.Dataset]], Unmatched]:
    """Pair the variables of a network with the arrays of a file's layers that have the same name and shape.

    A layer's path ("backbone/conv1") comes first; a name that someone gave it is then looked for in every model. Names
    that Keras numbered ("conv2d_3") say nothing alone: they are taken from the model that the other names lead to.

    Args:
        module: the network.
        plans: its layers as its own file has them; none for a family.
        contents: of the file.
        source: the file's name, for errors.
        layer: of the file, to take the arrays from; None for all of them.

    Raises:
        ValueError: the file has no names, or no such layer.
        WeightsMismatch: nothing fits, or a name leads to several layers.
    """
    if not are_named(contents.layers):
        raise ValueError(
            f"{source} has its layers by class, without names, which partial loading goes by: a legacy .h5, a .keras "
            "file or the model's config.json beside it has them"
        )
    nodes, layer_slots = {node.name: node for node in trace(module).nodes}, slots(module)
    network = Network(
        module,
        layer_slots,
        {plan.name: plan for plan in plans if plan.kind in MODELS},
        {part.name: node.name for node in nodes.values() for part in node.parts},
    )
    if layer is None:
        file_layers = network.unnest(contents.layers)
    else:
        file_layers = network.unnest_model(select_layer(contents.layers, layer, source))
    theirs: dict[str, FileLayer] = {}
    for path, file_layer in file_layers:
        if theirs.setdefault(path, file_layer) is not file_layer:
            raise WeightsMismatch(f"{source} lists the layer {path} twice", [])
    chosen = pair_names({name: nodes[name] for name in layer_slots}, theirs, source)
    pairs: list[tuple[Slot, h5py.Dataset]] = []
    missing: dict[str, str] = {}
    for name, expected in layer_slots.items():
        file = theirs.get(chosen.get(name, ""))
        for slot, array, problem in pair_arrays(expected, file, nodes[name], chosen.get(name, name)):
            if array is None or problem:
                missing["/".join(slot.path)] = problem
            else:
                pairs.append((slot, array))
    if not pairs:
        shown = [", ".join([*names][:3]) + ", ..." * (len(names) > 3) for names in (theirs, layer_slots)]
        models = [model.name for model in contents.layers if is_model(model)]
        hint = f"; layer={models[0]!r} takes that layer's" if models and layer is None else ""
        raise WeightsMismatch(
            f"nothing in {source} fits this {type(module).__name__} by name and shape: its layers are {shown[0]}, "
            f"those of the network {shown[1]}{hint}",
            [],
        )
    taken = {array_path(array) for _, array in pairs}
    unused = {path: array.shape for path, array in contents.all_arrays().items() if path not in taken}
    return pairs, Unmatched(MappingProxyType(missing), MappingProxyType(unused))


@dataclasses.dataclass(frozen=True)
class Network:
    """What of a network says how a file's layers are told apart.

    Attributes:
        module: the network.
        slots: the variables of each layer.
        models: the models in it that are layers of its file.
        owners: for each layer inside of a Sequential that the network has as one layer, the name of the latter.
    """

    module: Classifier
    slots: Mapping[str, list[Slot]]
    models: Mapping[str, Plan]
    owners: Mapping[str, str]

    def unnest(self, layers: Iterable[FileLayer], above: str = "") -> Iterator[tuple[str, FileLayer]]:
        """Yield (path, layer) of all layers with arrays, those inside of models too, by today's names."""
        for layer in layers:
            path = above + self.module.current_name(layer.name)
            if path not in self.slots and path.rpartition("/")[2] not in self.owners.values() and is_model(layer):
                yield from self.unnest_model(layer, path)
            else:
                yield path, layer

    def unnest_model(self, model: FileLayer, path: str = "") -> Iterator[tuple[str, FileLayer]]:
        """Yield (path, layer) of the layers inside of a model."""
        above = f"{path}/" if path else ""
        plan = self.models.get(path)
        if model.parts:
            yield from self.unnest(model.parts, above)
        elif plan and len(model.arrays) == sum(len(self.slots.get(leaf.path, ())) for leaf in plan.leaves()):
            # As Keras does, for which the whole model is one layer: by place, where the names inside differ.
            for place, arrays in of_a_model(plan, model, self.slots).items():
                yield place, FileLayer(place, None, tuple(arrays))
        else:
            groups: dict[str, list[h5py.Dataset]] = {}
            for below, arrays in inner_layers(model).items():
                groups.setdefault(self.current_path(below), []).extend(arrays)
            for below, arrays in groups.items():
                yield above + below, FileLayer(below.rpartition("/")[2], None, tuple(arrays), mixed=True)

    def current_path(self, path: str) -> str:
        """Return today's path of a layer, or of the Sequential around it if the network has that as a layer."""
        folder, _, name = path.rpartition("/")
        name = self.module.current_name(name)
        owner = self.owners.get(name)
        if owner is not None and folder.rpartition("/")[2] == owner:
            return folder
        return f"{folder}/{owner or name}" if folder else owner or name


def pair_names(nodes: Mapping[str, Node], theirs: Iterable[str], source: str) -> dict[str, str]:
    """Return {path of a layer in the network: path in the file}, of those that have the same name.

    Raises:
        WeightsMismatch: a name that is not numbered leads to several layers.
    """
    theirs = dict.fromkeys(theirs)
    pairs = {path: path for path in nodes if path in theirs}
    rest = [path for path in theirs if path not in pairs]
    claims: dict[str, list[str]] = {}
    for path in nodes:
        if path in pairs or is_numbered(nodes[path]):
            continue
        there = [other for other in rest if is_within(path, other) or is_within(other, path)]
        if len(there) > 1:
            model = there[0].rpartition("/")[0]
            hint = f"layer={model!r} takes the first" if model else "rename one"
            raise WeightsMismatch(f"{source} has {path} more than once, {' and '.join(there)}: {hint}", [])
        for other in there:
            claims.setdefault(other, []).append(path)
    models: dict[str, set[str]] = {}
    for other, paths in claims.items():
        if len(paths) > 1:
            raise WeightsMismatch(
                f"{other} of {source} may be {' or '.join(paths)} of the network: the same path in both would tell", []
            )
        pairs[paths[0]] = other
        models.setdefault(paths[0].rpartition("/")[0], set()).add(other.rpartition("/")[0])
    for path in nodes:
        above, _, name = path.rpartition("/")
        if path not in pairs and is_numbered(nodes[path]) and len(models.get(above, ())) == 1:
            other = "/".join(filter(None, (*models[above], name)))
            if other in rest:
                pairs[path] = other
    return pairs


def is_within(short: str, long: str) -> bool:
    """Tell whether a layer's path is another one, but for models around it: "conv1" and "backbone/conv1"."""
    if short.rpartition("/")[2] != long.rpartition("/")[2]:
        return False
    names = iter(long.split("/"))
    return all(name in names for name in short.split("/"))


def pair_arrays(
    expected: Sequence[Slot], file: FileLayer | None, node: Node, path: str
) -> Iterator[tuple[Slot, h5py.Dataset | None, str]]:
    """Yield (variable, array of the file's layer, what keeps the one from being the other; "" for nothing)."""
    arrays = [] if file is None else in_order(file, list(expected), node.parts)
    if file is None:
        problem = f"the file has no layer {path}"
    else:
        problem = f"{path} has {len(file.all_arrays())} arrays in the file, {len(expected)} in the network"
    if len(arrays) != len(expected):
        yield from ((slot, None, problem) for slot in expected)
        return
    for slot, array in zip(expected, arrays, strict=True):
        yield slot, array, check_array(slot, array, path)
