"""The operations between layers as the versions of Keras write them: those of `keras.ops`, and TensorFlow's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from fzoo.errors import unknown
from fzoo.layers.rules import RULES
from fzoo.layers.rules.operations import CONSTANT
from fzoo.layers.rules.options import NOTHING, UNFIT, Constant
from fzoo.layers.steps import StepOptions
from fzoo.types import Json
from fzoo.weights.dialects import Argument, Call, Tensor, tensors_in

#: Where the classes of Keras 3's operations are from.
MODULES = ("keras.src.ops", "keras.ops", "keras.src.activations")

#: What TensorFlow's layers of operations are called.
LAMBDAS = ("TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A call of an operation.

    Attributes:
        kind: a key of `RULES`.
        config: its options.
        inputs: the tensors that it takes.
        operands: how these and its constants are bound, as options of the step.
    """

    kind: str
    config: Mapping[str, Json]
    inputs: list[Tensor]
    operands: StepOptions


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of TensorFlow's.

    Attributes:
        kind: the operation that it is.
        arguments: their names, in their order, as the operation has them.
        fixed: options of the operation that its name says.
        inert: values of arguments that ask for nothing.
    """

    kind: str
    arguments: Mapping[str, str]
    fixed: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    inert: Mapping[str, Json] = dataclasses.field(default_factory=dict)


def function(kind: str, *arguments: str, inert: Mapping[str, Json] | None = None, **fixed: Json) -> Function:
    """Make a function of "name in TensorFlow=name in Keras"."""
    pairs = {argument.partition("=")[0]: argument.rpartition("=")[2] for argument in arguments}
    return Function(kind, pairs, fixed, inert or {})


_TWO = ("x=x1", "y=x2")
_REDUCED = ("input_tensor=x", "axis", "keepdims")

FUNCTIONS: dict[str, Function] = {
    **{name: function("Add", *_TWO) for name in ("math.add", "__operators__.add")},
    **{name: function("Divide", *_TWO) for name in ("math.truediv", "math.divide", "__operators__.truediv")},
    "math.subtract": function("Subtract", *_TWO),
    "math.multiply": function("Multiply", *_TWO),
    "math.pow": function("Power", *_TWO),
    "math.maximum": function("Maximum", *_TWO),
    "math.minimum": function("Minimum", *_TWO),
    "nn.bias_add": function("Add", "value=x1", "bias=x2", "data_format", inert={"data_format": "NHWC"}),
    "math.add_n": function("AddN", "inputs=xs"),
    "linalg.matmul": function("Matmul", "a=x1", "b=x2"),
    "math.negative": function("Negative", "x"),
    "math.abs": function("Absolute", "x"),
    "math.square": function("Square", "x"),
    "math.sqrt": function("Sqrt", "x"),
    "math.rsqrt": function("Rsqrt", "x"),
    "math.exp": function("Exp", "x"),
    "math.log": function("Log", "x"),
    "math.log1p": function("Log1p", "x"),
    "math.sign": function("Sign", "x"),
    "math.reciprocal": function("Reciprocal", "x"),
    "math.sigmoid": function("Sigmoid", "x"),
    "math.tanh": function("Tanh", "x"),
    "math.log_sigmoid": function("LogSigmoid", "x"),
    "math.softplus": function("Softplus", "features=x"),
    "nn.sigmoid": function("Sigmoid", "x"),
    "nn.tanh": function("Tanh", "x"),
    "nn.relu": function("Relu", "features=x"),
    "nn.relu6": function("Relu6", "features=x"),
    "nn.silu": function("Silu", "features=x", "beta", inert={"beta": 1.0}),
    "nn.swish": function("Silu", "features=x", "beta", inert={"beta": 1.0}),
    "nn.elu": function("Elu", "features=x"),
    "nn.selu": function("Selu", "features=x"),
    "nn.softplus": function("Softplus", "features=x"),
    "nn.softsign": function("Softsign", "features=x"),
    "nn.gelu": function("Gelu", "features=x", "approximate", approximate=False),
    "nn.leaky_relu": function("LeakyRelu", "features=x", "alpha=negative_slope", negative_slope=0.2),
    "nn.softmax": function("Softmax", "logits=x", "axis"),
    "nn.log_softmax": function("LogSoftmax", "logits=x", "axis"),
    "math.reduce_mean": function("Mean", *_REDUCED),
    "math.reduce_sum": function("Sum", *_REDUCED),
    "math.reduce_max": function("Max", *_REDUCED),
    "math.reduce_min": function("Min", *_REDUCED),
    "math.reduce_prod": function("Prod", *_REDUCED),
    "math.reduce_variance": function("Var", *_REDUCED),
    "math.reduce_std": function("Std", *_REDUCED),
    "reshape": function("Reshape", "tensor=x", "shape=newshape"),
    "transpose": function("Transpose", "a=x", "perm=axes"),
    "squeeze": function("Squeeze", "input=x", "axis"),
    "expand_dims": function("ExpandDims", "input=x", "axis"),
    "concat": function("Concatenate", "values=xs", "axis"),
    "stack": function("Stack", "values=xs", "axis"),
    "reverse": function("Flip", "tensor=x", "axis"),
    "clip_by_value": function("Clip", "t=x", "clip_value_min=x_min", "clip_value_max=x_max"),
    "cast": function("Cast", "x", "dtype"),
    "identity": function("Identity", "input=x"),
    "stop_gradient": function("StopGradient", "input=x"),
    "pad": function("Pad", "tensor=x", "paddings=pad_width", "mode", "constant_values"),
    "math.l2_normalize": function("Normalize", "x", "axis", "epsilon", epsilon=1e-12),
    "image.resize": function(
        "Resize", "images=x", "size", "method=interpolation", "preserve_aspect_ratio", "antialias"
    ),
    "__operators__.getitem": function("GetItem", "x", "slice_spec=key"),
}
for _name in ("transpose", "squeeze", "pad"):
    FUNCTIONS[f"compat.v1.{_name}"] = FUNCTIONS[_name]

#: Operations of TensorFlow's graphs: the function that each is, by the places of its inputs.
NODES: dict[str, Function] = {
    **{name: function("Add", *_TWO) for name in ("Add", "AddV2", "BiasAdd")},
    "Sub": function("Subtract", *_TWO),
    "Mul": function("Multiply", *_TWO),
    "RealDiv": function("Divide", *_TWO),
    "Pow": function("Power", *_TWO),
    "Maximum": function("Maximum", *_TWO),
    "Minimum": function("Minimum", *_TWO),
    **{name: function(kind, "x") for name, kind in {"Neg": "Negative", "Abs": "Absolute"}.items()},
    **{name: function(name, "x") for name in ("Square", "Sqrt", "Rsqrt", "Exp", "Log", "Sigmoid", "Tanh", "Identity")},
    **{name: function(name, "x") for name in ("Relu", "Relu6", "Elu", "Selu", "Softplus", "Softsign", "StopGradient")},
    "Softmax": function("Softmax", "x"),
    "LeakyRelu": function("LeakyRelu", "x", "alpha=negative_slope", negative_slope=0.2),
    "Mean": function("Mean", "x", "axis", "keep_dims=keepdims"),
    "Sum": function("Sum", "x", "axis", "keep_dims=keepdims"),
    "Max": function("Max", "x", "axis", "keep_dims=keepdims"),
    "Min": function("Min", "x", "axis", "keep_dims=keepdims"),
    "Reshape": function("Reshape", "x", "newshape"),
    "Transpose": function("Transpose", "x", "axes"),
    "ExpandDims": function("ExpandDims", "x", "axis"),
    "Squeeze": function("Squeeze", "x", "squeeze_dims=axis"),
    "Pad": function("Pad", "x", "pad_width"),
    "ClipByValue": function("Clip", "x", "x_min", "x_max"),
}

#: Attributes of these that say nothing of the numbers.
NODE_ATTRIBUTES = ("T", "Tidx", "Tshape", "Tperm", "Tdim", "Tpaddings", "data_format", "_cloned", "_output_shapes")


def operation_of(entry: Mapping[str, Json], call: Call) -> Operation | None:
    """Read the call of an operation; None where an entry of the configuration is a layer.

    Raises:
        ValueError: there is no such operation here, or it is called otherwise.
    """
    kind, config = entry["class_name"], entry["config"]
    if kind == "TensorFlowOpLayer":
        return node_operation(config, call)
    if kind in LAMBDAS:
        name = config.get("function")
        if not isinstance(name, str) or name not in FUNCTIONS:
            raise ValueError(unknown("function of TensorFlow", name, FUNCTIONS))
        return bound_function(FUNCTIONS[name], call.positional, call.keywords, True)
    module = entry.get("module")
    is_operation = module.startswith(MODULES) if isinstance(module, str) else is_bare(entry)
    if not is_operation:
        return None
    kind = f"ops.{kind}"
    if kind not in RULES:
        known = [name for name in RULES if name.startswith("ops.")]
        raise ValueError(unknown("operation of Keras", kind, known))
    options = {key: value for key, value in config.items() if key not in ("name", "dtype", "trainable")}
    names = [*RULES[kind].operands, *(name for name in RULES[kind].options if name not in options)]
    return bound(kind, options, names, call.positional, call.keywords, False)


def is_bare(entry: Mapping[str, Json]) -> bool:
    """Tell whether an entry of an h5 of Keras 3, which keeps no modules, is an operation: it has no dtype."""
    nodes = entry.get("inbound_nodes")
    by_keras_3 = isinstance(nodes, list) and nodes and all(isinstance(node, Mapping) for node in nodes)
    return bool(by_keras_3) and not {"trainable", "dtype"} & entry["config"].keys()


def bound(
    kind: str,
    options: Mapping[str, Argument],
    names: list[str],
    positional: tuple[Argument, ...],
    keywords: Mapping[str, Argument],
    is_layer: bool,
) -> Operation:
    """Bind the arguments of a call to the names of an operation's operands and options."""
    if len(positional) > len(names):
        raise ValueError(f"it is called with {len(positional)} arguments, {len(names)} at most expected")
    values = {**options, **dict(zip(names, positional, strict=False))}
    for key, value in keywords.items():
        if key in values:
            raise ValueError(f"it is called with {key} twice")
        values[key] = value
    inputs: list[Tensor] = []
    tensors: list[str] = []
    numbers: list[tuple[str, Constant]] = []
    for name in RULES[kind].operands:
        if name not in values:
            raise ValueError(f"{name} is missing")
        value = values.pop(name)
        if RULES[kind].inputs is None:
            items = value if isinstance(value, list) else [value]
            if not items or not all(isinstance(item, Tensor) for item in items):
                raise ValueError(f"{name}={value!r:.80} given, a list of tensors expected")
            inputs += items
        elif isinstance(value, Tensor):
            inputs.append(value)
            tensors.append(name)
        else:
            constant = CONSTANT.parse(value)
            if constant is UNFIT:
                raise ValueError(f"{name}={value!r:.80} given, a tensor or numbers expected")
            numbers.append((name, constant))
    if not inputs:
        raise ValueError("it is called with no tensor")
    if any(True for _ in tensors_in(list(values.values()))):
        raise ValueError("it is called with a tensor in the place of a size, which is not taken")
    operands = (("tensors", tuple(tensors)), ("numbers", tuple(numbers)), ("is_layer", is_layer))
    return Operation(kind, values, inputs, operands)


