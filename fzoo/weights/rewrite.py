"""Whole models as Keras opens them: the configuration of a network that came from one, and its changes."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fzoo.layers.classifier import Classifier, Head
from fzoo.layers.conventions import snake_case
from fzoo.layers.rules import RULES
from fzoo.layers.rules.options import SILENT
from fzoo.layers.steps import Graph
from fzoo.types import Json
from fzoo.weights.config import Configuration
from fzoo.weights.dialects import Call, references, translate
from fzoo.weights.graph import (
    MODELS,
    Plan,
    at_hand,
    build_graph,
    channels_first,
    connections,
    in_keras_order,
    input_names,
    layer_entries,
    trainable,
)
from fzoo.weights.mapping import Slot
from fzoo.weights.writers import KERAS_VERSION, SavedLayer


@functools.lru_cache(maxsize=16)
def configuration_of(source: str) -> Configuration:
    """Return the configuration that a graph was made of."""
    version, model = json.loads(source)
    return Configuration(model, tuple(version))


@functools.lru_cache(maxsize=16)
def plans_of(source: str) -> tuple[Plan, ...]:
    """Return the plan of the weights of a graph, by its source."""
    return build_graph(configuration_of(source))[1]


# -- as Keras 3 writes it ---------------------------------------------------------------------------------------------


def keras3_configuration(module: Classifier, graph: Graph) -> dict[str, Json]:
    """Return the configuration of a network as Keras 3 writes it, whatever wrote the file that it came from.

    Regularizers, constraints and initialisers are kept where Keras 3 wrote them, and left out otherwise.

    Raises:
        ValueError: a layer that can't be written so; the message names it.
    """
    configuration = configuration_of(graph.source)
    model = model_document(configuration.model["class_name"], configuration.model["config"], configuration.version)
    steps = list(graph.steps)
    if graph.classifier is not None:
        step = steps[graph.classifier]
        options, activation = dict(step.options), module.classifier_activation
        if activation is None or isinstance(activation, str):
            options["activation"] = activation or "linear"
        if tuple(options.items()) != step.options:
            set_activation(model, step.name, options["activation"])
            steps[graph.classifier] = type(step)(step.name, step.kind, tuple(options.items()), step.inputs, step.call)
        if callable(activation) and options["activation"] is not activation:
            raise ValueError(
                f"classifier_activation={activation!r} given, the name of one of Keras's expected in a file"
            )
    try:
        written, _ = build_graph(Configuration(json.loads(json.dumps(model)), version_now()))
    except (TypeError, ValueError) as e:
        raise ValueError(f"it can't be written as a model of Keras 3: {e}") from e
    for step, other in itertools.zip_longest(steps, written.steps):
        if step != other:
            raise ValueError(f"{(step or other).name} ({(step or other).kind}) can't be written as a layer of Keras 3")
        if "/" in step.name.rpartition("/")[2]:
            raise ValueError(f"{step.name}: Keras 3 takes no name of a layer with a slash")
    return model


def version_now() -> tuple[int, int]:
    """Return the version of Keras whose files are written."""
    major, minor, *_ = KERAS_VERSION.split(".")
    return int(major), int(minor)


def model_document(kind: str, config: Json, version: tuple[int, int], name: str = "model") -> dict[str, Json]:
    """Write a model's configuration anew, its layers in Keras's order."""
    entries = layer_entries(kind, config)
    calls, outputs = connections(kind, config, entries, version)
    own = config if isinstance(config, Mapping) else {}
    written = {key: layer_document(key, entry, version) for key, entry in entries.items()}
    base = {"name": own.get("name") or name, "trainable": own.get("trainable", True)}
    if kind == "Sequential":
        for key, entry in entries.items():
            if entry["class_name"] == "InputLayer" and written[key]["config"]["batch_shape"] is None:
                del written[key]  # a model inside that takes its shape from where it is called
        config = {**base, "layers": list(written.values())}
        return {"module": "keras", "class_name": "Sequential", "config": config, "registered_name": None}
    for key, layer in written.items():
        kept = entries[key].get("inbound_nodes")
        layer |= {"name": key, "inbound_nodes": kept if version >= (3, 0) else nodes_of(calls[key], calls)}
    ends = [[layer, at_hand(calls, layer, call), output] for layer, call, output in outputs]
    starts = [[layer, 0, 0] for layer in input_names(kind, config, entries)]
    ends, starts = (nodes if len(nodes) > 1 else nodes[0] for nodes in (ends, starts))  # no list of one
    config = {**base, "layers": list(written.values()), "input_layers": starts, "output_layers": ends}
    model = {"module": "keras.src.models.functional", "class_name": "Functional", "config": config}
    return {**model, "registered_name": "Functional"}


def nodes_of(calls: Sequence[Call], all_calls: Mapping[str, list[Call]]) -> list[Json]:
    """Write the calls of a layer."""
    return [
        [[name, at_hand(all_calls, name, number), output, {}] for name, number, output in call.inputs]
        for call in calls
        if call.inputs
    ]


def layer_document(name: str, entry: Mapping[str, Json], version: tuple[int, int]) -> dict[str, Json]:
    """Write a layer as Keras 3 does, but for its calls. What is computed in is float32."""
    kind, config = entry["class_name"], entry["config"]
    if kind in MODELS:
        return model_document(kind, config, version, name)
    if kind == "InputLayer":
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        options = {"batch_shape": shape, "dtype": "float32"}
    elif version >= (3, 0):
        if "module" not in entry and "trainable" not in config:
            raise ValueError(f"{name} ({kind}) is an operation, of which an .h5 file does not say enough; .keras does")
        options = {key: value for key, value in config.items() if key != "dtype"}
    else:
        kind, translated = translate(kind, config, version)
        known = RULES[kind].options if kind in RULES else {}
        options = {k: v for k, v in translated.items() if k in known and known[k].parse(v) is not SILENT}
        if isinstance(axis := options.get("axis"), list) and len(axis) == 1:
            options["axis"] = axis[0]  # Keras 2 wrote BatchNormalization's so
        options["trainable"] = trainable(entry)
    module, registered = entry.get("module", "keras.layers"), entry.get("registered_name")
    if version < (3, 0):
        module, registered = "keras.layers", None
    return {"module": module, "class_name": kind, "config": {**options, "name": name}, "registered_name": registered}


def entry_at(model: Mapping[str, Json], path: str) -> Json:
    """Find the layer of a path in what `model_document` wrote."""
    for entry in model["config"]["layers"]:
        name = entry["config"]["name"]
        if path == name and entry["class_name"] not in MODELS:
            return entry
        if path.startswith(f"{name}/") and entry["class_name"] in MODELS:
            return entry_at(entry, path.removeprefix(f"{name}/"))
    raise ValueError(f"{path} is none of its layers")


def set_activation(model: Mapping[str, Json], path: str, activation: str) -> None:
    """Change the activation of a layer."""
    entry = entry_at(model, path)
    if entry["class_name"] == "Softmax":
        entry |= {"module": "keras.layers", "class_name": "Activation", "registered_name": None}
        entry["config"] = {"name": entry["config"]["name"]}
    entry["config"]["activation"] = activation


# -- its weights ------------------------------------------------------------------------------------------------------


def saved_layers(plans: Sequence[Plan], arrays: Mapping[str, Mapping[Slot, np.ndarray]]) -> list[SavedLayer]:
    """Lay out the arrays of a network as Keras keeps them: a model inside as a layer with layers.

    Args:
        plans: its layers.
        arrays: of each layer, by its path.
    """
    return [saved_layer(plan, arrays) for plan in in_keras_order(plans)]


def saved_layer(plan: Plan, arrays: Mapping[str, Mapping[Slot, np.ndarray]]) -> SavedLayer:
    """Lay out a layer, or a model inside; a legacy file has its arrays in one list, first those that train."""
    if plan.kind in MODELS:
        parts = tuple(saved_layers(plan.parts, arrays))
        legacy = {**dict(legacy_arrays(plan, arrays, True)), **dict(legacy_arrays(plan, arrays, False))}
        return SavedLayer(plan.name, snake_case(plan.kind), legacy, parts)
    own = {slot.name: value for slot, value in arrays.get(plan.path, {}).items()}
    return SavedLayer(plan.name, snake_case(plan.kind), own, random=plan.random)


def legacy_arrays(
    plan: Plan, arrays: Mapping[str, Mapping[Slot, np.ndarray]], training: bool, within: bool = True, prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of a model inside that train, or that don't, in Keras's order, by their names."""
    trains = within and plan.trainable
    for part in in_keras_order(plan.parts):
        yield from legacy_arrays(part, arrays, training, trains, f"{prefix}{part.name}/")
    for slot, value in arrays.get(plan.path, {}).items():
        if (trains and slot.path[0] == "params") is training:
            yield f"{prefix}{slot.name}", value


