"""From a configuration of Keras's to the steps of a network: models inside of models are laid flat."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from jaxtyping import Array

from fzoo.layers.rules import RULES, read_options
from fzoo.layers.steps import Graph, Step, StepOptions
from fzoo.types import Json
from fzoo.weights.config import Configuration
from fzoo.weights.dialects import Call, Tensor, calls_of, layer_inputs, references, translate
from fzoo.weights.files import MAX_DEPTH, MAX_NAME, MAX_NAMES
from fzoo.weights.operations import operation_of

#: The longest side of an image, and the most channels.
MAX_SIDE = 1 << 16

#: Classes that are models themselves.
MODELS = ("Functional", "Model", "Sequential")

#: Functions (k, x, config) for classes that are not Keras's, by their names.
CustomObjects = Mapping[str, Callable[..., Array]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layer of a model as a file keeps its weights, and the layers inside of it.

    Attributes:
        name: of the layer alone.
        path: its name in the network.
        kind: its Keras class.
        trainable: whether it was, which decides where a legacy file keeps its arrays.
        place: its place in Keras's order of the layers of its model; -1 where it is none of them: an input of a model
            inside or of a Sequential, or what leads to no output.
        random: whether Keras keeps the state of a generator of random numbers with it.
        parts: of a model, its layers in the order of the file.
    """

    name: str
    path: str
    kind: str
    trainable: bool
    place: int = -1
    random: bool = False
    parts: tuple[Plan, ...] = ()

    def leaves(self) -> Iterator[Plan]:
        """Yield the layers that are no models: itself, or those inside."""
        if self.kind not in MODELS:
            yield self
        for part in self.parts:
            yield from part.leaves()


@dataclasses.dataclass(frozen=True)
class CallOfStep:
    """A call as it is in the configuration, read.

    Attributes:
        kind: a key of `RULES`, or one of `MODELS`.
        options: that it is applied with.
        inputs: the tensors that it takes.
    """

    kind: str
    options: StepOptions
    inputs: Sequence[Tensor]


def build_graph(
    configuration: Configuration, custom_objects: CustomObjects | None = None
) -> tuple[Graph, tuple[Plan, ...]]:
    """Make the steps of the model that a configuration describes, and the plan of its weights.

    Args:
        configuration: of the model.
        custom_objects: functions (k, x, config) for classes that are not Keras's, by their names.

    Raises:
        ValueError: a layer, a connection or an option can't be honoured; the message names the layer.
    """
    turned = channels_first(configuration.model)
    builder = Builder(configuration.version, custom_objects or {}, turned)
    kind, config = configuration.model["class_name"], configuration.model["config"]
    if kind not in MODELS:
        raise ValueError(f"it holds a {kind}, a Functional or Sequential model expected: its code is not in the file")
    outputs, plans = builder.expand(kind, config, "", None)
    if not any(len(shape) == 3 for shape in builder.inputs):
        taken = " and ".join(map(str, builder.inputs))
        raise ValueError(f"it takes {taken}, images (height, width, channels) expected among the inputs")
    source = json.dumps([configuration.version, configuration.model], separators=(",", ":"))
    return Graph(tuple(builder.steps), tuple(outputs), tuple(builder.inputs), tuple(keras_names(plans)), source), plans


def in_keras_order(plans: Iterable[Plan]) -> list[Plan]:
    """Sort the layers of a model as Keras does, without what is none of its `model.layers`."""
    return sorted((plan for plan in plans if plan.place >= 0), key=lambda plan: plan.place)


def keras_names(plans: Iterable[Plan]) -> Iterator[str]:
    """Yield the names of layers in Keras's order, those of a model inside before its own."""
    for plan in in_keras_order(plans):
        yield from keras_names(plan.parts)
        yield plan.path


def channels_first(model: Json) -> bool:
    """Tell whether a layer anywhere in a model has the channels of its images first."""
    rest = [model]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            layout = value.get("data_format", value.get("dim_ordering"))
            if layout in ("channels_first", "th"):
                return True
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return False


