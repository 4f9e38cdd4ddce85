"""What each class of Keras does, as the configuration of a model says it.

A rule reads a layer's configuration strictly: an option that it does not take is an error unless it can't matter. What
it reads are plain values, with which it later applies the layer by the methods of `Layers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from fzoo.errors import unknown
from fzoo.layers.activations import ACTIVATIONS
from fzoo.layers.keras import Layers
from fzoo.layers.options import is_count, is_number

#: The default of an option that has none.
REQUIRED: Any = object()


#: What an option reads to that can't be honoured, and to of which the layer is not told.
UNFIT: Any = object()
SILENT: Any = object()


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a Keras class.

    Attributes:
        read: makes a plain value of what the configuration has, `UNFIT` of what can't be honoured.
        expected: in words, for the error and for the documentation.
        default: of the class; `REQUIRED` where it has none.
    """

    read: Callable[[Any], Any]
    expected: str
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a Keras class is read and applied.

    Attributes:
        apply: applies the layer: (k, *inputs, name, **options).
        options: what it takes, by name.
        inputs: how many; None for one or more.
    """

    apply: Callable[..., Array]
    options: Mapping[str, Option]
    inputs: int | None = 1


RULES: dict[str, Rule] = {}


def rule(
    kind: str, inputs: int | None = 1, **options: Option
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a function as what a Keras class does."""

    def register(apply: Callable[..., Array]) -> Callable[..., Array]:
        RULES[kind] = Rule(apply, options, inputs)
        return apply

    return register


# -- options ----------------------------------------------------------------------------------------------------------


def count(default: Any = REQUIRED) -> Option:
    """Make an option that is a positive integer."""
    return Option(lambda value: int(value) if is_count(value) else UNFIT, "a positive integer", default)


def number(default: Any = REQUIRED) -> Option:
    """Make an option that is a number."""
    return Option(lambda value: float(value) if is_number(value) else UNFIT, "a number", default)


def number_or_none() -> Option:
    """Make an option that is a number, or null."""
    return Option(lambda value: None if value is None else number().read(value), "a number or null", None)


def flag(default: bool) -> Option:
    """Make an option that is on or off."""
    return Option(lambda value: value if isinstance(value, bool) else UNFIT, "true or false", default)


def choice(*values: str, default: Any = REQUIRED) -> Option:
    """Make an option that is one of some words."""
    return Option(lambda value: value if value in values else UNFIT, " or ".join(map(repr, values)), default)


def sizes(default: Any = REQUIRED) -> Option:
    """Make an option that is a positive integer for height and width, or one for each."""

    def read(value: Any) -> Any:
        if value is None and default is None:
            return None
        values: list[Any] = (
            [value, value] if is_count(value) else list(value) if isinstance(value, (list, tuple)) else []
        )
        return tuple(int(n) for n in values) if len(values) == 2 and all(is_count(n) for n in values) else UNFIT

    return Option(read, "a positive integer or two" + (", or null" if default is None else ""), default)


