"""How Keras defines a layer, said once for every family.

A family (fzoo/models/) is a subclass of `Classifier` whose `backbone` calls the methods of a `Layers` object,
one for each Keras layer. `Layers` gives the layer its Keras name (which is its name in the parameter tree),
applies stock Flax layers with Keras's defaults, and keeps what was asked for: the outputs to tap, or the record of
the whole call graph, from which `trace` derives Keras's order of layers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from fzoo import ops
from fzoo.initializers import VarianceScaling, glorot_uniform

Activation = str | Callable[[Array], Array] | None
Padding = str | tuple[tuple[int, int], tuple[int, int]]

#: What behaves as in training (batch statistics, dropout): all or nothing, or the layers of these names.
Training = bool | frozenset[str]

#: Keras's names of activations. `None` and "linear" are the identity.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": jax.jit(nn.relu),  # Flax's is traced anew at each call
    "relu6": nn.relu6,
    "sigmoid": nn.sigmoid,
    "softmax": nn.softmax,
    "softplus": nn.softplus,
    "tanh": nn.tanh,
    "silu": nn.silu,
    "swish": nn.silu,
    "elu": nn.elu,
    "selu": nn.selu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "hard_sigmoid": nn.hard_sigmoid,
    "hard_silu": nn.hard_silu,
    "hard_swish": nn.hard_silu,
}


def activation_function(activation: Activation) -> Callable[[Array], Array]:
    """The function for a Keras activation: a name, a callable, or None for the identity.

    Raises:
        ValueError: the name is not one of Keras's.
    """
    if activation is None:
        return ACTIVATIONS["linear"]
    if callable(activation):
        return activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(unknown("activation", activation, ACTIVATIONS))
    return ACTIVATIONS[activation]


def unknown(what: str, given: object, known: Iterable[str], show: int = 3) -> str:
    """One line for a name that does not exist: what was given, and the nearest that do."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), lower, n=show, cutoff=0.5)
    hint = [lower[n] for n in near] or known[:show]
    more = ", ..." if len(hint) < len(known) and not near else ""
    return f"unknown {what} {given!r}: did you mean {', '.join(hint)}{more}?"


#: `Node.kind` of what a Keras file says by an operator (`x + y`): a step of the graph, but no layer.
OPERATION = "Operation"


@dataclasses.dataclass(frozen=True)
class Node:
    """One Keras layer of a network, as one call of it saw it.

    Attributes:
        name: Keras's name, e.g. "block1_conv1".
        kind: Keras's class, e.g. "Conv2D"; `OPERATION` for a step between layers.
        inputs: names of the layers that feed it, in the order of its arguments.
        shape: of its output, without the batch.
        flops: analytic, for one image: 2 for each multiply-add of convolutions and dense layers, otherwise 0.
        kernel_init: how its kernels start.
        config: Keras's options of the layer, where something asks for them: "activation" of a layer with
            weights, "convolution" (an `ops.Convolution`, one image) of a Conv2D, "epsilon" of a BatchNormalization; and
            "rate" of a Dropout, "init" of a LayerScale.
        parts: the layers inside of a Sequential, in their order.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    flops: int
    kernel_init: VarianceScaling
    config: Mapping[str, Any]
    parts: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Where a network that `optimize_for_inference` made differs from Keras's.

    Attributes:
        biased: convolutions that got a bias, from the BN folded into them.
        folded: BNs and LayerScales that do nothing any more.
        scaled: BNs that are left: a factor and a term for each channel.
        tiles: (convolution, tile) of the kernels that are kept transformed for Winograd.
        gone: (layer, the layer that has its output now): what can't be tapped any more.
    """

    biased: frozenset[str] = frozenset()
    folded: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()
    tiles: tuple[tuple[str, int], ...] = ()
    gone: tuple[tuple[str, str], ...] = ()


class Layer(nn.Module):
    """A Flax layer whose parameters are checked by their shapes alone; Flax traces the initializers for that."""

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **options: Any) -> Any:
        """As in Flax; the first of `init_args` is the shape."""
        if self.scope is None or not self.scope.has_variable("params", name):
            return super().param(name, init_fn, *init_args, **options)
        value = nn.meta.unbox(self.get_variable("params", name))
        if jnp.shape(value) != tuple(init_args[0]):
            raise ScopeParamShapeError(name, self.scope.path_text, jnp.shape(value), tuple(init_args[0]))
        return value


class Conv(Layer, nn.Conv):
    """`flax.linen.Conv`."""


class Dense(Layer, nn.Dense):
    """`flax.linen.Dense`."""


class LayerNorm(Layer, nn.LayerNorm):
    """`flax.linen.LayerNorm`."""


class SeparableConv(nn.Module):
    """A depthwise, then a pointwise convolution under one Keras name."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: str
    conv: Callable[..., nn.Conv]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply both convolutions."""
        channels = x.shape[-1]
        x = self.conv(
            channels,
            self.kernel_size,
            self.strides,
            padding=self.padding,
            feature_group_count=channels,
            name="depthwise",
        )(x)
        return self.conv(self.features, (1, 1), use_bias=self.use_bias, name="pointwise")(x)


