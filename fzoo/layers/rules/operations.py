"""Rules of the operations between layers: those of `keras.ops`, as which TensorFlow's are read, too.

The operands of an operation are tensors or constants. Each operation is named by its class in Keras 3, after "ops.".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fzoo.layers.activations import ACTIVATIONS
from fzoo.layers.keras import Layers
from fzoo.layers.rules.merging import aligned, axis_of, unit
from fzoo.layers.rules.options import (
    UNFIT,
    Constant,
    Option,
    Plain,
    Rule,
    activation,
    choice,
    constants,
    exactly,
    flag,
    integer,
    integers,
    integers_read,
    number,
    number_or_none,
    or_none,
    positive_number,
    register,
)
from fzoo.layers.rules.weightless import INTERPOLATIONS, relu, resize, whole_shape
from fzoo.types import Json

#: What reads a constant in the place of a tensor.
CONSTANT = constants()


def operation(
    kind: str, *operands: str, listed: bool = False, **options: Option
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a function of arrays as an operation.

    Args:
        kind: its class in `keras.ops`.
        operands: names of its arguments that may be tensors.
        listed: its one operand is a list of tensors.
        options: of the class.
    """

    def decorate(function: Callable[..., Array]) -> Callable[..., Array]:
        def apply(
            k: Layers,
            *xs: Array,
            name: str,
            tensors: tuple[str, ...],
            numbers: tuple[tuple[str, Constant], ...],
            is_layer: bool,
            **values: Any,
        ) -> Array:
            def compute(*xs: Array) -> Array:
                given: dict[str, Any] = {key: array_of(value, xs[0]) for key, value in numbers}
                given |= {operands[0]: xs} if listed else dict(zip(tensors, xs, strict=True))
                y = function(**given, **values)
                if y.ndim < 1 or y.shape[0] != xs[0].shape[0]:
                    raise ValueError(f"its result of shape {y.shape} is not one for each image")
                return y

            return k.apply(kind, compute, *xs, name=name) if is_layer else k.operation(compute, *xs, name=name)

        register(f"ops.{kind}", Rule(apply, options, None if listed else len(operands), operands))
        return function

    return decorate


def array_of(value: Constant, x: Array) -> float | np.ndarray:
    """Return a constant as what goes with a tensor: a number as it is, numbers in lists as an array of its dtype."""
    return np.asarray(value, x.dtype) if isinstance(value, tuple) else value


def two(kind: str, function: Callable[[Array, Array], Array]) -> None:
    """Register an operation on the values at the same place of two operands."""
    operation(kind, "x1", "x2")(lambda x1, x2: function(*aligned([x1, x2])))


two("Add", lambda x1, x2: x1 + x2)
two("Subtract", lambda x1, x2: x1 - x2)
two("Multiply", lambda x1, x2: x1 * x2)
two("Divide", lambda x1, x2: x1 / x2)
two("TrueDivide", lambda x1, x2: x1 / x2)
two("Power", lambda x1, x2: x1**x2)
two("Maximum", jnp.maximum)
two("Minimum", jnp.minimum)


@operation("Matmul", "x1", "x2")
def _matmul(x1: Any, x2: Any) -> Array:
    if x1.ndim < 2 or x2.ndim < 2:
        raise ValueError("the product of a matrix and a vector is not taken: ops.expand_dims makes it a matrix")
    return jnp.matmul(*aligned([x1, x2])) if max(x1.ndim, x2.ndim) > 2 else x1 @ x2


def one(kind: str, function: Callable[..., Array], **options: Option) -> None:
    """Register an operation on each value of a tensor."""
    operation(kind, "x", listed=False, **options)(lambda x, **values: function(x, **values))