def margins() -> Option:
    """Make an option that is what is added or cut: a number, (height, width) or ((top, bottom), (left, right))."""

    def both(value: Any) -> list[Any]:
        return [value, value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []

    def read(value: Any) -> Any:
        pairs = [both(side) for side in both(value)]
        numbers = [number for pair in pairs for number in pair]
        fits = [len(pair) for pair in pairs] == [2, 2] and all(type(n) is int and n >= 0 for n in numbers)
        return tuple(map(tuple, pairs)) if fits else UNFIT

    return Option(read, "margins that are not negative", 1)


def activation(default: str = "linear") -> Option:
    """Make an option that is the name of one of Keras's activations."""

    def read(value: Any) -> Any:
        value = "linear" if value is None else value
        return value if isinstance(value, str) and value in ACTIVATIONS else UNFIT

    return Option(read, "an activation of Keras's", default)


def ignored(reason: str) -> Option:
    """Make an option that changes nothing in what a layer computes, for the reason given."""
    return Option(lambda given: SILENT, f"anything: {reason}", None)


def exactly(value: Any, expected: str) -> Option:
    """Make an option of which one value alone is honoured; a layer is not told of it."""
    return Option(lambda given: SILENT if given == value else UNFIT, expected, value)


#: The axis of the channels, of a tensor whose rank is not known yet.
CHANNELS = Option(lambda value: SILENT if value in (-1, [-1], 3, [3]) else UNFIT, "the last axis", -1)


# -- reading ----------------------------------------------------------------------------------------------------------

#: Options that play no part in what a layer computes in inference.
INERT = frozenset(
    (
        *("name", "trainable", "dtype", "batch_input_shape", "batch_shape", "input_dtype", "input_shape", "sparse"),
        *("ragged", "seed", "autocast", "build_config", "input_spec", "optional", "synchronized", "fused"),
    )
)


#: Endings of such options.
INERT_ENDINGS = ("_initializer", "_regularizer", "_constraint")


#: Options that are honoured where they ask for nothing.
NOTHING = (None, False, [], {})


def read_options(kind: str, config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Read the configuration of a layer.

    Raises:
        ValueError: its class, an option of it, or an option's value can't be honoured.
    """
    if kind not in RULES:
        raise ValueError(unknown("class of Keras", kind, RULES))
    options = RULES[kind].options
    for key, value in config.items():
        inert = key in INERT or key.endswith(INERT_ENDINGS)
        if key not in options and not inert and value not in NOTHING:
            raise ValueError(f"{key}={value!r:.80}, which is not known of {kind}")
    read = []
    for key, option in options.items():
        value = config.get(key, option.default)
        if value is REQUIRED:
            raise ValueError(f"{key} is missing")
        value = option.read(value)
        if value is UNFIT:
            raise ValueError(f"{key}={config.get(key)!r:.80} given, {option.expected} expected")
        if value is not SILENT:
            read.append((key, value))
    return tuple(read)


# -- layers with weights ----------------------------------------------------------------------------------------------

PADDING = choice("valid", "same", default="valid")
LAST = exactly("channels_last", "'channels_last'")


@rule(
    "Conv2D",
    filters=count(),
    kernel_size=sizes(),
    strides=sizes(1),
    padding=PADDING,
    dilation_rate=sizes(1),
    groups=count(1),
    activation=activation(),
    use_bias=flag(True),
    data_format=LAST,
)
def _conv2d(
    k: Layers, x: Array, *, name: str, filters: int, kernel_size: Any, dilation_rate: Any, **options: Any
) -> Array:
    return k.conv2d(x, filters, kernel_size, dilation=dilation_rate, name=name, **options)


@rule(
    "DepthwiseConv2D",
    kernel_size=sizes(),
    strides=sizes(1),
    padding=PADDING,
    depth_multiplier=count(1),
    dilation_rate=sizes(1),
    groups=exactly(1, "1"),
    activation=activation(),
    use_bias=flag(True),
    data_format=LAST,
)
def _depthwise_conv2d(k: Layers, x: Array, *, name: str, kernel_size: Any, dilation_rate: Any, **options: Any) -> Array:
    return k.depthwise_conv2d(x, kernel_size, dilation=dilation_rate, name=name, **options)


@rule(
    "SeparableConv2D",
    filters=count(),
    kernel_size=sizes(),
    strides=sizes(1),
    padding=PADDING,
    depth_multiplier=count(1),
    dilation_rate=sizes(1),
    groups=exactly(1, "1"),
    activation=activation(),
    use_bias=flag(True),
    data_format=LAST,
)
def _separable_conv2d(
    k: Layers, x: Array, *, name: str, filters: int, kernel_size: Any, dilation_rate: Any, **options: Any
) -> Array:
    return k.separable_conv2d(x, filters, kernel_size, dilation=dilation_rate, name=name, **options)


@rule("Dense", units=count(), activation=activation(), use_bias=flag(True))
def _dense(k: Layers, x: Array, *, name: str, units: int, **options: Any) -> Array:
    return k.dense(x, units, name=name, **options)


@rule(
    "BatchNormalization",
    axis=CHANNELS,
    epsilon=number(1e-3),
    momentum=number(0.99),
    scale=flag(True),
    center=flag(True),
    renorm=exactly(False, "false"),
    renorm_momentum=ignored("without renorm"),
)
def _batch_normalization(k: Layers, x: Array, *, name: str, **options: Any) -> Array:
    return k.batch_norm(x, name=name, **options)


@rule("LayerNormalization", axis=CHANNELS, epsilon=number(1e-3), scale=flag(True), center=flag(True))
def _layer_normalization(k: Layers, x: Array, *, name: str, **options: Any) -> Array:
    return k.layer_norm(x, name=name, **options)


# -- layers without weights -------------------------------------------------------------------------------------------


@rule("Model")
def _model(k: Layers, x: Array, *, name: str) -> Array:
    """Give a model inside of the network a name of its own: its output."""
    return k.apply("Model", lambda x: x, x, name=name)


@rule("Activation", activation=activation())
def _activation(k: Layers, x: Array, *, name: str, activation: Any) -> Array:
    return k.activation(x, activation, name=name)


@rule("Softmax", axis=CHANNELS, activation=choice("softmax", default="softmax"))
def _softmax(k: Layers, x: Array, *, name: str, activation: Any) -> Array:
    return k.activation(x, activation, name=name)


@rule("ReLU", max_value=number_or_none(), negative_slope=number(0.0), threshold=number(0.0))
def _relu(k: Layers, x: Array, *, name: str, max_value: Any, negative_slope: float, threshold: float) -> Array:
    if not negative_slope and not threshold:
        return k.relu(x, max_value, name=name)

    def function(x: Array) -> Array:
        above = x if max_value is None else jnp.minimum(x, max_value)
        return jnp.where(x >= threshold, above, negative_slope * (x - threshold))

    return k.apply("ReLU", function, x, name=name)


@rule("MaxPooling2D", pool_size=sizes(2), strides=sizes(None), padding=PADDING, data_format=LAST)
def _max_pooling2d(k: Layers, x: Array, *, name: str, pool_size: Any, strides: Any, padding: str) -> Array:
    return k.max_pool(x, pool_size, strides, padding, name=name)


@rule("AveragePooling2D", pool_size=sizes(2), strides=sizes(None), padding=PADDING, data_format=LAST)
def _average_pooling2d(k: Layers, x: Array, *, name: str, pool_size: Any, strides: Any, padding: str) -> Array:
    return k.avg_pool(x, pool_size, strides, padding, name=name)


@rule("GlobalAveragePooling2D", keepdims=flag(False), data_format=LAST)
def _global_average_pooling2d(k: Layers, x: Array, *, name: str, keepdims: bool) -> Array:
    return k.global_avg_pool(x, keepdims=keepdims, name=name)


@rule("GlobalMaxPooling2D", keepdims=flag(False), data_format=LAST)
def _global_max_pooling2d(k: Layers, x: Array, *, name: str, keepdims: bool) -> Array:
    return k.global_max_pool(x, keepdims=keepdims, name=name)


@rule("ZeroPadding2D", padding=margins(), data_format=LAST)
def _zero_padding2d(k: Layers, x: Array, *, name: str, padding: Any) -> Array:
    return k.zero_pad(x, padding, name=name)


@rule("Flatten", data_format=LAST)
def _flatten(k: Layers, x: Array, *, name: str) -> Array:
    return k.flatten(x, name=name)


@rule("Add", inputs=None)
def _add(k: Layers, *xs: Array, name: str) -> Array:
    return k.add(xs, name=name)


@rule("Multiply", inputs=None)
def _multiply(k: Layers, *xs: Array, name: str) -> Array:
    return k.multiply(xs, name=name)


@rule("Concatenate", inputs=None, axis=CHANNELS)
def _concatenate(k: Layers, *xs: Array, name: str) -> Array:
    return k.concat(xs, name=name)


@rule("Dropout", rate=number(), noise_shape=exactly(None, "null"))
def _dropout(k: Layers, x: Array, *, name: str, rate: float) -> Array:
    return k.dropout(x, rate, name=name)