class Builder:
    """Collects the steps of a network.

    Attributes:
        steps: so far.
        inputs: the shape of each input of the network.
        turned: whether the file's images have the channels first; the network's have them last.
    """

    def __init__(self, version: tuple[int, int], custom_objects: CustomObjects, turned: bool):
        self.version = version
        self.turned = turned
        self.custom_objects = custom_objects
        self.steps: list[Step] = []
        self.inputs: list[tuple[int | None, ...]] = []

    def add(self, name: str, kind: str, options: StepOptions, inputs: Sequence[int], call: int = 0) -> int:
        """Add a step; returns its number."""
        if len(self.steps) >= MAX_NAMES:
            raise ValueError(f"it has more than {MAX_NAMES} layers")
        self.steps.append(Step(name, kind, options, tuple(inputs), call))
        return len(self.steps) - 1

    def add_input(self, name: str, config: Mapping[str, Json]) -> int:
        """Add an input of the network."""
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        sides = shape[1:] if isinstance(shape, list) else ()
        fits = all(n is None or (type(n) is int and 0 < n <= MAX_SIDE) for n in sides)
        if not sides or not fits or sides[0 if self.turned else -1] is None:
            raise ValueError(f"{name}: an input of shape {shape!r:.80}, images (N, height, width, channels) expected")
        if self.turned and len(sides) == 3:
            sides = [*sides[1:], sides[0]]
        self.inputs.append(tuple(sides))
        return self.add(name, "InputLayer", (), ())

    def expand(
        self, kind: str, config: Json, prefix: str, given: Sequence[int] | None, outer: int = 0
    ) -> tuple[list[int], tuple[Plan, ...]]:
        """Add the steps of a model.

        Args:
            kind: its class.
            config: its configuration.
            prefix: of its layers' names.
            given: the steps that feed its inputs; None for the network itself.
            outer: which call of it this is.

        Returns:
            (the steps that are its outputs, its layers).
        """
        if prefix.count("/") > MAX_DEPTH:
            raise ValueError(f"models in it are nested deeper than {MAX_DEPTH} times")
        entries = layer_entries(kind, config)
        calls, outputs = connections(kind, config, entries, self.version)
        names = input_names(kind, config, entries)
        if given is None:  # all of them, whether they are used or not
            given = [self.add_input(name, entries[name]["config"]) for name in dict.fromkeys(names)]
        if len(names) != len(given):
            raise ValueError(f"{prefix[:-1]} takes {len(names)} inputs, {len(given)} given")
        tensors = {(name, 0): [number] for name, number in zip(names, given, strict=True)}
        order = execution_order(calls, outputs, tensors)
        places = layer_order(calls, outputs, order, names)
        if prefix or kind == "Sequential":
            places = [name for name in places if name not in names]
        plans = {
            name: Plan(name, prefix + name, entry["class_name"], trainable(entry), random=draws(entry))
            for name, entry in entries.items()
        }
        for place, name in enumerate(places):
            plans[name] = dataclasses.replace(plans[name], place=place)
        for name, number in order:
            call, entry, which = calls[name][number], entries[name], outer * len(calls[name]) + number
            path = prefix + name
            try:
                step = self.read_step(entry, call)
            except ValueError as e:
                raise ValueError(f"{path} ({entry['class_name']}): {e}") from e
            inputs = [self.tensor(tensors, calls, reference) for reference in step.inputs]
            if step.kind in MODELS:
                made, parts = self.expand(step.kind, entry["config"], f"{path}/", inputs, which)
                plans[name] = dataclasses.replace(plans[name], parts=parts)
                tensors[name, number] = [self.add(path, "Model", (), made, which)] if len(made) == 1 else made
            elif step.kind == "InputLayer":
                tensors[name, number] = [self.add_input(path, entry["config"])]
            else:
                tensors[name, number] = [self.add(path, step.kind, step.options, inputs, which)]
        return [self.tensor(tensors, calls, reference) for reference in outputs], tuple(plans.values())

    def read_step(self, entry: Mapping[str, Json], call: Call) -> CallOfStep:
        """Read a call of a layer, of an operation or of a model."""
        kind = entry["class_name"]
        function = self.custom_objects.get(kind) or self.custom_objects.get(kind.rpartition(">")[2])
        if function is not None:
            options = (("kind", kind), ("function", function), ("config", json.dumps(entry["config"])))
            return CallOfStep("Custom", options, layer_inputs(call, self.version))
        if kind not in MODELS and not isinstance(entry["config"], Mapping):
            raise ValueError(
                "its configuration is a list: a model of a class of its own, whose code is not in the file"
            )
        if kind in (*MODELS, "InputLayer"):
            return CallOfStep(kind, (), layer_inputs(call, self.version))
        operation = operation_of(entry, call)
        if operation is not None:
            options = (*read_options(operation.kind, operation.config), *operation.operands)
            options += (("turned", None),) if self.turned else ()
            return CallOfStep(operation.kind, options, operation.inputs)
        kind, config = translate(kind, entry["config"], self.version)
        layout = config.get("data_format")
        if self.turned and layout == "channels_first" and not kind.endswith("1D"):
            config["data_format"] = "channels_last"
        options, inputs = read_options(kind, config), layer_inputs(call, self.version)
        expected = RULES[kind].inputs
        if not inputs or len(inputs) != (expected or len(inputs)):
            raise ValueError(f"{len(inputs)} inputs given, {expected or 'one or more'} expected")
        if self.turned:
            options += (("turned", layout if isinstance(layout, str) else None),)
        return CallOfStep(kind, options, inputs)

    def tensor(
        self, tensors: Mapping[tuple[str, int], list[int]], calls: Mapping[str, list[Call]], reference: Tensor
    ) -> int:
        """Find the step whose output a reference (layer, call, number of the output) means."""
        name, number, output = reference
        made = tensors[name, at_hand(calls, name, number)]
        if output >= len(made):
            raise ValueError(f"output {output} of {name} is used, which has {len(made)}")
        return made[output]