class WinogradConv(Layer):
    """A convolution of stride 1 whose kernel is kept transformed."""

    features: int
    kernel_size: tuple[int, int]
    padding: str | tuple[tuple[int, int], tuple[int, int]]
    tile: int
    dtype: Any
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply it."""
        products = ops.winograd_products(self.kernel_size, self.tile)
        kernel = self.param("kernel", glorot_uniform, (products, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        conv = ops.Convolution.of(x.shape, (*self.kernel_size, x.shape[-1], self.features), (1, 1), self.padding)
        y = ops.winograd_transformed(conv, x, kernel)
        return y if bias is None else y + lax.broadcast_to_rank(bias, y.ndim)


@functools.partial(jax.jit, static_argnums=5)  # a network repeats its shapes: each is traced once
def normalised(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Batch normalisation by given statistics."""
    mean, factor, bias = (lax.broadcast_to_rank(v, x.ndim) for v in (mean, lax.rsqrt(var + epsilon) * scale, bias))
    return (x - mean) * factor + bias


class BatchNorm(Layer):
    """`flax.linen.BatchNorm` over the last axis: the same variables and numbers, its sums as `ops` lowers them.

    The variance is that of the centred values: E[x^2] - E[x]^2 cancels in float32 where the mean is large.
    """

    train: bool
    epsilon: float
    momentum: float
    use_scale: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        """Normalise by the batch's statistics in training, by the running ones otherwise."""
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, channels) if self.use_scale else jnp.ones(())
        bias = self.param("bias", nn.initializers.zeros, channels)
        if not self.train:
            y = normalised(x, running_mean.value, running_var.value, scale, bias, self.epsilon)
            return jnp.asarray(y, self.dtype)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        mean = ops.channel_mean(wide)
        centred = wide - ops.spread(mean, wide)
        var = ops.channel_mean(jnp.square(centred))
        if not self.is_initializing():
            for running, new in ((running_mean, mean), (running_var, var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        factor = lax.rsqrt(var + self.epsilon) * scale
        return jnp.asarray(centred * ops.spread(factor, wide) + ops.spread(bias, wide), self.dtype)


class LayerScale(Layer):
    """A factor for each channel that starts small."""

    start: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        """Apply it."""
        gamma = self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:])
        x, gamma = promote_dtype(x, gamma, dtype=self.dtype)
        return x * lax.broadcast_to_rank(gamma, x.ndim)


class Normalization(nn.Module):
    """A mean and a variance of each channel that came with the weights, not from training."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Centre and scale; the count of images that Keras keeps beside them plays no part."""
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        deviation = jnp.maximum(jnp.sqrt(var.value), 1e-7)
        return (x - lax.broadcast_to_rank(mean.value, x.ndim)) / lax.broadcast_to_rank(deviation, x.ndim)


class Sequential(nn.Module):
    """Layers under one Keras name, which is the first key of their variables, too."""

    layers: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Apply them."""
        return self.layers(x)


class ScaleShift(Layer):
    """What is left of a BN in inference: a factor and a term for each channel."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        """Apply it."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        return x * lax.broadcast_to_rank(scale, x.ndim) + lax.broadcast_to_rank(bias, x.ndim)


