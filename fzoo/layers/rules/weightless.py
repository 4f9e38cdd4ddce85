"""Rules of the Keras classes that have no weights and take one tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from fzoo import ops
from fzoo.layers.activations import Activation
from fzoo.layers.keras import Layers
from fzoo.layers.rules.merging import axis_of
from fzoo.layers.rules.options import (
    LAST,
    PADDING,
    UNFIT,
    Constant,
    Option,
    Plain,
    activation,
    check_rank,
    choice,
    constants,
    count,
    elementwise,
    exactly,
    flag,
    ignored,
    integer,
    integers,
    margins,
    number,
    number_or_none,
    or_none,
    rate,
    rule,
    sizes,
)
from fzoo.ops.shapes import Pads
from fzoo.types import Json


@rule("Model")
def _model(k: Layers, x: Array, *, name: str) -> Array:
    """Give a model inside of the network a name of its own: its output."""
    return k.apply("Model", lambda x: x, x, name=name)


# -- activations ------------------------------------------------------------------------------------------------------


@rule("Activation", activation=activation())
def _activation(k: Layers, x: Array, *, name: str, activation: Activation) -> Array:
    return k.activation(x, activation, name=name)


@rule("Softmax", axis=integer(-1), activation=choice("softmax", default="softmax"))
def _softmax(k: Layers, x: Array, *, name: str, axis: int, activation: str) -> Array:
    if axis_of(axis, x.ndim) == x.ndim - 1:
        return k.activation(x, activation, name=name)
    return k.apply("Softmax", lambda x: nn.softmax(x, axis_of(axis, x.ndim)), x, name=name)


def relu(x: Array, max_value: float | None, negative_slope: float, threshold: float) -> Array:
    """Compute Keras's ReLU with its three arguments."""
    above = x if max_value is None else jnp.minimum(x, max_value)
    return jnp.where(x >= threshold, above, negative_slope * (x - threshold))


@rule("ReLU", max_value=number_or_none(), negative_slope=number(0.0), threshold=number(0.0))
def _relu(k: Layers, x: Array, *, name: str, max_value: float | None, negative_slope: float, threshold: float) -> Array:
    if not negative_slope and not threshold:
        return k.relu(x, max_value, name=name)
    return k.apply("ReLU", lambda x: relu(x, max_value, negative_slope, threshold), x, name=name)


elementwise("LeakyReLU", negative_slope=number(0.3))(nn.leaky_relu)
elementwise("ELU", alpha=number(1.0))(nn.elu)


@elementwise("ThresholdedReLU", theta=number(1.0))
def _thresholded_relu(x: Array, theta: float) -> Array:
    return jnp.where(x > theta, x, 0)


# -- pooling ----------------------------------------------------------------------------------------------------------


@rule("MaxPooling2D", pool_size=sizes(2), strides=or_none(sizes()), padding=PADDING, data_format=LAST)
def _max_pooling2d(
    k: Layers, x: Array, *, name: str, pool_size: tuple[int, int], strides: tuple[int, int] | None, padding: str
) -> Array:
    check_window(x, pool_size, padding)
    return k.max_pool(x, pool_size, strides, padding, name=name)


@rule("AveragePooling2D", pool_size=sizes(2), strides=or_none(sizes()), padding=PADDING, data_format=LAST)
def _average_pooling2d(
    k: Layers, x: Array, *, name: str, pool_size: tuple[int, int], strides: tuple[int, int] | None, padding: str
) -> Array:
    check_window(x, pool_size, padding)
    return k.avg_pool(x, pool_size, strides, padding, name=name)


def check_window(x: Array, window: tuple[int, ...], padding: str) -> None:
    """Raise ValueError where a window does not fit into an image."""
    sides = x.shape[1 : 1 + len(window)]
    if padding == "valid" and any(n > side for n, side in zip(window, sides, strict=True)):
        raise ValueError(f"a window of {window} given, into images of {sides} it does not fit")


def pooling1d(kind: str, reduction: str) -> None:
    """Register a pooling along a sequence."""

    @rule(kind, pool_size=sizes(2, axes=1), strides=or_none(sizes(axes=1)), padding=PADDING, data_format=LAST)
    def apply(
        k: Layers, x: Array, *, name: str, pool_size: tuple[int], strides: tuple[int] | None, padding: str
    ) -> Array:
        check_rank(x, 3)
        check_window(x, pool_size, padding)
        window, steps = (*pool_size, 1), (*(strides or pool_size), 1)
        pool = ops.Pool(reduction, window, steps, padding.upper())
        return k.apply(kind, lambda x: ops.pool(pool, x[:, :, None])[:, :, 0], x, name=name)