def at_hand(calls: Mapping[str, list[Call]], name: str, number: int) -> int:
    """Return the number of a call; of a layer that is called once, whatever number the file has is that call."""
    if name not in calls:
        raise ValueError(f"{name!r:.80} is used, but there is no such layer")
    if len(calls[name]) == 1:
        return 0
    if number >= len(calls[name]):
        raise ValueError(f"call {number} of {name} is used, which is called {len(calls[name])} times")
    return number


def layer_entries(kind: str, config: Json) -> dict[str, Mapping[str, Json]]:
    """Return the layers of a model's configuration by name, in its order."""
    listed = config if isinstance(config, list) else config.get("layers") if isinstance(config, Mapping) else None
    if not isinstance(listed, list) or len(listed) > MAX_NAMES:
        raise ValueError(f"the configuration of a {kind} has no list of layers")
    entries: dict[str, Mapping[str, Json]] = {}
    for entry in listed:
        fits = isinstance(entry, Mapping) and isinstance(entry.get("class_name"), str)
        takes = (Mapping, list) if fits and entry["class_name"] in MODELS else Mapping
        if not fits or not isinstance(entry.get("config"), takes):
            raise ValueError(f"the configuration of a {kind} has a layer without a class or a configuration")
        own = entry["config"].get("name") if isinstance(entry["config"], Mapping) else None
        name = entry.get("name") or own or f"{entry['class_name'].lower()}_{len(entries)}"
        if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError(f"a layer's name is {name!r:.80}, text that can be shown expected")
        if name in entries:
            raise ValueError(f"it has two layers that are called {name}")
        entries[name] = entry
    return entries


def trainable(entry: Mapping[str, Json]) -> bool:
    """Tell whether a layer was trainable when its file was written."""
    config = entry["config"]
    return config.get("trainable", True) is not False if isinstance(config, Mapping) else True


#: Classes that draw random numbers in training, where the rate of it is not 0.
DRAWING = ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "AlphaDropout")


def draws(entry: Mapping[str, Json]) -> bool:
    """Tell whether a layer draws random numbers in training."""
    config = entry["config"]
    rate = config.get("rate") or config.get("stddev") if isinstance(config, Mapping) else None
    return entry["class_name"] in DRAWING and rate not in (None, 0, 0.0)


