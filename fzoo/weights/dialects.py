"""How the versions of Keras wrote the same thing: names of classes and options, calls of layers, activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fzoo.types import Json


class Tensor(NamedTuple):
    """An output of a layer.

    Attributes:
        layer: the layer's name.
        call: the number of its call.
        output: the number of the output.
    """

    layer: str
    call: int
    output: int


#: What a layer is called with: a tensor, a list of them, a constant.
Argument = Any


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a layer.

    Attributes:
        positional: its arguments: tensors, lists of them, constants.
        keywords: those that are given by name.
    """

    positional: tuple[Argument, ...]
    keywords: Mapping[str, Argument]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that it takes, in their order."""
        return list(tensors_in([*self.positional, *self.keywords.values()]))


#: How deep the arguments of a call may be nested.
MAX_NESTING = 8

#: What TensorFlow's operations have in the place of a layer's name where their first argument is no tensor.
CONSTANT = "_CONSTANT_VALUE"

#: Arguments of a call that play no part where they are these.
INERT_ARGUMENTS = {"training": (None, False), "mask": (None,), "name": None}

#: Classes under another name.
KINDS = {
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "AtrousConvolution2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "Convolution2DTranspose": "Conv2DTranspose",
    "SeparableConvolution2D": "SeparableConv2D",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",
}

#: What Keras 1 called the options.
OPTIONS = {
    "nb_filter": "filters",
    "border_mode": "padding",
    "subsample": "strides",
    "subsample_length": "strides",
    "stride": "strides",
    "filter_length": "kernel_size",
    "pool_length": "pool_size",
    "length": "size",
    "atrous_rate": "dilation_rate",
    "dim_ordering": "data_format",
    "bias": "use_bias",
    "output_dim": "units",
    "p": "rate",
}

#: What it called the layouts.
LAYOUTS = {"tf": "channels_last", "th": "channels_first", "default": "channels_last"}

#: Layers that its `Merge` was, by mode.
MERGES = {"sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum", "concat": "Concatenate"}

#: Options that only say how the arrays of a new network start, in Keras 1.
STARTS = ("init", "weights", "gamma_init", "beta_init", "alpha_init")


def calls_of(name: str, entry: Mapping[str, Json]) -> list[Call]:
    """Return the calls of a layer; one without inputs, of an input, is one, too."""
    nodes = entry.get("inbound_nodes") or []
    if not isinstance(nodes, list):
        raise ValueError(f"{name}: its connections can't be read")
    return [call_of(name, node) for node in nodes] or [Call((), {})]


def call_of(name: str, node: Json) -> Call:
    """Read a call as Keras 3 writes it, {"args": ..., "kwargs": ...}, or as those before, [[layer, 0, 0, {}], ...]."""
    if isinstance(node, Mapping):
        arguments, keywords = node.get("args") or [], node.get("kwargs") or {}
        if not isinstance(arguments, list) or not isinstance(keywords, Mapping):
            raise ValueError(f"{name}: its connections can't be read")
        return Call(
            tuple(read_argument(value) for value in arguments),
            {key: read_argument(value) for key, value in keywords.items()},
        )
    if not isinstance(node, list) or not node:
        raise ValueError(f"{name}: its connections can't be read")
    items = node if all(isinstance(item, list) for item in node) else [node]
    keywords = {}
    for item in items:
        keywords |= item[3] if len(item) > 3 and isinstance(item[3], Mapping) else {}
    keywords = {key: read_old_argument(value) for key, value in keywords.items()}
    if len(items) == 1 and items[0] and items[0][0] == CONSTANT:
        return Call((items[0][2] if len(items[0]) > 2 else None,), keywords)
    tensors = references(items)
    return Call((tensors[0] if len(tensors) == 1 else tensors,), keywords)


def read_argument(value: Json, depth: int = MAX_NESTING) -> Argument:
    """Read an argument of a call as Keras 3 writes it: a tensor, a list, a constant."""
    if isinstance(value, list):
        if not depth:
            raise ValueError("the arguments of a call are nested too deep")
        return [read_argument(item, depth - 1) for item in value]
    if not isinstance(value, Mapping):
        return value
    kind, config = value.get("class_name"), value.get("config")
    if kind == "__keras_tensor__":
        history = config.get("keras_history") if isinstance(config, Mapping) else None
        return references([history])[0]
    if kind in ("__numpy__", "__tensor__") and isinstance(config, Mapping):
        return config.get("value")
    return value


def read_old_argument(value: Json, depth: int = MAX_NESTING) -> Argument:
    """Read an argument of a call as Keras 2 writes it, where a tensor is [layer, call, output]."""
    if not isinstance(value, list):
        return value
    if len(value) == 3 and isinstance(value[0], str) and type(value[1]) is int and type(value[2]) is int:
        return references([value])[0]
    if not depth:
        raise ValueError("the arguments of a call are nested too deep")
    return [read_old_argument(item, depth - 1) for item in value]


def tensors_in(value: Argument) -> Iterator[Tensor]:
    """Yield the tensors in what `read_argument` gave."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def layer_inputs(call: Call, version: tuple[int, int]) -> list[Tensor]:
    """Return the tensors that a layer is called with.

    Raises:
        ValueError: it is called with something else, too, that would make a difference.
    """
    keywords = {key: value for key, value in call.keywords.items() if key != "inputs"}
    positional = [*call.positional, *([call.keywords["inputs"]] if "inputs" in call.keywords else [])]
    inputs = list(tensors_in(positional))
    for value in positional:
        if value is not None and not list(tensors_in(value)):
            raise ValueError(f"it is called with {value!r:.80}, which is not known")
    for key, value in keywords.items():
        inert = INERT_ARGUMENTS.get(key, ())
        # Keras 3 overrules a `training` that a layer was called with; Keras 2 does not.
        overruled = key == "training" and version >= (3, 0) and isinstance(value, bool)
        if inert is not None and value not in inert and not overruled:
            raise ValueError(f"it is called with {key}={value!r:.80}, which is not known")
    return inputs


