"""Rules of the Keras classes that have weights."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from fzoo.layers.keras import Layers
from fzoo.layers.rules.options import (
    LAST,
    PADDING,
    UNFIT,
    Constant,
    Option,
    activation,
    choice,
    constants,
    count,
    exactly,
    flag,
    ignored,
    integer,
    integers,
    is_fitting_count,
    number,
    or_none,
    positive_number,
    rule,
    sizes,
)

#: Options of all layers that convolve.
CONVOLUTION: dict[str, Option] = {
    "padding": PADDING,
    "activation": activation(),
    "use_bias": flag(True),
    "data_format": LAST,
}

#: Those of layers that take the channels apart.
DEPTHWISE: dict[str, Option] = {
    **CONVOLUTION,
    "strides": sizes(1),
    "dilation_rate": sizes(1),
    "kernel_size": sizes(),
    "depth_multiplier": count(1),
    "groups": exactly(1, "1"),
}

#: How many groups; -1 for as many as channels.
GROUPS = Option(
    lambda value: int(value) if value == -1 or is_fitting_count(value) else UNFIT, "a positive integer or -1", 32
)

CAUSAL = choice("valid", "same", "causal", default="valid")

#: The same along a sequence.
CONVOLUTION_1D: dict[str, Option] = {
    **CONVOLUTION,
    "padding": CAUSAL,
    "kernel_size": sizes(axes=1),
    "strides": sizes(1, axes=1),
    "dilation_rate": sizes(1, axes=1),
}

DEPTHWISE_1D: dict[str, Option] = {**CONVOLUTION_1D, "padding": PADDING}


def check_last(axis: int, x: Array) -> None:
    """Raise ValueError unless an axis is the last of a tensor."""
    if axis not in (-1, x.ndim - 1):
        raise ValueError(f"axis={axis} given, of a tensor of {x.ndim} axes the last expected")


def convolution_options(kernel_size: tuple[int, int], dilation_rate: tuple[int, int], **options: Any) -> dict[str, Any]:
    """Return Keras's options of a convolution of images by the names that `Layers` has for them."""
    return {"kernel": kernel_size, "dilation": dilation_rate, **options}


def sequence_options(
    kernel_size: tuple[int], strides: tuple[int], dilation_rate: tuple[int], **options: Any
) -> dict[str, Any]:
    """Return the same of a convolution along a sequence: numbers for sizes of one axis."""
    (kernel,), (step,), (dilation,) = kernel_size, strides, dilation_rate
    return {"kernel": kernel, "strides": step, "dilation": dilation, **options}


@rule(
    "Conv2D",
    CONVOLUTION,
    filters=count(),
    kernel_size=sizes(),
    strides=sizes(1),
    dilation_rate=sizes(1),
    groups=count(1),
)
def _conv2d(k: Layers, x: Array, *, name: str, filters: int, groups: int, **options: Any) -> Array:
    if x.shape[-1] % groups or filters % groups:
        raise ValueError(f"{groups} groups of {x.shape[-1]} channels to {filters}")
    return k.conv2d(x, filters, groups=groups, name=name, **convolution_options(**options))


@rule(
    "Conv2DTranspose",
    CONVOLUTION,
    filters=count(),
    kernel_size=sizes(),
    strides=sizes(1),
    dilation_rate=sizes(1),
    output_padding=or_none(sizes(least=0)),
    groups=exactly(1, "1"),
)
def _conv2d_transpose(k: Layers, x: Array, *, name: str, filters: int, **options: Any) -> Array:
    return k.conv2d_transpose(x, filters, name=name, **convolution_options(**options))


@rule("DepthwiseConv2D", DEPTHWISE)
def _depthwise_conv2d(k: Layers, x: Array, *, name: str, **options: Any) -> Array:
    return k.depthwise_conv2d(x, name=name, **convolution_options(**options))


@rule("SeparableConv2D", DEPTHWISE, filters=count())
def _separable_conv2d(k: Layers, x: Array, *, name: str, filters: int, **options: Any) -> Array:
    return k.separable_conv2d(x, filters, name=name, **convolution_options(**options))


@rule("Conv1D", CONVOLUTION_1D, filters=count(), groups=count(1))
def _conv1d(k: Layers, x: Array, *, name: str, filters: int, **options: Any) -> Array:
    return k.conv1d(x, filters, name=name, **sequence_options(**options))