pooling1d("MaxPooling1D", "max")
pooling1d("AveragePooling1D", "avg")


@rule("GlobalAveragePooling2D", keepdims=flag(False), data_format=LAST)
def _global_average_pooling2d(k: Layers, x: Array, *, name: str, keepdims: bool) -> Array:
    return k.global_avg_pool(x, keepdims=keepdims, name=name)


@rule("GlobalMaxPooling2D", keepdims=flag(False), data_format=LAST)
def _global_max_pooling2d(k: Layers, x: Array, *, name: str, keepdims: bool) -> Array:
    return k.global_max_pool(x, keepdims=keepdims, name=name)


@rule("GlobalAveragePooling1D", keepdims=flag(False), data_format=LAST)
def _global_average_pooling1d(k: Layers, x: Array, *, name: str, keepdims: bool) -> Array:
    check_rank(x, 3)
    return k.apply("GlobalAveragePooling1D", lambda x: jnp.mean(x, 1, keepdims=keepdims), x, name=name)


@rule("GlobalMaxPooling1D", keepdims=flag(False), data_format=LAST)
def _global_max_pooling1d(k: Layers, x: Array, *, name: str, keepdims: bool) -> Array:
    check_rank(x, 3)
    return k.apply("GlobalMaxPooling1D", lambda x: jnp.max(x, 1, keepdims=keepdims), x, name=name)


# -- sizes ------------------------------------------------------------------------------------------------------------


@rule("ZeroPadding2D", padding=margins(), data_format=LAST)
def _zero_padding2d(k: Layers, x: Array, *, name: str, padding: Pads) -> Array:
    return k.zero_pad(x, padding, name=name)


@rule("ZeroPadding1D", padding=margins(axes=1), data_format=LAST)
def _zero_padding1d(k: Layers, x: Array, *, name: str, padding: tuple[tuple[int, int]]) -> Array:
    check_rank(x, 3)
    return k.apply("ZeroPadding1D", lambda x: jnp.pad(x, ((0, 0), *padding, (0, 0))), x, name=name)


@rule("Cropping2D", cropping=margins(default=0), data_format=LAST)
def _cropping2d(k: Layers, x: Array, *, name: str, cropping: tuple[tuple[int, int], tuple[int, int]]) -> Array:
    check_cropping(x, cropping)
    return k.crop(x, cropping, name=name)


@rule("Cropping1D", cropping=margins(axes=1), data_format=LAST)
def _cropping1d(k: Layers, x: Array, *, name: str, cropping: tuple[tuple[int, int]]) -> Array:
    check_rank(x, 3)
    check_cropping(x, cropping)
    ((before, after),) = cropping
    return k.apply("Cropping1D", lambda x: x[:, before : x.shape[1] - after], x, name=name)


def check_cropping(x: Array, cropping: tuple[tuple[int, int], ...]) -> None:
    """Raise ValueError where nothing is left of an image."""
    for side, margin in zip(x.shape[1:], cropping, strict=False):
        if sum(margin) >= side:
            raise ValueError(f"cropping={cropping} given, of images of {x.shape[1:-1]} nothing is left")


#: Interpolations by Keras's names, and by JAX's.
INTERPOLATIONS = {
    "nearest": "nearest",
    "bilinear": "linear",
    "bicubic": "cubic",
    "lanczos3": "lanczos3",
    "lanczos5": "lanczos5",
}


def resize(
    x: Array, size: tuple[int, int], interpolation: str = "bilinear", antialias: bool = False, crop: bool = False
) -> Array:
    """Resize images as Keras does on JAX: pixels have their centres at halves; `crop` keeps what is wide as it was."""
    check_rank(x, 4)
    (height, width), (new_height, new_width) = x.shape[1:3], size
    if crop:
        rows = max(min(height, int(float(width * new_height) / new_width)), 1)
        columns = max(min(width, int(float(height * new_width) / new_height)), 1)
        top, left = (height - rows) // 2, (width - columns) // 2
        x = x[:, top : top + rows, left : left + columns]
    method = INTERPOLATIONS[interpolation]
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), method, antialias).astype(x.dtype)