class Layers:
    """The Keras layers of one forward pass.

    Each method applies one Keras layer with Keras's defaults and returns its output, the fused activation included.
    A layer without a name gets the one that Keras would give it in a fresh session: the class in snake case, and a
    counter from the second on (`conv2d`, `conv2d_1`).

    Args:
        train: batch statistics and dropout as in training: everywhere, or in the layers of these names alone.
        dtype: of the computation; parameters stay float32.
        known_size: False where Keras would not know the height and width of the input when it builds the
            network, which decides `correct_pad`.
        taps: names of the layers whose output is kept in `self.tapped`.
        given: outputs of layers, by name, that are taken for what the layers compute, which XLA then drops.
        record: keep the call graph in `self.nodes`. Holds on to every intermediate array, so it is for
            abstract evaluation.
        prepared: where the network differs from Keras's, if `optimize_for_inference` made it.
    """

    def __init__(
        self,
        *,
        train: Training = False,
        dtype: Any = jnp.float32,
        known_size: bool = True,
        taps: Iterable[str] = (),
        given: Mapping[str, Array] | None = None,
        record: bool = False,
        prepared: Prepared | None = None,
    ):
        self._train = train
        self.dtype = dtype
        self.known_size = known_size
        self.tapped: dict[str, Array] = {}
        self.nodes: dict[str, Node] = {}
        self._taps = frozenset(taps)
        self._given = dict(given or {})
        self._record = record
        self._prepared = prepared or Prepared()
        self._tiles = dict(self._prepared.tiles)
        self._numbers: Counter[str] = Counter()
        self._growing: tuple[Array, Array] | None = None  # a concatenation, and the buffer that it is the beginning of
        self._producer: dict[int, tuple[str, Array]] = {}  # by id; the array is kept so that the id stays its own
        self._conv = functools.partial(
            Conv,
            use_bias=False,
            dtype=dtype,
            padding="VALID",
            kernel_init=self._start(glorot_uniform),
            conv_general_dilated=ops.conv_general_dilated,
        )

    def trains(self, name: str) -> bool:
        """Whether a layer behaves as in training."""
        return self._train if isinstance(self._train, bool) else name in self._train

    def _start(self, kernel_init: VarianceScaling) -> Callable[..., Array]:
        """How kernels start; a record has no use for their values."""
        return nn.initializers.zeros if self._record else kernel_init

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def _name(self, kind: str, name: str | None) -> str:
        if name is not None:
            return name
        base = snake_case(kind)
        number = self._numbers[base]
        self._numbers[base] += 1
        return f"{base}_{number}" if number else base

    def _note(
        self,
        kind: str,
        name: str,
        inputs: Sequence[Array],
        y: Array,
        flops: int = 0,
        kernel_init: VarianceScaling = glorot_uniform,
        parts: tuple[Node, ...] = (),
        **config: Any,
    ) -> Array:
        """File the output of a layer; every layer's last step."""
        if self._record:
            if any(y is x for x in inputs):  # an identity (dropout outside training) is a layer of its own, too
                y = jnp.copy(y)
            parents = tuple(self._producer[id(x)][0] for x in inputs)
            self.nodes[name] = Node(name, kind, parents, y.shape[1:], flops, kernel_init, config, parts)
            self._producer[id(y)] = (name, y)
        if name in self._given:
            y = self.given(name, y)
        if name in self._taps:
            self.tapped[name] = y
        return y

    def not_given(self) -> list[str]:
        """The names of what the caller gave that no layer has."""
        return list(self._given)

    def given(self, name: str, y: Array) -> Array:
        """What the caller gave for the output of a layer; it is taken once, so that the unknown names are left."""
        given = self._given.pop(name)
        if given.shape[1:] != y.shape[1:]:
            raise ValueError(f"{name} of shape {given.shape} given, (N, {', '.join(map(str, y.shape[1:]))}) expected")
        return jnp.asarray(given, y.dtype)

    # -- layers with weights ------------------------------------------------------------------------------------------

    def conv2d(
        self,
        x: Float[Array, "n h w c"],
        features: int,
        kernel: int | tuple[int, int],
        strides: int = 1,
        padding: Padding = "valid",
        *,
        groups: int = 1,
        use_bias: bool = True,
        activation: Activation = None,
        kernel_init: VarianceScaling = glorot_uniform,
        name: str | None = None,
    ) -> Float[Array, "n ho wo f"]:
        """Conv2D."""
        name = self._name("Conv2D", name)
        kernel, steps, pads = pair(kernel), pair(strides), lax_padding(padding)
        use_bias = use_bias or name in self._prepared.biased
        if name in self._tiles:
            conv = WinogradConv(features, kernel, pads, self._tiles[name], self.dtype, use_bias, name=name)
        else:
            conv = self._conv(
                features,
                kernel,
                steps,
                padding=pads,
                feature_group_count=groups,
                use_bias=use_bias,
                kernel_init=self._start(kernel_init),
                name=name,
            )
        y = activation_function(activation)(conv(x))
        terms = x.shape[-1] // groups
        shape = ops.Convolution.of((1, *x.shape[1:]), (*kernel, terms, features), steps, pads, groups)
        return self._note(
            "Conv2D", name, [x], y, shape.flops, kernel_init, activation=activation or "linear", convolution=shape
        )

    def depthwise_conv2d(
        self,
        x: Float[Array, "n h w c"],
        kernel: int | tuple[int, int],
        strides: int = 1,
        padding: Padding = "valid",
        *,
        depth_multiplier: int = 1,
        use_bias: bool = True,
        kernel_init: VarianceScaling = glorot_uniform,
        name: str | None = None,
    ) -> Float[Array, "n ho wo cm"]:
        """DepthwiseConv2D. Output c * depth_multiplier + j reads input channel c."""
        name = self._name("DepthwiseConv2D", name)
        channels, kernel = x.shape[-1], pair(kernel)
        y = self._conv(
            channels * depth_multiplier,
            kernel,
            pair(strides),
            padding=lax_padding(padding),
            feature_group_count=channels,
            use_bias=use_bias or name in self._prepared.biased,
            kernel_init=self._start(kernel_init),
            name=name,
        )(x)
        flops = 2 * int(np.prod([*y.shape[1:], *kernel]))
        return self._note("DepthwiseConv2D", name, [x], y, flops, kernel_init, activation="linear")

    def separable_conv2d(
        self,
        x: Float[Array, "n h w c"],
        features: int,
        kernel: int | tuple[int, int],
        strides: int = 1,
        padding: str = "valid",
        *,
        name: str | None = None,
    ) -> Float[Array, "n ho wo f"]:
        """SeparableConv2D without a bias."""
        name = self._name("SeparableConv2D", name)
        kernel, channels = pair(kernel), x.shape[-1]
        use_bias = name in self._prepared.biased
        y = SeparableConv(features, kernel, pair(strides), padding.upper(), self._conv, use_bias, name=name)(x)
        flops = 2 * int(np.prod(y.shape[1:3])) * channels * (kernel[0] * kernel[1] + features)
        return self._note("SeparableConv2D", name, [x], y, flops, activation="linear")

    def dense(
        self,
        x: Float[Array, "n ... c"],
        features: int,
        *,
        activation: Activation = None,
        kernel_init: VarianceScaling = glorot_uniform,
        name: str | None = None,
    ) -> Float[Array, "n ... f"]:
        """Dense, over the last axis."""
        name = self._name("Dense", name)
        dense = Dense(features, dtype=self.dtype, kernel_init=self._start(kernel_init), name=name)
        y = activation_function(activation)(dense(x))
        flops = 2 * x.shape[-1] * int(np.prod(y.shape[1:]))
        return self._note("Dense", name, [x], y, flops, kernel_init, activation=activation or "linear")

    def batch_norm(
        self,
        x: Float[Array, "n ... c"],
        *,
        epsilon: float = 1e-3,
        momentum: float = 0.99,
        scale: bool = True,
        name: str | None = None,
    ) -> Float[Array, "n ... c"]:
        """BatchNormalization over the last axis, with Keras's epsilon and momentum."""
        name = self._name("BatchNormalization", name)
        if name in self._prepared.folded:
            y = x
        elif name in self._prepared.scaled:
            y = ScaleShift(self.dtype, name=name)(x)
        else:
            y = BatchNorm(self.trains(name), epsilon, momentum, scale, self.dtype, name=name)(x)
        return self._note("BatchNormalization", name, [x], y, epsilon=epsilon)

    def layer_norm(
        self, x: Float[Array, "n ... c"], *, epsilon: float = 1e-3, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """LayerNormalization over the last axis, with Keras's epsilon."""
        name = self._name("LayerNormalization", name)
        y = LayerNorm(epsilon, dtype=self.dtype, use_fast_variance=False, name=name)(x)
        return self._note("LayerNormalization", name, [x], y)

    def layer_scale(
        self, x: Float[Array, "n ... c"], init: float, *, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """LayerScale: a factor for each channel, at first `init`."""
        name = self._name("LayerScale", name)
        y = x if name in self._prepared.folded else LayerScale(init, self.dtype, name=name)(x)
        return self._note("LayerScale", name, [x], y, init=init)

    def normalization(
        self,
        x: Float[Array, "n h w c"],
        mean: Sequence[float] | None = None,
        variance: Sequence[float] | None = None,
        *,
        name: str | None = None,
    ) -> Float[Array, "n h w c"]:
        """Normalization of the channels, by constants, or by values that come with the weights."""
        name = self._name("Normalization", name)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        if mean is None or variance is None:
            y = Normalization(name=name)(wide)
        else:
            y = (wide - of_channels(mean, x)) / np.sqrt(of_channels(variance, x))
        return self._note("Normalization", name, [x], y.astype(x.dtype))

    def sequential(self, x: Array, layers: Callable[[Layers, Array], Array], *, name: str | None = None) -> Array:
        """Sequential: what `layers(k, x)` calls, under one name. `layers` is no module's method: Flax would lead those
        variables to that module."""
        name = self._name("Sequential", name)
        inner = Layers(
            train=self.trains(name),
            dtype=self.dtype,
            known_size=self.known_size,
            taps=self._taps,
            record=self._record,
            prepared=self._prepared,
        )
        inner.tapped, inner._numbers, inner._given = self.tapped, self._numbers, self._given
        inner._producer[id(x)] = (name, x)
        y = Sequential(functools.partial(layers, inner), name=name)(x)
        parts = tuple(inner.nodes.values())
        return self._note("Sequential", name, [x], y, sum(part.flops for part in parts), parts=parts)

    # -- layers without weights ---------------------------------------------------------------------------------------

    def input(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """InputLayer."""
        return self._note("InputLayer", self._name("InputLayer", None), [], x)

    def activation(self, x: Array, function: Activation, *, name: str | None = None) -> Array:
        """Activation."""
        name = self._name("Activation", name)
        y = activation_function(function)(x)
        return self._note("Activation", name, [x], y, activation=function or "linear")

    def relu(self, x: Array, max_value: float | None = None, *, name: str | None = None) -> Array:
        """ReLU, clipped at `max_value`."""
        name = self._name("ReLU", name)
        y = ACTIVATIONS["relu"](x) if max_value is None else jnp.clip(x, 0, max_value)
        return self._note("ReLU", name, [x], y)

    def zero_pad(
        self, x: Float[Array, "n h w c"], padding: int | tuple[tuple[int, int], ...], *, name: str | None = None
    ) -> Float[Array, "n hp wp c"]:
        """ZeroPadding2D."""
        name = self._name("ZeroPadding2D", name)
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        return self._note("ZeroPadding2D", name, [x], jnp.pad(x, ((0, 0), *padding, (0, 0))))

    def crop(
        self, x: Float[Array, "n h w c"], cropping: tuple[tuple[int, int], tuple[int, int]], *, name: str | None = None
    ) -> Float[Array, "n hc wc c"]:
        """Cropping2D."""
        name = self._name("Cropping2D", name)
        (top, bottom), (left, right) = cropping
        y = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
        return self._note("Cropping2D", name, [x], y)

    def max_pool(
        self,
        x: Float[Array, "n h w c"],
        window: int,
        strides: int | None = None,
        padding: str = "valid",
        *,
        name: str | None = None,
    ) -> Float[Array, "n ho wo c"]:
        """MaxPooling2D; padding never wins. `strides` defaults to the window."""
        name = self._name("MaxPooling2D", name)
        how = ops.Pool("max", pair(window), pair(strides or window), padding.upper())
        return self._note("MaxPooling2D", name, [x], ops.pool(how, x))

    def avg_pool(
        self,
        x: Float[Array, "n h w c"],
        window: int,
        strides: int | None = None,
        padding: str = "valid",
        *,
        name: str | None = None,
    ) -> Float[Array, "n ho wo c"]:
        """AveragePooling2D; padding is not counted. `strides` defaults to the window."""
        name = self._name("AveragePooling2D", name)
        how = ops.Pool("avg", pair(window), pair(strides or window), padding.upper())
        return self._note("AveragePooling2D", name, [x], ops.pool(how, x))

    def global_avg_pool(
        self, x: Float[Array, "n h w c"], *, keepdims: bool = False, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """GlobalAveragePooling2D."""
        name = self._name("GlobalAveragePooling2D", name)
        return self._note("GlobalAveragePooling2D", name, [x], jnp.mean(x, (1, 2), keepdims=keepdims))

    def global_max_pool(self, x: Float[Array, "n h w c"], *, name: str | None = None) -> Float[Array, "n c"]:
        """GlobalMaxPooling2D."""
        name = self._name("GlobalMaxPooling2D", name)
        return self._note("GlobalMaxPooling2D", name, [x], jnp.max(x, (1, 2)))

    def add(self, xs: Sequence[Array], *, name: str | None = None) -> Array:
        """Add."""
        name = self._name("Add", name)
        return self._note("Add", name, xs, functools.reduce(jnp.add, xs))

    def scaled_add(self, x: Array, residual: Array, scale: float, *, name: str | None = None) -> Array:
        """x + scale * residual; Keras calls the layer CustomScaleLayer."""
        name = self._name("CustomScaleLayer", name)
        return self._note("CustomScaleLayer", name, [x, residual], x + residual * scale)

    def multiply(self, xs: Sequence[Array], *, name: str | None = None) -> Array:
        """Multiply."""
        name = self._name("Multiply", name)
        return self._note("Multiply", name, xs, functools.reduce(jnp.multiply, xs))

    def operation(self, function: Callable[..., Array], *xs: Array) -> Array:
        """`function(*xs)`: what a Keras file says by an operator, which is no layer of the model."""
        return self._note(OPERATION, self._name(OPERATION, None), xs, function(*xs))

    def rescaling(
        self, x: Array, scale: float | Sequence[float], offset: float = 0.0, *, name: str | None = None
    ) -> Array:
        """Rescaling: x * scale + offset, in float32 at least."""
        name = self._name("Rescaling", name)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        return self._note("Rescaling", name, [x], (wide * of_channels(scale, x) + offset).astype(x.dtype))

    def concat(self, xs: Sequence[Array], *, room: int | None = None, name: str | None = None) -> Array:
        """Concatenate, over the channels.

        Where the first of `xs` grows to `room` channels by one concatenation after the other, it isn't copied by each:
        it lies in a buffer of that size, which each adds to. In training there is none, since each of its gradients
        would be as large.
        """
        name = self._name("Concatenate", name)
        if room is None or self._train:
            return self._note("Concatenate", name, xs, jnp.concatenate(xs, axis=-1))
        x, *others = xs
        if self._growing is not None and self._growing[0] is x:
            buffer = self._growing[1]
        else:  # x is a first one, or what the caller gave for the last
            buffer = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, room - x.shape[-1])))
        end = x.shape[-1]
        for other in others:
            buffer = lax.dynamic_update_slice_in_dim(buffer, other, end, axis=-1)
            end += other.shape[-1]
        joined = lax.slice_in_dim(buffer, 0, end, axis=-1)
        self._growing = joined, buffer
        return self._note("Concatenate", name, xs, joined)

    def flatten(self, x: Float[Array, "n ..."], *, name: str | None = None) -> Float[Array, "n c"]:
        """Flatten."""
        name = self._name("Flatten", name)
        return self._note("Flatten", name, [x], x.reshape(x.shape[0], -1))

    def reshape(self, x: Array, shape: tuple[int, ...], *, name: str | None = None) -> Array:
        """Reshape; the batch is left out of `shape`."""
        name = self._name("Reshape", name)
        return self._note("Reshape", name, [x], x.reshape(x.shape[0], *shape))

    def dropout(self, x: Array, rate: float, *, images: bool = False, name: str | None = None) -> Array:
        """Dropout, of single values or of whole `images`; in training it draws from the "dropout" stream of `rngs`."""
        name = self._name("Dropout", name)
        return self._note("Dropout", name, [x], self._dropped(x, rate, images, name), rate=rate)

    def stochastic_depth(self, x: Array, rate: float, *, name: str | None = None) -> Array:
        """StochasticDepth: drops whole images of a residual branch, in training."""
        name = self._name("StochasticDepth", name)
        return self._note("StochasticDepth", name, [x], self._dropped(x, rate, True, name))

    def _dropped(self, x: Array, rate: float, images: bool, name: str) -> Array:
        shared = tuple(range(1, x.ndim)) if images else ()
        return nn.Dropout(rate, broadcast_dims=shared, deterministic=not self.trains(name), name=name)(x)

    def correct_pad(self, x: Float[Array, "n h w c"], kernel: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The zero-padding before a VALID convolution of stride 2 in Keras's mobile families: by the input's parity.

        Keras decides when it builds the network; where it does not know the size then, it pads as for an even one.
        """
        half = kernel // 2
        even = [1 - n % 2 if self.known_size else 1 for n in x.shape[1:3]]
        return (half - even[0], half), (half - even[1], half)


@dataclasses.dataclass(frozen=True)
class Head:
    """A new classifier for a pretrained backbone: pooling, a hidden layer if wanted, dropout, the classes.

    Keras's GlobalAveragePooling2D, Dense (relu), Dropout, and a Dense named "predictions".

    Attributes:
        pooling: "avg" or "max", over the last feature map.
        hidden: units of the hidden layer; None for no such layer.
        dropout: rate before the last layer.

    Raises:
        ValueError: one of these can't be honoured.
    """

    pooling: str = "avg"
    hidden: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        """Check the options."""
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"pooling={self.pooling!r} given, 'avg' or 'max' expected")
        if self.hidden is not None:
            check_like_default("hidden", self.hidden, 1)
        check_like_default("dropout", self.dropout, 0.0)

    def __call__(
        self, k: Layers, x: Float[Array, "n c"], classes: int, activation: Activation
    ) -> Float[Array, "n classes"]:
        """Apply the layers after the pooling."""
        if self.hidden is not None:
            x = k.dense(x, self.hidden, activation="relu")
        if self.dropout:
            x = k.dropout(x, self.dropout)
        return k.dense(x, classes, activation=activation, name="predictions")


class Classifier(nn.Module):
    """An image classifier of keras.applications: images (N, H, W, C) in, class probabilities or features out.

    Called as any Flax module: `module.apply(variables, images, train=False)`. With `train=True` it needs
    `mutable=["batch_stats"]`, and `rngs={"dropout": key}` where the family drops out. `train=frozenset(names)` has
    these layers behave so, and the others as in inference: what Keras's `trainable` does to a BatchNormalization.

    Attributes:
        include_top: whether the classifier at the end is part of the network.
        classes: number of outputs of the classifier.
        pooling: without the top, what follows the last block: None for the feature map, "avg" or "max" for a vector.
        classifier_activation: of the last layer: a name of Keras's, a callable, or None for logits. The classifier's
            output is computed in float32, whatever `dtype` is.
        input_shape: (height, width, channels); height and width may be None. When given, other images are refused.
            Left out, RGB images of any size from the family's minimum up are taken (only VGG's top fixes one).
            As in Keras, a network built without the top and without a size pads for even sizes where parity matters
            (MobileNetV2): give the size for one that follows an odd input.
        dtype: of the computation; parameters are float32.
        head: a new classifier in place of the family's own; needs the top.
        prepared: not an option: what `optimize_for_inference` did.

    Raises:
        ValueError: an argument, or the shape of the images, can't be honoured.
    """

    include_top: bool = True
    classes: int = 1000
    pooling: str | None = None
    classifier_activation: Activation = "softmax"
    input_shape: tuple[int | None, int | None, int] | None = None
    dtype: Any = jnp.float32
    head: Head | None = None
    prepared: Prepared | None = None

    # Facts of a family; not options.
    default_size = 224
    min_size = 32
    fixed_size = False  # the top flattens, so its weights fix the size of the input
    top_pool: ClassVar[str | None] = None  # Keras's name of the pooling in the top; None where Keras numbers it
    weightless: ClassVar[tuple[str, ...]] = ()  # options that change no array, and not what arrays mean
    named_pools = False  # whether the pooling without the top is called avg_pool or max_pool, or numbered
    micro_batch = 4  # how many images a CPU computes together at best, by benchmarks/micro_batches.py

    def __post_init__(self):
        """Check the options, so that what can't be honoured fails here and not in the middle of a trace."""
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), (list, np.ndarray)):  # a module must be hashable
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        self.check_options()
        super().__post_init__()

    @nn.nowrap
    def check_options(self) -> None:
        """Raise ValueError for an option that can't be honoured; a family adds its own."""
        common = {field.name for field in dataclasses.fields(Classifier)}
        for field in dataclasses.fields(self):
            optional = getattr(self, field.name) is None and str(field.type).endswith("| None")
            if field.name not in common and not optional:
                check_like_default(field.name, getattr(self, field.name), field.default)
        check_common_options(self)

    @staticmethod
    def current_name(old: str) -> str:
        """Today's name of a layer that older files of the family call otherwise."""
        return old

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """All layers up to the last feature map; what a family defines."""
        raise NotImplementedError

    def top(self, k: Layers, x: Float[Array, "n ho wo f"]) -> Float[Array, "n classes"]:
        """The classifier on top of the last feature map; most families share this one."""
        x = k.global_avg_pool(x, name=self.top_pool)
        return k.dense(x, self.classes, activation=self.probabilities, name="predictions")

    def pooled(self, k: Layers, x: Float[Array, "n ho wo f"], pooling: str | None) -> Float[Array, "n ..."]:
        """What takes the top's place without it; most families share this one, too."""
        if pooling == "avg":
            return k.global_avg_pool(x, name="avg_pool" if self.named_pools else None)
        if pooling == "max":
            return k.global_max_pool(x, name="max_pool" if self.named_pools else None)
        return x

    def probabilities(self, logits: Float[Array, "n classes"]) -> Float[Array, "n classes"]:
        """`classifier_activation`, computed in float32 at least."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return activation_function(self.classifier_activation)(logits)

    @property
    def known_size(self) -> bool:
        """Whether Keras would know the input's height and width when it builds this network."""
        return self.own_top if self.input_shape is None else None not in self.input_shape

    @property
    def own_top(self) -> bool:
        """Whether the classifier is the family's own."""
        return self.include_top and self.head is None

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image that this network takes: `input_shape`, or the family's default."""
        height, width, channels = self.input_shape or (None, None, 3)
        return height or self.default_size, width or self.default_size, channels

    def check_images(self, shape: tuple[Any, ...]) -> None:
        """Raise ValueError unless images of this shape, in which `jax.export` may leave sides open, can be taken."""
        wanted = self.example_shape if self.fixed_size and self.own_top else self.input_shape
        wanted = wanted or (None, None, 3)
        if len(shape) != 4 or any(w not in (None, s) for w, s in zip(wanted, shape[1:], strict=True)):
            sizes = ["any" if w is None else str(w) for w in wanted]
            raise ValueError(f"images of shape {shape} given, (N, H, W, C) with H, W, C = {', '.join(sizes)} expected")
        if min(shape[1:3]) < self.min_size:
            raise ValueError(
                f"images of {shape[1]} x {shape[2]} given, {type(self).__name__} takes "
                f"{self.min_size} x {self.min_size} at the least"
            )

    @nn.compact
    def run(
        self,
        x: Float[Array | np.ndarray, "n h w c"],
        train: Training = False,
        taps: Sequence[str] = (),
        given: Mapping[str, Array] | None = None,
        record: bool = False,
    ) -> tuple[Array, Layers]:
        """The forward pass: its output, and the `Layers` that kept what was asked for.

        The outputs of layers that are `given` are not computed, nor what they alone need, once XLA has seen it.
        """
        self.check_images(x.shape)
        if train and self.prepared:
            raise ValueError("train=True given, but optimize_for_inference made this network: train the plain one")
        k = Layers(
            train=train,
            dtype=self.dtype,
            known_size=self.known_size,
            taps=taps,
            given=given,
            record=record,
            prepared=self.prepared,
        )
        x = self.backbone(k, k.input(jnp.asarray(x, self.dtype)))
        if not self.include_top:
            y = self.pooled(k, x, self.pooling)
        elif self.head is None:
            y = self.top(k, x)
        else:
            y = self.head(k, self.pooled(k, x, self.head.pooling), self.classes, self.probabilities)
        for name in k.not_given():
            raise ValueError(unknown("layer", name, layer_names(self)))
        return y, k

    def __call__(self, x: Float[Array | np.ndarray, "n h w c"], train: Training = False) -> Array:
        """Class probabilities (N, classes); without the top, features (N, H', W', F), or (N, F) if pooled."""
        return self.run(x, train)[0]

    def endpoints(
        self, x: Float[Array | np.ndarray, "n h w c"], layers: Sequence[str], train: Training = False
    ) -> dict[str, Float[Array, "n ..."]]:
        """The outputs of Keras layers by name; XLA drops what none of them needs.

        `module.apply(variables, x, ("mixed8",), method="endpoints")`, or called as a submodule.

        Raises:
            ValueError: the network has no layer of that name.
        """
        gone = dict(self.prepared.gone) if self.prepared else {}
        for name in layers:
            if name in gone:
                raise ValueError(
                    f"layer {name!r} is gone: optimize_for_inference folded it with others into one, whose output is "
                    f"that of {gone[name]!r}; tap this, or the plain network"
                )
        _, k = self.run(x, train, layers)
        for name in layers:
            if name not in k.tapped:
                raise ValueError(unknown("layer", name, layer_names(self)))
        return {name: k.tapped[name] for name in layers}