def connections(
    kind: str, config: Json, entries: dict[str, Mapping[str, Json]], version: tuple[int, int]
) -> tuple[dict[str, list[Call]], list[Tensor]]:
    """Return the calls of each layer of a model, and what its outputs are."""
    if kind != "Sequential":
        if not isinstance(config, Mapping):
            raise ValueError(f"the configuration of a {kind} is a list")
        calls = {name: calls_of(name, entry) for name, entry in entries.items()}
        outputs = references(config.get("output_layers"))
        if not outputs:
            raise ValueError("the model has no outputs")
        return calls, outputs
    first = next(iter(entries.values()), None)
    if first is None:
        raise ValueError("it has a Sequential without layers")
    if first["class_name"] != "InputLayer":
        shape = sequential_shape(config, first)
        layers = dict(entries)
        entries.clear()
        entries[f"{next(iter(layers))}_input"] = {"class_name": "InputLayer", "config": {"batch_shape": shape}}
        entries.update(layers)
    names = list(entries)
    calls = {names[0]: [Call((), {})]}
    calls |= {name: [Call((Tensor(before, 0, 0),), {})] for before, name in itertools.pairwise(names)}
    return calls, [Tensor(names[-1], 0, 0)]


def sequential_shape(config: Json, first: Mapping[str, Json]) -> Json:
    """Find the shape of a Sequential's input, which it may say in its first layer or of itself."""
    inner = first["config"]
    if isinstance(inner, Mapping):
        shape = inner.get("batch_input_shape") or inner.get("batch_shape")
        if shape:
            return shape
    return config.get("build_input_shape") if isinstance(config, Mapping) else None


def input_names(kind: str, config: Json, entries: Mapping[str, Mapping[str, Json]]) -> list[str]:
    """Return the names of a model's inputs, in the order of its arguments."""
    if kind == "Sequential":
        return [next(iter(entries))]
    names = [name for name, _, _ in references(config.get("input_layers"))]
    for name in names:
        if name not in entries:
            raise ValueError(f"{name!r:.80} is an input, but there is no such layer")
    return names


def execution_order(
    calls: Mapping[str, list[Call]], outputs: Sequence[Tensor], known: Mapping[tuple[str, int], list[int]]
) -> list[tuple[str, int]]:
    """Sort the calls that the outputs need, each after those that feed it, the last output at the end.

    Raises:
        ValueError: layers that wait for each other, or a reference to none.
    """
    order: list[tuple[str, int]] = []
    state: dict[tuple[str, int], bool] = dict.fromkeys(known, True)  # whether it is done; absent before it is met
    for name, number, _ in outputs:
        stack = [(name, at_hand(calls, name, number))]
        while stack:
            top = stack[-1]
            if state.get(top):
                stack.pop()
                continue
            needs = [(n, at_hand(calls, n, i)) for n, i, _ in calls[top[0]][top[1]].inputs]
            waiting = [need for need in needs if not state.get(need)]
            if not waiting:
                state[top] = True
                order.append(top)
                stack.pop()
                continue
            state[top] = False
            if any(need in state for need in waiting):
                raise ValueError(f"its layers feed each other in a circle, {waiting[0][0]} among them")
            stack += reversed(waiting)
    return order


def layer_order(
    calls: Mapping[str, list[Call]],
    outputs: Sequence[tuple[str, int, int]],
    order: Sequence[tuple[str, int]],
    inputs: Sequence[str],
) -> list[str]:
    """Sort the layers of a model as Keras does (`map_graph` in keras/src/ops/function.py).

    Deepest first, the depth being the longest way to an output; among equals, the one that a walk from the outputs
    meets first. A call of a layer is at least as deep as those calls that were looked at before it.

    Args:
        calls: of each layer.
        outputs: of the model.
        order: of the calls, from `execution_order`.
        inputs: the names of the model's inputs.
    """

    def needs(name: str, number: int) -> list[tuple[str, int]]:
        inside = (name, number) in known
        return [(n, at_hand(calls, n, i)) for n, i, _ in (() if inside else calls[name][number].inputs)]

    known = dict.fromkeys((name, 0) for name in inputs)
    met: dict[str, int] = {}
    stack, seen = [(name, at_hand(calls, name, number)) for name, number, _ in reversed(outputs)], set()
    while stack:
        call = stack.pop()
        if call not in seen:
            seen.add(call)
            met.setdefault(call[0], len(met))
            stack.extend(reversed(needs(*call)))
    depths: dict[tuple[str, int], int] = {}
    deepest: dict[str, int] = {}
    for call in [*reversed(order), *known]:
        depth = max(depths.get(call, 0), deepest.get(call[0], 0))
        depths[call] = deepest[call[0]] = depth
        for need in needs(*call):
            depths[need] = max(depth + 1, depths.get(need, 0))
    return sorted(deepest, key=lambda name: (-deepest[name], met.get(name, -1)))