@rule("UpSampling2D", size=sizes(2), interpolation=choice(*INTERPOLATIONS, default="nearest"), data_format=LAST)
def _up_sampling2d(k: Layers, x: Array, *, name: str, size: tuple[int, int], interpolation: str) -> Array:
    check_rank(x, 4)

    def function(x: Array) -> Array:
        if interpolation == "nearest":
            return jnp.repeat(jnp.repeat(x, size[0], axis=1), size[1], axis=2)
        return resize(x, (x.shape[1] * size[0], x.shape[2] * size[1]), interpolation)

    return k.apply("UpSampling2D", function, x, name=name)


@rule("UpSampling1D", size=sizes(2, axes=1))
def _up_sampling1d(k: Layers, x: Array, *, name: str, size: tuple[int]) -> Array:
    check_rank(x, 3)
    return k.apply("UpSampling1D", lambda x: jnp.repeat(x, size[0], axis=1), x, name=name)


@rule(
    "Resizing",
    height=count(),
    width=count(),
    interpolation=choice(*INTERPOLATIONS, default="bilinear"),
    antialias=flag(False),
    crop_to_aspect_ratio=flag(False),
    pad_to_aspect_ratio=exactly(False, "false"),
    fill_mode=ignored("without pad_to_aspect_ratio"),
    fill_value=ignored("without pad_to_aspect_ratio"),
    data_format=LAST,
)
def _resizing(
    k: Layers, x: Array, *, name: str, height: int, width: int, crop_to_aspect_ratio: bool, **options: Any
) -> Array:
    size = height, width
    return k.apply("Resizing", lambda x: resize(x, size, crop=crop_to_aspect_ratio, **options), x, name=name)


@rule("CenterCrop", height=count(), width=count(), data_format=LAST)
def _center_crop(k: Layers, x: Array, *, name: str, height: int, width: int) -> Array:
    check_rank(x, 4)

    def function(x: Array) -> Array:
        top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
        if top < 0 or left < 0:  # Keras resizes what is smaller, without a word
            return resize(x, (height, width), crop=True)
        return x[:, top : top + height, left : left + width]

    return k.apply("CenterCrop", function, x, name=name)


@rule("Rescaling", scale=constants(), offset=constants(0.0))
def _rescaling(k: Layers, x: Array, *, name: str, scale: Constant, offset: Constant) -> Array:
    for values in (scale, offset):
        if isinstance(values, tuple) and (len(values) not in (1, x.shape[-1]) or isinstance(values[0], tuple)):
            raise ValueError(f"{values!r:.80} given, a number or one for each of {x.shape[-1]} channels expected")
    return k.rescaling(x, scale, offset, name=name)


# -- shapes -----------------------------------------------------------------------------------------------------------


@rule("Flatten", data_format=LAST)
def _flatten(k: Layers, x: Array, *, name: str) -> Array:
    return k.flatten(x, name=name)


@rule("Reshape", target_shape=integers(least=-1))
def _reshape(k: Layers, x: Array, *, name: str, target_shape: tuple[int, ...]) -> Array:
    return k.reshape(x, whole_shape(x.shape[1:], target_shape), name=name)