def references(listed: Json) -> list[Tensor]:
    """Read a list of [layer, call, output]; Keras 3 writes a single one without the list around it."""
    if isinstance(listed, list) and len(listed) == 3 and isinstance(listed[0], str):
        listed = [listed]
    if not isinstance(listed, list):
        raise ValueError("the connections of its layers can't be read")
    tensors = []
    for item in listed:
        fits = isinstance(item, list) and len(item) >= 3 and isinstance(item[0], str)
        if not fits or not all(type(n) is int and n >= 0 for n in item[1:3]):
            raise ValueError(f"{item!r:.80} is not the output of a layer")
        tensors.append(Tensor(item[0], item[1], item[2]))
    return tensors


def translate(kind: str, config: Mapping[str, Json], version: tuple[int, int]) -> tuple[str, dict[str, Json]]:
    """Return a layer's class and options as today's Keras would write them.

    Raises:
        ValueError: what it says has another meaning in each version, and the version is not known.
    """
    options = {OPTIONS.get(key, key): plain_value(value) for key, value in config.items() if key not in STARTS}
    if "nb_row" in options and "nb_col" in options:
        options["kernel_size"] = [options.pop("nb_row"), options.pop("nb_col")]
    if isinstance(options.get("data_format"), str):
        options["data_format"] = LAYOUTS.get(options["data_format"], options["data_format"])
    kind = KINDS.get(kind, kind)
    if kind == "Merge":
        return merge_of(options)
    if kind == "LeakyReLU" and "alpha" in options:
        options["negative_slope"] = options.pop("alpha")
    if "activation" in options:
        options["activation"] = translate_activation(options["activation"], version)
    old = version < (2, 3) and kind == "UpSampling2D"
    if old and str(options.get("interpolation", "nearest")) != "nearest":
        raise ValueError("interpolation other than 'nearest' of Keras before 2.3 is not taken: it had other pixels")
    return kind, options


def plain_value(value: Json) -> Json:
    """Return the value of what Keras 2 wrote of NumPy's: {"type": ..., "value": ...}."""
    return value["value"] if isinstance(value, Mapping) and value.keys() == {"type", "value"} else value


def translate_activation(activation: Json, version: tuple[int, int]) -> Json:
    """Return an activation by its name in today's Keras, or the layer that it is with today's options."""
    if isinstance(activation, Mapping):
        kind, config = activation.get("class_name"), activation.get("config")
        if isinstance(kind, str) and isinstance(config, Mapping):
            kind, config = translate(kind, config, version)
            if kind in ("Activation", "Softmax") and config.get("axis", -1) == -1:
                return config.get("activation", "softmax")
            return {**activation, "class_name": kind, "config": config}
        if kind == "function" and activation.get("module") in (None, "builtins") and config != "relu6":
            return activation if version >= (3, 0) else translate_activation(config, version)
        return translate_activation(config, version) if kind == "function" else activation
    if activation in ("hard_sigmoid", "hard_swish", "hard_silu") and version < (3, 0):
        if version == (0, 0) or activation != "hard_sigmoid":
            raise ValueError(f"activation={activation!r} differs between versions of Keras, and this one is not known")
        return "hard_sigmoid_of_keras_2"
    return activation


def merge_of(options: Mapping[str, Json]) -> tuple[str, dict[str, Json]]:
    """Return what a `Merge` of Keras 1 is today."""
    mode = options.get("mode")
    if mode not in MERGES or options.get("layers"):
        raise ValueError(f"mode={mode!r:.80} of Merge given, {', '.join(MERGES)} of layers that are connected expected")
    axis = {"axis": options.get("concat_axis", -1)} if mode == "concat" else {}
    return MERGES[mode], {"name": options.get("name"), **axis}