@rule("DepthwiseConv1D", DEPTHWISE_1D, depth_multiplier=count(1), groups=exactly(1, "1"))
def _depthwise_conv1d(k: Layers, x: Array, *, name: str, **options: Any) -> Array:
    return k.depthwise_conv1d(x, name=name, **sequence_options(**options))


@rule("SeparableConv1D", DEPTHWISE_1D, filters=count(), depth_multiplier=count(1), groups=exactly(1, "1"))
def _separable_conv1d(k: Layers, x: Array, *, name: str, filters: int, **options: Any) -> Array:
    return k.separable_conv1d(x, filters, name=name, **sequence_options(**options))


@rule(
    "Dense",
    units=count(),
    activation=activation(),
    use_bias=flag(True),
    lora_rank=exactly(None, "null"),
    quantization_config=exactly(None, "null"),
)
def _dense(k: Layers, x: Array, *, name: str, units: int, **options: Any) -> Array:
    return k.dense(x, units, name=name, **options)


@rule(
    "BatchNormalization",
    axis=integer(-1),
    epsilon=positive_number(1e-3),
    momentum=number(0.99),
    scale=flag(True),
    center=flag(True),
    mode=exactly(0, "0 (of Keras 1's modes)"),
    renorm=exactly(False, "false"),
    renorm_momentum=ignored("without renorm"),
    virtual_batch_size=exactly(None, "null"),
)
def _batch_normalization(k: Layers, x: Array, *, name: str, axis: int, **options: Any) -> Array:
    check_last(axis, x)
    return k.batch_norm(x, name=name, **options)


@rule(
    "LayerNormalization",
    axis=integers(-1),
    epsilon=positive_number(1e-3),
    scale=flag(True),
    center=flag(True),
    rms_scaling=exactly(False, "false"),
)
def _layer_normalization(k: Layers, x: Array, *, name: str, axis: tuple[int, ...], **options: Any) -> Array:
    axes = tuple(sorted(n % x.ndim if -x.ndim <= n < x.ndim else 0 for n in axis))
    if not axes or 0 in axes or len(set(axes)) != len(axes):
        raise ValueError(f"axis={list(axis)} given, axes of a tensor of {x.ndim} but the batch's expected")
    return k.layer_norm(x, axes=axes, name=name, **options)


@rule(
    "GroupNormalization",
    groups=GROUPS,
    axis=integer(-1),
    epsilon=positive_number(1e-3),
    scale=flag(True),
    center=flag(True),
)
def _group_normalization(k: Layers, x: Array, *, name: str, axis: int, groups: int, **options: Any) -> Array:
    check_last(axis, x)
    return k.group_norm(x, groups, name=name, **options)


@rule("PReLU", shared_axes=or_none(integers(least=1)))
def _prelu(k: Layers, x: Array, *, name: str, shared_axes: tuple[int, ...] | None) -> Array:
    return k.prelu(x, shared_axes or (), name=name)


@rule(
    "Normalization",
    axis=Option(lambda value: None if value in (None, []) else integer().parse(value), "the last axis, or null", -1),
    mean=or_none(constants()),
    variance=or_none(constants()),
    invert=exactly(False, "false"),
)
def _normalization(
    k: Layers, x: Array, *, name: str, axis: int | None, mean: Constant | None, variance: Constant | None
) -> Array:
    if (mean is None) != (variance is None):
        raise ValueError("mean and variance go together")
    if axis is None and mean is None:
        raise ValueError("axis=null with a mean from data given, the last axis expected")
    if axis is not None:
        check_last(axis, x)
    mean, variance = flat_constants(mean), flat_constants(variance)
    for values in (mean, variance):
        if isinstance(values, tuple) and len(values) not in (1, x.shape[-1]):
            raise ValueError(f"{len(values)} values given, of {x.shape[-1]} channels")
    return k.normalization(x, mean, variance, name=name)


def flat_constants(values: Any) -> Any:
    """Lay flat a constant of each channel, which Keras may write with axes of length 1 before it."""
    while isinstance(values, tuple) and isinstance(values[0], tuple):
        if len(values) != 1:
            raise ValueError("a constant of more than one axis given, a number for each channel expected")
        values = values[0]
    return values


@rule("LayerScale", init_values=number(), projection_dim=count())
def _layer_scale(k: Layers, x: Array, *, name: str, init_values: float, projection_dim: int) -> Array:
    if projection_dim != x.shape[-1]:
        raise ValueError(f"projection_dim={projection_dim} given, of {x.shape[-1]} channels")
    return k.layer_scale(x, init_values, name=name)