def check_like_default(name: str, value: Any, default: Any) -> None:
    """Raise ValueError unless a family's option is of its default's kind, and positive."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "True or False"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str) and bool(value), "a name"
    elif name == "dropout" or name.endswith("_rate"):
        fits, wanted = number and 0 <= float(value) < 1, "a rate from 0 to less than 1"
    elif isinstance(default, tuple) and isinstance(default[0], tuple):  # rows of a table
        row = type(default[0])
        fits = isinstance(value, tuple) and len(value) > 0 and all(isinstance(each, row) for each in value)
        wanted = f"a tuple of {row.__name__}"
    elif isinstance(default, tuple):
        fits = isinstance(value, tuple) and len(value) == len(default) and all(is_count(n) for n in value)
        wanted = f"{len(default)} positive integers"
    elif isinstance(default, int):
        fits, wanted = is_count(value), "a positive integer"
    else:
        fits, wanted = number and 0 < float(value) < float("inf"), "a positive number"
    if not fits:
        raise ValueError(f"{name}={value!r} given, {wanted} expected")


def is_count(value: Any) -> bool:
    """Whether this is a positive integer."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def check_common_options(module: Classifier) -> None:
    """Raise ValueError for an option of every family that can't be honoured."""
    shape, family = module.input_shape, type(module).__name__
    if not isinstance(module.include_top, bool):
        raise ValueError(f"include_top={module.include_top!r} given, True or False expected")
    if module.pooling not in (None, "avg", "max"):
        raise ValueError(f"pooling={module.pooling!r} given, None, 'avg' or 'max' expected")
    if not (module.head is None or isinstance(module.head, Head)):
        raise ValueError(f"head={module.head!r} given, a fzoo.Head or None expected")
    if module.head is not None and not module.include_top:
        raise ValueError("head goes with include_top=True: it is the classifier")
    if module.pooling and module.include_top:
        raise ValueError(f"pooling={module.pooling!r} goes with include_top=False: the top pools already")
    if not is_count(module.classes):
        raise ValueError(f"classes={module.classes!r} given, a positive integer expected")
    if module.default_size < module.min_size:
        raise ValueError(f"default_size={module.default_size} given, {module.min_size} or more expected")
    activation_function(module.classifier_activation)
    try:
        floating = jnp.issubdtype(jnp.dtype(module.dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"dtype={module.dtype!r} given, a floating dtype expected, e.g. jnp.bfloat16")
    if shape is None:
        return
    three = isinstance(shape, tuple) and len(shape) == 3 and is_count(shape[2])
    if not three or not all(n is None or isinstance(n, Integral) for n in shape):
        raise ValueError(f"input_shape={shape!r} given, (height, width, channels) expected")
    if any(n is not None and n < module.min_size for n in shape[:2]):
        least = f"{module.min_size} x {module.min_size}"
        raise ValueError(f"input_shape={shape} given, {least} is the least that {family} takes")
    if module.fixed_size and module.own_top and None in shape:
        raise ValueError(f"input_shape={shape} given, {family} with its top needs a fixed size")


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one abstract call of a network shows.

    Attributes:
        nodes: its Keras layers, in Keras's order of `model.layers`, and the operations between them.
        variables: its variables as `jax.ShapeDtypeStruct`s.
    """

    nodes: tuple[Node, ...]
    variables: dict[str, Any]

    @property
    def layers(self) -> list[Node]:
        """The Keras layers alone: `model.layers`."""
        return [node for node in self.nodes if node.kind != OPERATION]

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """How many each node has, by its name; BN statistics count, as in Keras."""
        trees = self.variables.values()
        return {
            node.name: sum(leaf.size for tree in trees for leaf in jax.tree.leaves(tree.get(node.name)))
            for node in self.nodes
        }


def trace(module: Classifier) -> Trace:
    """Call the network abstractly (no arithmetic is done) and read the record.

    Raises:
        ValueError: this is no network of this package.
    """
    if not isinstance(module, Classifier):
        raise ValueError(f"a module from fzoo.create expected, {type(module).__name__} given")
    unbound: Any = module.clone(parent=None, name=None)  # a bound module can't be hashed
    return _trace(unbound)


@functools.lru_cache(maxsize=128)
def _trace(module: Classifier) -> Trace:
    found: list[Node] = []

    def call(x):
        (_, k), variables = module.init_with_output(jax.random.key(0), x, record=True, method="run")
        found.extend(k.nodes.values())
        return variables

    variables = jax.eval_shape(call, jax.ShapeDtypeStruct((1, *module.example_shape), jnp.float32))
    return Trace(tuple(keras_order(found)), variables)


def keras_order(nodes: Sequence[Node]) -> list[Node]:
    """Sort a network's layers as Keras does.

    Deepest first, the depth being the longest way to the output; among equals, the one that a walk from
    the output, inputs in order, meets first. `nodes` come in an order of execution, the output last.
    """
    by_name = {node.name: node for node in nodes}
    depth = {nodes[-1].name: 0}
    for node in reversed(nodes):
        for parent in node.inputs:
            depth[parent] = max(depth.get(parent, 0), depth.get(node.name, 0) + 1)
    met: dict[str, int] = {}
    stack = [nodes[-1].name]
    while stack:
        name = stack.pop()
        if name not in met:
            met[name] = len(met)
            stack.extend(reversed(by_name[name].inputs))
    return [by_name[name] for name in sorted(met, key=lambda n: (-depth[n], met[n]))]


def random_variables(module: Classifier, rng: Array) -> dict[str, Any]:
    """Variables as Keras initialises them, drawn on the host, so that nothing has to be compiled.

    Of the same distributions as `module.init(rng, images)`, but not the same numbers.
    """
    if not isinstance(rng, (jax.Array, np.ndarray)):
        raise ValueError(f"rng={rng!r} given, a key expected: jax.random.key(0)")
    found = trace(module)
    known = {node.name: node for top in found.nodes for node in (top, *top.parts)}
    data = jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
    generator = np.random.default_rng(np.asarray(data).ravel().tolist())

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [step.key for step in path]
        node = next(known[key] for key in reversed(keys) if key in known)
        if keys[-1] == "kernel":
            return node.kernel_init.draw(generator, leaf.shape)
        value = node.config["init"] if keys[-1] == "gamma" else keys[-1] in ("scale", "var")
        return np.full(leaf.shape, value, leaf.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, found.variables))


def layer_names(module: Classifier) -> list[str]:
    """Every Keras layer of the network, the input and those without weights too, in Keras's order.

    `layer_names(module)[249]` is the name of Keras's `model.layers[249]`.
    """
    gone = dict(module.prepared.gone) if isinstance(module, Classifier) and module.prepared else {}
    return [node.name for node in trace(module).layers if node.name not in gone]


def of_channels(constant: float | Sequence[float], x: Array) -> np.ndarray:
    """A constant for each channel, or for all, as an array of x's rank."""
    return np.reshape(np.asarray(constant, np.float32), (1,) * (x.ndim - 1) + (-1,))


def pair(n: int | tuple[int, int]) -> tuple[int, int]:
    """Both spatial values of a size given as one number or two."""
    return (n, n) if isinstance(n, int) else n


def lax_padding(padding: Padding) -> str | tuple[tuple[int, int], tuple[int, int]]:
    """Keras's "same" and "valid" are lax's "SAME" and "VALID"."""
    return padding.upper() if isinstance(padding, str) else padding


def snake_case(kind: str) -> str:
    """Keras's snake case of a class name: "Conv2D" gives "conv2d", "ReLU" gives "re_lu"."""
    kind = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)
    return re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round a number of channels to a multiple of `divisor`, but never down by more than 10 %.

    From the MobileNet reference code, as Keras has it.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