def whole_shape(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """Fill in the -1 of a shape.

    Raises:
        ValueError: the shape is of another number of values.
    """
    known = math.prod(n for n in target if n != -1)
    if target.count(-1) == 1 and known > 0:
        target = tuple(math.prod(shape) // known if n == -1 else n for n in target)
    if min(target, default=1) < 1 or math.prod(target) != math.prod(shape):
        raise ValueError(f"a shape of {target} given, of {shape} there are {math.prod(shape)} values")
    return target


@rule("Permute", dims=integers(least=1))
def _permute(k: Layers, x: Array, *, name: str, dims: tuple[int, ...]) -> Array:
    if sorted(dims) != list(range(1, x.ndim)):
        raise ValueError(f"dims={list(dims)} given, the axes from 1 to {x.ndim - 1} expected")
    return k.apply("Permute", lambda x: jnp.transpose(x, (0, *dims)), x, name=name)


@rule("RepeatVector", n=count())
def _repeat_vector(k: Layers, x: Array, *, name: str, n: int) -> Array:
    check_rank(x, 2)
    return k.apply("RepeatVector", lambda x: jnp.repeat(x[:, None], n, axis=1), x, name=name)


# -- what does nothing in inference -----------------------------------------------------------------------------------


def noise_read(value: Json) -> Plain:
    """Read a list of sizes, null where it is the tensor's."""
    fits = isinstance(value, (list, tuple)) and len(value) <= 8
    return tuple(value) if fits and all(n is None or type(n) is int for n in value) else UNFIT


NOISE = or_none(Option(noise_read, "a list of sizes"))


def dropout(kind: str, *shared: int) -> None:
    """Register a layer that drops values; those along the `shared` axes together."""

    @rule(kind, rate=rate(), noise_shape=NOISE, data_format=LAST)
    def apply(k: Layers, x: Array, *, name: str, rate: float, noise_shape: tuple[int | None, ...] | None) -> Array:
        axes = shared
        if noise_shape is not None:
            sizes = tuple(zip(noise_shape, x.shape, strict=True))
            axes = tuple(axis for axis, (noise, size) in enumerate(sizes) if noise == 1 and (size != 1 or not axis))
            if 0 in axes or any(noise not in (None, 1, size) for noise, size in sizes):
                raise ValueError(f"noise_shape={list(noise_shape)} given, null for the images expected")
        return k.dropout(x, rate, kind=kind, shared=axes, name=name)


dropout("Dropout")
dropout("SpatialDropout1D", 1)
dropout("SpatialDropout2D", 1, 2)


@rule("StochasticDepth", drop_path_rate=rate())
def _stochastic_depth(k: Layers, x: Array, *, name: str, drop_path_rate: float) -> Array:
    return k.stochastic_depth(x, drop_path_rate, name=name)


def identity(kind: str, *options: str, trains: bool = False) -> None:
    """Register a layer that does nothing in inference; in training neither if it `trains`.

    Its options play no part.
    """

    @rule(kind, {option: ignored("in training alone") for option in options})
    def apply(k: Layers, x: Array, *, name: str) -> Array:
        if not trains and k.trains(name):
            raise ValueError(f"{kind} is not done in training: leave it out of the layers that train")
        return k.apply(kind, lambda x: x, x, name=name)


FACTOR = ("factor", "fill_mode", "fill_value", "interpolation", "data_format")

identity("Identity", trains=True)
identity("ActivityRegularization", "l1", "l2", trains=True)
identity("GaussianNoise", "stddev")
identity("GaussianDropout", "rate")
identity("AlphaDropout", "rate", "noise_shape")
identity("RandomFlip", "mode", *FACTOR)
identity("RandomRotation", *FACTOR)
identity("RandomZoom", "height_factor", "width_factor", *FACTOR)
identity("RandomTranslation", "height_factor", "width_factor", *FACTOR)
identity("RandomShear", "x_factor", "y_factor", *FACTOR)
identity("RandomHeight", *FACTOR)
identity("RandomWidth", *FACTOR)
identity("RandomContrast", "lower", "upper", *FACTOR)
identity("RandomBrightness", *FACTOR)
identity("RandomHue", *FACTOR)
identity("RandomSaturation", *FACTOR)
identity("RandomColorJitter", "brightness_factor", "contrast_factor", "saturation_factor", "hue_factor", *FACTOR)
identity("RandomGrayscale", *FACTOR)
identity("RandomErasing", "scale", *FACTOR)
identity("RandomGaussianBlur", "kernel_size", "sigma", *FACTOR)


# -- what is not Keras's ----------------------------------------------------------------------------------------------


@rule("Custom", inputs=None)
def _custom(k: Layers, *xs: Array, name: str, kind: str, function: Callable[..., Array], config: str) -> Array:
    """Apply a function that the caller gave for a class: (k, x, config), where x is a list if it takes several."""
    before = len(k.names)
    y = function(k, xs[0] if len(xs) == 1 else list(xs), {**json.loads(config), "name": name})
    if not isinstance(y, jax.Array):
        raise ValueError(f"the function of custom_objects for {kind} returned {type(y).__name__}, an array expected")
    if any(other.partition(":")[0] == name for other in k.names[before:]):
        return y
    return k.apply(kind, lambda *_: y, *xs, name=name)