one("Negative", jnp.negative)
one("Absolute", jnp.abs)
one("Square", jnp.square)
one("Sqrt", jnp.sqrt)
one("Rsqrt", lax.rsqrt)
one("Exp", jnp.exp)
one("Log", jnp.log)
one("Log1p", jnp.log1p)
one("Sign", jnp.sign)
one("Reciprocal", jnp.reciprocal)
one("Sin", jnp.sin)
one("Cos", jnp.cos)
one("StopGradient", lambda x: lax.stop_gradient(x))
one("Identity", lambda x: x)
one("Clip", lambda x, x_min, x_max: jnp.clip(x, x_min, x_max), x_min=number(), x_max=number())
one("Cast", lambda x: x, dtype=exactly("float32", "'float32'", "float16", "bfloat16", "float64", "half", "float"))
one("ReLU", relu, max_value=number_or_none(), negative_slope=number(0.0), threshold=number(0.0))
one("LeakyRelu", nn.leaky_relu, negative_slope=number(0.2))
one("Elu", nn.elu, alpha=number(1.0))
one("Celu", nn.celu, alpha=number(1.0))
one("Gelu", nn.gelu, approximate=flag(True))
one("Activation", lambda x, activation: ACTIVATIONS[activation](x), activation=activation())

for _kind, _name in {
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Tanh": "tanh",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Selu": "selu",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "HardTanh": "hard_tanh",
    "LogSigmoid": "log_sigmoid",
    "Mish": "mish",
    "TanhShrink": "tanh_shrink",
}.items():
    one(_kind, ACTIVATIONS[_name])


@operation("Softmax", "x", axis=integer(-1))
def _softmax(x: Array, axis: int) -> Array:
    return nn.softmax(x, axis_of(axis, x.ndim))


@operation("LogSoftmax", "x", axis=integer(-1))
def _log_softmax(x: Array, axis: int) -> Array:
    return nn.log_softmax(x, axis_of(axis, x.ndim))