# -- its changes ------------------------------------------------------------------------------------------------------


def with_head(graph: Graph, cut: str, head: Head, classes: int, activation: str | None, flat: bool) -> Graph:
    """Make the graph of the same network up to a layer, and a new classifier on top.

    Args:
        graph: of the network, with its source.
        cut: the layer whose output the classifier takes.
        head: its layers.
        classes: number of its outputs.
        activation: of its last layer.
        flat: whether the layer's output is a vector already, so that nothing is to be pooled.

    Raises:
        ValueError: the cut goes through a model that is called more than once.
    """
    version, model = json.loads(graph.source)
    step = graph.steps[graph.number(cut)]
    model = cut_model(model, step.name, step.call, tuple(version))
    pooling = "GlobalAveragePooling2D" if head.pooling == "avg" else "GlobalMaxPooling2D"
    layers: list[tuple[str, dict[str, Json]]] = []
    if not flat:
        layers.append((pooling, {"data_format": "channels_first"} if channels_first(model) else {}))
    if head.hidden is not None:
        layers.append(("Dense", {"units": head.hidden, "activation": "relu"}))
    if head.dropout:
        layers.append(("Dropout", {"rate": head.dropout}))
    layers.append(("Dense", {"name": "predictions", "units": classes, "activation": activation or "linear"}))
    return build_graph(Configuration(add_layers(model, layers), tuple(version)))[0]