def bound_function(
    function: Function, positional: tuple[Argument, ...], keywords: Mapping[str, Argument], is_layer: bool
) -> Operation:
    """Bind the arguments of a function of TensorFlow's."""
    kind = f"ops.{function.kind}"
    given = dict(zip(function.arguments, positional, strict=False))
    if len(positional) > len(function.arguments):
        raise ValueError(f"it is called with {len(positional)} arguments")
    given |= keywords
    values = dict(function.fixed)
    for key, value in given.items():
        if key in function.inert and value == function.inert[key]:
            continue
        name = function.arguments.get(key)
        if name is None or name not in (*RULES[kind].operands, *RULES[kind].options):
            if value in NOTHING or key == "name":
                continue
            raise ValueError(f"it is called with {key}={value!r:.80}, which is not known")
        if name == "epsilon" or value is not None:
            values[name] = value
    if function.kind == "Normalize":  # TensorFlow's is the least square of a length, Keras's the least length
        values["epsilon"] = float(values["epsilon"]) ** 0.5
    if function.kind == "Pad" and "mode" in values:
        values["mode"] = str(values["mode"]).lower()
    return bound(kind, values, [], (), {}, is_layer)


def node_operation(config: Mapping[str, Json], call: Call) -> Operation:
    """Read the call of a `TensorFlowOpLayer`: an operation of a graph, its constants by the places of its inputs."""
    text, constants = config.get("node_def"), config.get("constants") or {}
    try:
        node = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        node = None
    if not isinstance(node, Mapping) or not isinstance(constants, Mapping):
        raise ValueError("its node_def is not JSON (TensorFlow 2.3's is)")
    name = node.get("op")
    if not isinstance(name, str) or name not in NODES:
        raise ValueError(unknown("operation of TensorFlow", name, NODES))
    attributes = {
        key: plain_attribute(value)
        for key, value in (node.get("attr") or {}).items()
        if key not in NODE_ATTRIBUTES or value not in NOTHING
    }
    for key in NODE_ATTRIBUTES:
        attributes.pop(key, None)
    places = {int(place): value for place, value in constants.items() if str(place).isdigit()}
    tensors = iter(call.inputs)
    count = len(places) + len(call.inputs)
    positional = tuple(places[place] if place in places else next(tensors, None) for place in range(count))
    return bound_function(NODES[name], positional, attributes, True)


def plain_attribute(value: Json) -> Json:
    """Return the value of an attribute, {"b": true}, {"f": 0.2} or {"list": {"i": ["1", "2"]}}."""
    if not isinstance(value, Mapping) or len(value) != 1:
        return value
    ((kind, content),) = value.items()
    if kind == "list" and isinstance(content, Mapping) and isinstance(content.get("i"), list):
        return [int(item) for item in content["i"] if str(item).lstrip("-").isdigit()]
    return content
