"""How Keras defines a layer, said once for every family.

A family (fzoo/models/) is a subclass of `Classifier` whose `backbone` calls the methods of a `Layers` object,
one for each Keras layer. `Layers` gives the layer its Keras name (which is its name in the parameter tree),
applies stock Flax layers with Keras's defaults, and keeps what was asked for: the outputs to tap, or the record of
the whole call graph, from which `trace` derives Keras's order of layers.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fzoo import ops
from fzoo.layers.activations import ACTIVATIONS, Activation, activation_function, name_of
from fzoo.layers.conventions import Padding, lax_padding, of_channels, pair, snake_case
from fzoo.layers.initializers import VarianceScaling, glorot_uniform
from fzoo.layers.modules import (
    BatchNorm,
    Conv,
    Dense,
    LayerNorm,
    LayerScale,
    Normalization,
    ScaleShift,
    SeparableConv,
    Sequential,
    WinogradConv,
)
from fzoo.layers.record import OPERATION, Node, Prepared

#: What behaves as in training (batch statistics, dropout): all or nothing, or the layers of these names.
Training = bool | frozenset[str]


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
        self.names: list[str] = []
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
        """Tell whether a layer behaves as in training."""
        return self._train if isinstance(self._train, bool) else name in self._train

    def _start(self, kernel_init: VarianceScaling) -> Callable[..., Array]:
        """Choose how kernels start; a record has no use for their values."""
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
        if kind != OPERATION:
            self.names.append(name)
        if self._record:
            if any(y is x for x in inputs):  # an identity (dropout outside training) is a layer of its own, too
                y = jnp.copy(y)
            if not all(id(x) in self._producer for x in inputs):
                raise ValueError(f"{name}: its input was made by no layer; `operation` makes a step of the graph of it")
            parents = tuple(self._producer[id(x)][0] for x in inputs)
            self.nodes[name] = Node(name, kind, parents, y.shape[1:], flops, kernel_init, config, parts)
            self._producer[id(y)] = (name, y)
        if name in self._given:
            y = self.given(name, y)
        if name in self._taps:
            self.tapped[name] = y
        return y

    def not_given(self) -> list[str]:
        """List the names of what the caller gave that no layer has."""
        return list(self._given)

    def given(self, name: str, y: Array) -> Array:
        """Take what the caller gave for the output of a layer; once, so that the unknown names are left."""
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
        """Apply Conv2D."""
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
            "Conv2D", name, [x], y, shape.flops, kernel_init, activation=name_of(activation), convolution=shape
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
        """Apply DepthwiseConv2D. Output c * depth_multiplier + j reads input channel c."""
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
        """Apply SeparableConv2D without a bias."""
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
        """Apply Dense, over the last axis."""
        name = self._name("Dense", name)
        dense = Dense(features, dtype=self.dtype, kernel_init=self._start(kernel_init), name=name)
        y = activation_function(activation)(dense(x))
        flops = 2 * x.shape[-1] * int(np.prod(y.shape[1:]))
        return self._note("Dense", name, [x], y, flops, kernel_init, activation=name_of(activation))

    def batch_norm(
        self,
        x: Float[Array, "n ... c"],
        *,
        epsilon: float = 1e-3,
        momentum: float = 0.99,
        scale: bool = True,
        name: str | None = None,
    ) -> Float[Array, "n ... c"]:
        """Apply BatchNormalization over the last axis, with Keras's epsilon and momentum."""
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
        """Apply LayerNormalization over the last axis, with Keras's epsilon."""
        name = self._name("LayerNormalization", name)
        y = LayerNorm(epsilon, dtype=self.dtype, use_fast_variance=False, name=name)(x)
        return self._note("LayerNormalization", name, [x], y)

    def layer_scale(
        self, x: Float[Array, "n ... c"], init: float, *, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """Apply LayerScale: a factor for each channel, at first `init`."""
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
        """Apply Normalization of the channels, by constants, or by values that come with the weights."""
        name = self._name("Normalization", name)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        if mean is None or variance is None:
            y = Normalization(name=name)(wide)
        else:
            y = (wide - of_channels(mean, x)) / np.sqrt(of_channels(variance, x))
        return self._note("Normalization", name, [x], y.astype(x.dtype))

    def sequential(self, x: Array, layers: Callable[[Layers, Array], Array], *, name: str | None = None) -> Array:
        """Apply Sequential: what `layers(k, x)` calls, under one name.

        `layers` is no module's method: Flax would lead those variables to that module.
        """
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
        """Note the InputLayer."""
        return self._note("InputLayer", self._name("InputLayer", None), [], x)

    def activation(self, x: Array, function: Activation, *, name: str | None = None) -> Array:
        """Apply Activation."""
        name = self._name("Activation", name)
        y = activation_function(function)(x)
        return self._note("Activation", name, [x], y, activation=name_of(function))

    def relu(self, x: Array, max_value: float | None = None, *, name: str | None = None) -> Array:
        """Apply ReLU, clipped at `max_value`."""
        name = self._name("ReLU", name)
        y = ACTIVATIONS["relu"](x) if max_value is None else jnp.clip(x, 0, max_value)
        return self._note("ReLU", name, [x], y)

    def zero_pad(
        self, x: Float[Array, "n h w c"], padding: int | tuple[tuple[int, int], ...], *, name: str | None = None
    ) -> Float[Array, "n hp wp c"]:
        """Apply ZeroPadding2D."""
        name = self._name("ZeroPadding2D", name)
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        return self._note("ZeroPadding2D", name, [x], jnp.pad(x, ((0, 0), *padding, (0, 0))))

    def crop(
        self, x: Float[Array, "n h w c"], cropping: tuple[tuple[int, int], tuple[int, int]], *, name: str | None = None
    ) -> Float[Array, "n hc wc c"]:
        """Apply Cropping2D."""
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
        """Apply MaxPooling2D; padding never wins. `strides` defaults to the window."""
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
        """Apply AveragePooling2D; padding is not counted. `strides` defaults to the window."""
        name = self._name("AveragePooling2D", name)
        how = ops.Pool("avg", pair(window), pair(strides or window), padding.upper())
        return self._note("AveragePooling2D", name, [x], ops.pool(how, x))

    def global_avg_pool(
        self, x: Float[Array, "n h w c"], *, keepdims: bool = False, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """Apply GlobalAveragePooling2D."""
        name = self._name("GlobalAveragePooling2D", name)
        return self._note("GlobalAveragePooling2D", name, [x], jnp.mean(x, (1, 2), keepdims=keepdims))

    def global_max_pool(self, x: Float[Array, "n h w c"], *, name: str | None = None) -> Float[Array, "n c"]:
        """Apply GlobalMaxPooling2D."""
        name = self._name("GlobalMaxPooling2D", name)
        return self._note("GlobalMaxPooling2D", name, [x], jnp.max(x, (1, 2)))

    def add(self, xs: Sequence[Array], *, name: str | None = None) -> Array:
        """Apply Add."""
        name = self._name("Add", name)
        return self._note("Add", name, xs, functools.reduce(jnp.add, xs))

    def scaled_add(self, x: Array, residual: Array, scale: float, *, name: str | None = None) -> Array:
        """Compute x + scale * residual; Keras calls the layer CustomScaleLayer."""
        name = self._name("CustomScaleLayer", name)
        return self._note("CustomScaleLayer", name, [x, residual], x + residual * scale)

    def multiply(self, xs: Sequence[Array], *, name: str | None = None) -> Array:
        """Apply Multiply."""
        name = self._name("Multiply", name)
        return self._note("Multiply", name, xs, functools.reduce(jnp.multiply, xs))

    def operation(self, function: Callable[..., Array], *xs: Array) -> Array:
        """Compute `function(*xs)`: what a Keras file says by an operator, which is no layer of the model."""
        return self._note(OPERATION, self._name(OPERATION, None), xs, function(*xs))

    def rescaling(
        self, x: Array, scale: float | Sequence[float], offset: float = 0.0, *, name: str | None = None
    ) -> Array:
        """Apply Rescaling: x * scale + offset, in float32 at least."""
        name = self._name("Rescaling", name)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        return self._note("Rescaling", name, [x], (wide * of_channels(scale, x) + offset).astype(x.dtype))

    def concat(self, xs: Sequence[Array], *, room: int | None = None, name: str | None = None) -> Array:
        """Apply Concatenate, over the channels.

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
        """Apply Flatten."""
        name = self._name("Flatten", name)
        return self._note("Flatten", name, [x], x.reshape(x.shape[0], -1))

    def reshape(self, x: Array, shape: tuple[int, ...], *, name: str | None = None) -> Array:
        """Apply Reshape; the batch is left out of `shape`."""
        name = self._name("Reshape", name)
        return self._note("Reshape", name, [x], x.reshape(x.shape[0], *shape))

    def dropout(self, x: Array, rate: float, *, images: bool = False, name: str | None = None) -> Array:
        """Apply Dropout, to single values or to whole `images`; in training it draws from "dropout" of `rngs`."""
        name = self._name("Dropout", name)
        return self._note("Dropout", name, [x], self._dropped(x, rate, images, name), rate=rate)

    def stochastic_depth(self, x: Array, rate: float, *, name: str | None = None) -> Array:
        """Apply StochasticDepth: drop whole images of a residual branch, in training."""
        name = self._name("StochasticDepth", name)
        return self._note("StochasticDepth", name, [x], self._dropped(x, rate, True, name))

    def _dropped(self, x: Array, rate: float, images: bool, name: str) -> Array:
        shared = tuple(range(1, x.ndim)) if images else ()
        return nn.Dropout(rate, broadcast_dims=shared, deterministic=not self.trains(name), name=name)(x)

    def correct_pad(self, x: Float[Array, "n h w c"], kernel: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the zero-padding before a VALID convolution of stride 2 in Keras's mobile families, by parity.

        Keras decides when it builds the network; where it does not know the size then, it pads as for an even one.
        """
        half = kernel // 2
        even = [1 - n % 2 if self.known_size else 1 for n in x.shape[1:3]]
        return (half - even[0], half), (half - even[1], half)