def cut_model(model: Mapping[str, Json], path: str, number: int, version: tuple[int, int]) -> dict[str, Json]:
    """Return the configuration of a model that ends with a call of a layer."""
    kind, config = model["class_name"], model["config"]
    entries = layer_entries(kind, config)
    calls, _ = connections(kind, config, entries, version)
    name = next(name for name in entries if path == name or path.startswith(f"{name}/"))
    if path != name:
        if len(calls[name]) > 1:
            raise ValueError(f"cut={path!r} given, in a model that is called {len(calls[name])} times")
        inner = cut_model(entries[name], path.removeprefix(f"{name}/"), number, version)
        entries[name], number = {**entries[name], **inner}, 0
    needed, waiting = set(), [name]
    while waiting:
        needed.add(at := waiting.pop())
        waiting += [before for call in calls[at] for before, _, _ in call.inputs if before not in needed]
    layers = [entry for key, entry in entries.items() if key in needed]
    if kind == "Sequential":
        own = config if isinstance(config, Mapping) else {}
        return {**model, "config": {**own, "layers": layers}}
    starts = [list(start) for start in references(config["input_layers"]) if start[0] in needed]
    ends = [[name, number if len(calls[name]) > 1 else 0, 0]]
    return {**model, "config": {**config, "layers": layers, "input_layers": starts, "output_layers": ends}}


def add_layers(model: Mapping[str, Json], layers: Sequence[tuple[str, dict[str, Json]]]) -> dict[str, Json]:
    """Return the configuration of a model with layers after its output: (class, options), a name where it has one."""
    config = model["config"]
    taken = set(layer_entries(model["class_name"], config))
    entries, last = list(config["layers"]), None if model["class_name"] == "Sequential" else config["output_layers"][0]
    for kind, options in layers:
        base = options.get("name", snake_case(kind))
        name = next(name for i in itertools.count() if (name := f"{base}_{i}" if i else base) not in taken)
        taken.add(name)
        entry = {"class_name": kind, "module": "keras.layers", "config": {**options, "name": name}, "name": name}
        entries.append(entry if last is None else {**entry, "inbound_nodes": [[[*last, {}]]]})
        last = last and [name, 0, 0]
    changes = {} if last is None else {"output_layers": [last]}
    return {**model, "config": {**config, "layers": entries, **changes}}