def reduction(kind: str, function: Callable[..., Array]) -> None:
    """Register a reduction over axes of each image."""

    @operation(kind, "x", axis=integers(), keepdims=flag(False), initial=exactly(None, "null"))
    def apply(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        return function(x, tuple(axis_of(n, x.ndim) for n in axis), keepdims=keepdims)


reduction("Mean", jnp.mean)
reduction("Sum", jnp.sum)
reduction("Max", jnp.max)
reduction("Min", jnp.min)
reduction("Prod", jnp.prod)
reduction("Var", jnp.var)
reduction("Std", jnp.std)

# -- shapes -----------------------------------------------------------------------------------------------------------


@operation("Reshape", "x", newshape=integers(least=-1))
def _reshape(x: Array, newshape: tuple[int, ...]) -> Array:
    if newshape[:1] != (-1,):
        raise ValueError(f"a shape of {list(newshape)} given, one that begins with -1 for the images expected")
    return x.reshape(x.shape[0], *whole_shape(x.shape[1:], newshape[1:]))


@operation("Transpose", "x", axes=integers(least=0))
def _transpose(x: Array, axes: tuple[int, ...]) -> Array:
    if sorted(axes) != list(range(x.ndim)) or axes[0] != 0:
        raise ValueError(f"axes={list(axes)} given, 0 and then the axes from 1 to {x.ndim - 1} expected")
    return jnp.transpose(x, axes)


@operation("Squeeze", "x", axis=integers())
def _squeeze(x: Array, axis: tuple[int, ...]) -> Array:
    return jnp.squeeze(x, tuple(axis_of(n, x.ndim) for n in axis))


@operation("ExpandDims", "x", axis=integers())
def _expand_dims(x: Array, axis: tuple[int, ...]) -> Array:
    return jnp.expand_dims(x, tuple(axis_of(n, x.ndim + len(axis)) for n in axis))


@operation("Flip", "x", axis=integers())
def _flip(x: Array, axis: tuple[int, ...]) -> Array:
    return jnp.flip(x, tuple(axis_of(n, x.ndim) for n in axis))


@operation("Concatenate", "xs", listed=True, axis=integer(-1))
def _concatenate(xs: tuple[Array, ...], axis: int) -> Array:
    return jnp.concatenate(xs, axis_of(axis, xs[0].ndim))


@operation("Stack", "xs", listed=True, axis=integer(0))
def _stack(xs: tuple[Array, ...], axis: int) -> Array:
    return jnp.stack(xs, axis_of(axis, xs[0].ndim + 1))


@operation("AddN", "xs", listed=True)
def _add_n(xs: tuple[Array, ...]) -> Array:
    return functools.reduce(jnp.add, xs)


def pads_read(value: Json) -> Plain:
    """Read ((before, after), ...) of each axis."""
    pairs = [integers_read(pair, 0) for pair in value] if isinstance(value, (list, tuple)) else []
    return tuple(pairs) if 1 < len(pairs) <= 8 and all(p is not UNFIT and len(p) == 2 for p in pairs) else UNFIT


@operation(
    "Pad",
    "x",
    pad_width=Option(pads_read, "(before, after) of each axis"),
    mode=choice("constant", "reflect", "symmetric", default="constant"),
    constant_values=number_or_none(),
)
def _pad(x: Array, pad_width: tuple[tuple[int, int], ...], mode: str, constant_values: float | None) -> Array:
    if len(pad_width) != x.ndim or pad_width[0] != (0, 0):
        raise ValueError(f"pad_width={pad_width} given, (0, 0) and a pair for each of {x.ndim - 1} axes expected")
    options = {"constant_values": constant_values or 0} if mode == "constant" else {}
    return jnp.pad(x, pad_width, mode, **options)


def key_read(value: Json) -> Plain:
    """Read what stands between [ and ]: numbers, slices (start, stop, step), "..." or None for a new axis."""
    items = value if isinstance(value, list) else [value]
    key: list[int | str | tuple[int | None, ...] | None] = []
    for item in items:
        config = item.get("config", item) if isinstance(item, Mapping) else None
        if isinstance(item, Mapping) and item.get("class_name") == "__ellipsis__":
            key.append("...")
        elif isinstance(config, Mapping) and {"start", "stop", "step"} <= config.keys():
            bounds = [config[end] for end in ("start", "stop", "step")]
            if not all(n is None or type(n) is int for n in bounds) or bounds[2] == 0:
                return UNFIT
            key.append(tuple(bounds))
        elif item is None or type(item) is int:
            key.append(item)
        else:
            return UNFIT
    return tuple(key) if 0 < len(key) <= 8 and key.count("...") <= 1 else UNFIT


@operation("GetItem", "x", key=Option(key_read, "slices, numbers and an ellipsis"))
def _get_item(x: Array, key: tuple[int | str | tuple[int | None, ...] | None, ...]) -> Array:
    if key[0] not in ("...", (None, None, None)):
        raise ValueError("a choice among the images given, which is not taken")
    if key[0] == "..." and sum(item is not None for item in key[1:]) >= x.ndim:
        raise ValueError(f"{len(key)} indices given, of a tensor of {x.ndim} axes")
    chosen = tuple(... if item == "..." else slice(*item) if isinstance(item, tuple) else item for item in key)
    return x[chosen]


@operation("Normalize", "x", axis=integers(-1), order=exactly(2, "2"), epsilon=or_none(positive_number()))
def _normalize(x: Array, axis: tuple[int, ...], epsilon: float | None) -> Array:
    return unit(x, tuple(axis_of(n, x.ndim) for n in axis), epsilon or 1e-7)


@operation(
    "Resize",
    "x",
    size=Option(lambda value: v if (v := integers_read(value, 1)) is not UNFIT and len(v) == 2 else UNFIT, "two sizes"),
    interpolation=choice(*INTERPOLATIONS, default="bilinear"),
    antialias=flag(False),
    crop_to_aspect_ratio=flag(False),
    pad_to_aspect_ratio=exactly(False, "false"),
    fill_mode=exactly("constant", "'constant'"),
    fill_value=exactly(0.0, "0"),
    data_format=exactly("channels_last", "'channels_last'", None),
)
def _resize(x: Array, size: tuple[int, int], crop_to_aspect_ratio: bool, **options: Any) -> Array:
    return resize(x, size, crop=crop_to_aspect_ratio, **options)
