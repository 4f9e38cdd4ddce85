"""The arrays of a whole model's file, layer by layer, by the plan that its configuration makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import h5py

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import snake_case
from fzoo.weights.files import FileLayer, WeightsMismatch, array_path
from fzoo.weights.graph import MODELS, Plan
from fzoo.weights.mapping import Slot, check_array, slots


def match_plan(
    module: Classifier, plans: Sequence[Plan], layers: Sequence[FileLayer], source: str
) -> list[tuple[Slot, h5py.Dataset]]:
    """Pair every variable of a network with its array in the file that describes the network.

    Args:
        module: the network.
        plans: its layers as the file's configuration lists them.
        layers: those with weights, as the file keeps them.
        source: the file's name, for errors.

    Raises:
        WeightsMismatch: naming the arrays that are missing, left over, or of another shape.
    """
    layer_slots = slots(module)
    grouped = any(layer.kind is not None for layer in layers)
    arrays = by_class(plans, layers, layer_slots) if grouped else by_name(plans, layers, layer_slots)
    pairs, problems = [], []
    for name, expected in layer_slots.items():
        own = arrays.pop(name, [])
        if len(own) != len(expected):
            problems.append(f"{name} has {len(own)} arrays in the file, {len(expected)} by its configuration")
            continue
        for slot, array in zip(expected, own, strict=True):
            problem = check_array(slot, array, name)
            problems += [problem] if problem else []
            pairs.append((slot, array))
    problems += [f"{name}: {array_path(array)} {array.shape} is left over" for name, r in arrays.items() for array in r]
    if problems:
        raise WeightsMismatch(f"the arrays of {source} do not fit its own configuration", problems)
    return pairs


def by_class(
    plans: Sequence[Plan], layers: Iterable[FileLayer], layer_slots: Mapping[str, list[Slot]]
) -> dict[str, list[h5py.Dataset]]:
    """Return the arrays of each layer, of a file that has the layers of a model by class, in the order of each."""
    arrays: dict[str, list[h5py.Dataset]] = {}
    rest: dict[str | None, list[FileLayer]] = {}
    for layer in layers:
        rest.setdefault(layer.kind, []).append(layer)
    for plan in plans:
        if not any(leaf.path in layer_slots for leaf in plan.leaves()):
            continue
        waiting = rest.get(snake_case(plan.kind))
        if not waiting:
            continue
        layer = waiting.pop(0)
        arrays |= by_class(plan.parts, layer.parts, layer_slots) if plan.parts else {plan.path: list(layer.arrays)}
    for layer in (layer for waiting in rest.values() for layer in waiting):
        arrays[f"{layer.name} (of the file)"] = layer.all_arrays()
    return arrays


def by_name(
    plans: Sequence[Plan], layers: Iterable[FileLayer], layer_slots: Mapping[str, list[Slot]]
) -> dict[str, list[h5py.Dataset]]:
    """Return the arrays of each layer, of a legacy file, which has them by the names of the layers of the whole model.

    A model inside has all of its arrays in one list: first those that were trainable.
    """
    known, arrays = {plan.name: plan for plan in plans}, {}
    for layer in layers:
        plan = known.get(layer.name)
        if plan is None:
            arrays[f"{layer.name} (of the file)"] = list(layer.arrays)
        elif plan.kind in MODELS:
            arrays |= of_a_model(plan, layer, layer_slots)
        else:
            arrays[plan.path] = list(layer.arrays)
    return arrays


def of_a_model(plan: Plan, layer: FileLayer, layer_slots: Mapping[str, list[Slot]]) -> dict[str, list[h5py.Dataset]]:
    """Return the arrays of the layers of a model inside of a model: by the names of its layers where these are told
    apart by them, otherwise by their places."""
    leaves = {leaf.name: leaf for leaf in plan.leaves() if leaf.path in layer_slots}
    alone = len(leaves) == sum(leaf.path in layer_slots for leaf in plan.leaves())
    owners = [owner_of(name, leaves) for name in layer.names]
    arrays: dict[str, list[h5py.Dataset]] = {}
    if alone and None not in owners:
        for owner, array in zip(owners, layer.arrays, strict=True):
            arrays.setdefault(leaves[str(owner)].path, []).append(array)
        return arrays
    places = [*in_order(plan, True, layer_slots), *in_order(plan, False, layer_slots)]
    for path, array in zip(places, layer.arrays, strict=False):
        arrays.setdefault(path, []).append(array)
    if len(places) < len(layer.arrays):
        arrays[f"{layer.name} (of the file)"] = list(layer.arrays[len(places) :])
    return arrays


def owner_of(name: str, leaves: Mapping[str, Plan]) -> str | None:
    """Find the layer that an array belongs to by its name, e.g. "Conv1" of "model/Conv1/kernel:0"."""
    stem = name.rpartition("/")[0]
    while stem:
        if stem in leaves:
            return stem
        stem = stem.partition("/")[2]
    return None


def in_order(plan: Plan, trainable: bool, layer_slots: Mapping[str, list[Slot]], within: bool = True) -> list[str]:
    """Return the layer of each array in Keras's order of those that train, or of those that don't."""
    trains = within and plan.trainable
    if plan.kind in MODELS:
        return [path for part in plan.parts for path in in_order(part, trainable, layer_slots, trains)]
    return [plan.path for slot in layer_slots.get(plan.path, []) if (trains and slot.path[0] == "params") is trainable]
