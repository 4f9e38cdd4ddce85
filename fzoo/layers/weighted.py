"""The Keras layers that have weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fzoo import ops
from fzoo.layers.activations import Activation, activation_function, name_of
from fzoo.layers.conventions import Padding, of_channels, pair
from fzoo.layers.forward import ForwardPass
from fzoo.layers.initializers import VarianceScaling, glorot_uniform
from fzoo.layers.modules import (
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    GroupNorm,
    LayerNorm,
    LayerScale,
    Normalization,
    PReLU,
    ScaleShift,
    SeparableConv,
    Sequential,
    WinogradConv,
)


class WeightedLayers(ForwardPass):
    """Methods that apply a layer with weights."""

    def conv2d(
        self,
        x: Float[Array, "n h w c"],
        features: int,
        kernel: int | tuple[int, int],
        strides: int | tuple[int, int] = 1,
        padding: Padding = "valid",
        *,
        groups: int = 1,
        dilation: int | tuple[int, int] = 1,
        use_bias: bool = True,
        activation: Activation = None,
        kernel_init: VarianceScaling = glorot_uniform,
        name: str | None = None,
    ) -> Float[Array, "n ho wo f"]:
        """Apply Conv2D."""
        name = self._name("Conv2D", name)
        kernel = pair(kernel)
        steps, pads, apart, axes = self._dense_windows(x, kernel, strides, padding, dilation)
        use_bias = use_bias or name in self._prepared.biased
        if name in self._tiles:
            if (steps, apart) != ((1, 1), (1, 1)):
                raise ValueError(
                    f"output_stride={self.output_stride} given, for which {name} was not prepared: "
                    "optimize_for_inference the network that has it"
                )
            arguments = (features, kernel, pads, self._tiles[name], self.dtype, use_bias)
            conv = self._module(name, functools.partial(WinogradConv, *arguments, name=name))
        else:
            make = functools.partial(
                self._conv_of(name),
                features,
                kernel,
                steps,
                padding=pads,
                kernel_dilation=apart,
                feature_group_count=groups,
                use_bias=use_bias,
                kernel_init=self._start(kernel_init),
                name=name,
            )
            conv = self._module(name, make)
        y = activation_function(activation)(conv(x))
        terms = x.shape[-1] // groups
        flops = self._flops(*y.shape[1:], *kernel, terms)
        shape = (*kernel, terms, features)
        convolution = ops.Convolution.of((1, *x.shape[1:]), shape, steps, pads, groups, dilation=apart)
        options = {"activation": name_of(activation), "convolution": convolution}
        return self._note("Conv2D", name, [x], y, flops, kernel_init, axes=axes, **options)

    def depthwise_conv2d(
        self,
        x: Float[Array, "n h w c"],
        kernel: int | tuple[int, int],
        strides: int | tuple[int, int] = 1,
        padding: Padding = "valid",
        *,
        depth_multiplier: int = 1,
        dilation: int | tuple[int, int] = 1,
        use_bias: bool = True,
        activation: Activation = None,
        kernel_init: VarianceScaling = glorot_uniform,
        name: str | None = None,
    ) -> Float[Array, "n ho wo cm"]:
        """Apply DepthwiseConv2D. Output c * depth_multiplier + j reads input channel c."""
        name = self._name("DepthwiseConv2D", name)
        channels, kernel = x.shape[-1], pair(kernel)
        steps, pads, apart, axes = self._dense_windows(x, kernel, strides, padding, dilation)
        make = functools.partial(
            self._conv_of(name),
            channels * depth_multiplier,
            kernel,
            steps,
            padding=pads,
            kernel_dilation=apart,
            feature_group_count=channels,
            use_bias=use_bias or name in self._prepared.biased,
            kernel_init=self._start(kernel_init),
            name=name,
        )
        y = activation_function(activation)(self._module(name, make)(x))
        flops = self._flops(*y.shape[1:], *kernel)
        shape = (*kernel, 1, y.shape[-1])
        convolution = ops.Convolution.of((1, *x.shape[1:]), shape, steps, pads, channels, dilation=apart)
        options = {"activation": name_of(activation), "strides": steps, "padding": pads, "convolution": convolution}
        return self._note("DepthwiseConv2D", name, [x], y, flops, kernel_init, axes=axes, **options)

    def separable_conv2d(
        self,
        x: Float[Array, "n h w c"],
        features: int,
        kernel: int | tuple[int, int],
        strides: int | tuple[int, int] = 1,
        padding: str = "valid",
        *,
        depth_multiplier: int = 1,
        dilation: int | tuple[int, int] = 1,
        use_bias: bool = False,
        activation: Activation = None,
        name: str | None = None,
    ) -> Float[Array, "n ho wo f"]:
        """Apply SeparableConv2D, which has no bias here unless one is asked for."""
        name = self._name("SeparableConv2D", name)
        kernel, channels = pair(kernel), x.shape[-1] * depth_multiplier
        steps, pads, apart, axes = self._dense_windows(x, kernel, strides, padding, dilation)
        make = functools.partial(
            SeparableConv,
            features,
            kernel,
            steps,
            pads,
            self._conv_of(f"{name}/depthwise"),
            self._conv_of(f"{name}/pointwise"),
            use_bias or name in self._prepared.biased,
            depth_multiplier,
            apart,
            name=name,
        )
        y = activation_function(activation)(self._module(name, make)(x))
        flops = self._flops(*y.shape[1:3], channels, kernel[0] * kernel[1] + features)
        depthwise = ops.Convolution.of(
            (1, *x.shape[1:]), (*kernel, 1, channels), steps, pads, x.shape[-1], dilation=apart
        )
        pointwise = ops.Convolution.of((1, *y.shape[1:3], channels), (1, 1, channels, features), (1, 1), "VALID")
        options = {"activation": name_of(activation), "strides": steps, "padding": pads}
        options |= {"depthwise": depthwise, "pointwise": pointwise}
        return self._note("SeparableConv2D", name, [x], y, flops, axes=axes, **options)

    def conv2d_transpose(
        self,
        x: Float[Array, "n h w c"],
        features: int,
        kernel: int | tuple[int, int],
        strides: int | tuple[int, int] = 1,
        padding: str = "valid",
        *,
        output_padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        use_bias: bool = True,
        activation: Activation = None,
        name: str | None = None,
    ) -> Float[Array, "n ho wo f"]:
        """Apply Conv2DTranspose."""
        name = self._name("Conv2DTranspose", name)
        sides = pair(kernel), pair(strides), pair(dilation), pair(-1 if output_padding is None else output_padding)
        pads = tuple(transposed_padding(*side, padding) for side in zip(*sides, strict=True))
        arguments = (features, *sides[:2], pads, sides[2], use_bias, self.dtype, self._start(glorot_uniform))
        module = self._module(name, functools.partial(ConvTranspose, *arguments, name=name))
        y = activation_function(activation)(module(x))
        flops = self._flops(*x.shape[1:], *sides[0], features)
        return self._note("Conv2DTranspose", name, [x], y, flops, activation=name_of(activation))

    def conv1d(
        self,
        x: Float[Array, "n l c"],
        features: int,
        kernel: int,
        strides: int = 1,
        padding: str = "valid",
        *,
        groups: int = 1,
        dilation: int = 1,
        use_bias: bool = True,
        activation: Activation = None,
        name: str | None = None,
    ) -> Float[Array, "n lo f"]:
        """Apply Conv1D; "causal" padding is before the first step alone."""
        name = self._name("Conv1D", name)
        conv = self._conv1d(features, kernel, strides, padding, groups, dilation, use_bias, name)
        y = activation_function(activation)(conv(x))
        flops = self._flops(*y.shape[1:], kernel, x.shape[-1] // groups)
        return self._note("Conv1D", name, [x], y, flops, activation=name_of(activation))

    def depthwise_conv1d(
        self,
        x: Float[Array, "n l c"],
        kernel: int,
        strides: int = 1,
        padding: str = "valid",
        *,
        depth_multiplier: int = 1,
        dilation: int = 1,
        use_bias: bool = True,
        activation: Activation = None,
        name: str | None = None,
    ) -> Float[Array, "n lo cm"]:
        """Apply DepthwiseConv1D."""
        name, channels = self._name("DepthwiseConv1D", name), x.shape[-1]
        conv = self._conv1d(channels * depth_multiplier, kernel, strides, padding, channels, dilation, use_bias, name)
        y = activation_function(activation)(conv(x))
        flops = self._flops(*y.shape[1:], kernel)
        return self._note("DepthwiseConv1D", name, [x], y, flops, activation=name_of(activation))

    def separable_conv1d(
        self,
        x: Float[Array, "n l c"],
        features: int,
        kernel: int,
        strides: int = 1,
        padding: str = "valid",
        *,
        depth_multiplier: int = 1,
        dilation: int = 1,
        use_bias: bool = True,
        activation: Activation = None,
        name: str | None = None,
    ) -> Float[Array, "n lo f"]:
        """Apply SeparableConv1D."""
        name, channels = self._name("SeparableConv1D", name), x.shape[-1] * depth_multiplier
        conv = functools.partial(Conv, dtype=self.dtype, param_dtype=self.param_dtype, padding="VALID", use_bias=False)
        conv = functools.partial(conv, kernel_init=self._start(glorot_uniform))
        sides = (features, (kernel,), (strides,), padding.upper())
        arguments = (*sides, conv, conv, use_bias, depth_multiplier, (dilation,))
        module = self._module(name, functools.partial(SeparableConv, *arguments, name=name))
        y = activation_function(activation)(module(x))
        flops = self._flops(y.shape[1], channels, kernel + features)
        return self._note("SeparableConv1D", name, [x], y, flops, activation=name_of(activation))

    def _conv1d(
        self,
        features: int,
        kernel: int,
        strides: int,
        padding: str,
        groups: int,
        dilation: int,
        use_bias: bool,
        name: str,
    ) -> Conv:
        make = functools.partial(
            Conv,
            features,
            (kernel,),
            (strides,),
            padding=((dilation * (kernel - 1), 0),) if padding == "causal" else padding.upper(),
            kernel_dilation=(dilation,),
            feature_group_count=groups,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=self._start(glorot_uniform),
            name=name,
        )
        return self._module(name, make)

    def dense(
        self,
        x: Float[Array, "n ... c"],
        features: int,
        *,
        use_bias: bool = True,
        activation: Activation = None,
        kernel_init: VarianceScaling = glorot_uniform,
        name: str | None = None,
    ) -> Float[Array, "n ... f"]:
        """Apply Dense, over the last axis."""
        name = self._name("Dense", name)
        use_bias = use_bias or name in self._prepared.biased
        options = {"use_bias": use_bias, "dtype": self.dtype, "kernel_init": self._start(kernel_init), "name": name}
        dense = self._module(name, functools.partial(Dense, features, **options))
        y = activation_function(activation)(dense(x))
        flops = self._flops(x.shape[-1], *y.shape[1:])
        return self._note("Dense", name, [x], y, flops, kernel_init, activation=name_of(activation))

    def batch_norm(
        self,
        x: Float[Array, "n ... c"],
        *,
        epsilon: float = 1e-3,
        momentum: float = 0.99,
        scale: bool = True,
        center: bool = True,
        name: str | None = None,
    ) -> Float[Array, "n ... c"]:
        """Apply BatchNormalization over the last axis, with Keras's epsilon and momentum."""
        name = self._name("BatchNormalization", name)
        if name in self._prepared.folded:
            y = x
        elif name in self._prepared.scaled:
            y = self._module(name, functools.partial(ScaleShift, self.dtype, name=name))(x)
        else:
            arguments = (self.trains(name), epsilon, momentum, scale, self.dtype, center, self.axis_name)
            y = self._module(name, functools.partial(BatchNorm, *arguments, name=name))(x)
        return self._note("BatchNormalization", name, [x], y, epsilon=epsilon)

    def layer_norm(
        self,
        x: Float[Array, "n ... c"],
        *,
        epsilon: float = 1e-3,
        scale: bool = True,
        center: bool = True,
        axes: tuple[int, ...] = (-1,),
        name: str | None = None,
    ) -> Float[Array, "n ... c"]:
        """Apply LayerNormalization over the last axis, or over these, with Keras's epsilon."""
        name = self._name("LayerNormalization", name)
        options = {"dtype": self.dtype, "use_scale": scale, "use_bias": center, "use_fast_variance": False}
        options |= {"reduction_axes": axes, "feature_axes": axes}
        y = self._module(name, functools.partial(LayerNorm, epsilon, name=name, **options))(x)
        return self._note("LayerNormalization", name, [x], y, epsilon=epsilon)

    def group_norm(
        self,
        x: Float[Array, "n ... c"],
        groups: int = 32,
        *,
        epsilon: float = 1e-3,
        scale: bool = True,
        center: bool = True,
        name: str | None = None,
    ) -> Float[Array, "n ... c"]:
        """Apply GroupNormalization over the last axis; -1 `groups` are as many as channels."""
        name, channels = self._name("GroupNormalization", name), x.shape[-1]
        groups = channels if groups == -1 else groups
        if channels % groups:
            raise ValueError(f"{groups} groups of {channels} channels")
        arguments = (groups, epsilon, scale, center, self.dtype)
        y = self._module(name, functools.partial(GroupNorm, *arguments, name=name))(x)
        return self._note("GroupNormalization", name, [x], y)

    def prelu(
        self, x: Float[Array, "n ..."], shared_axes: tuple[int, ...] = (), *, name: str | None = None
    ) -> Float[Array, "n ..."]:
        """Apply PReLU; along `shared_axes`, counted from 1 after the batch, a slope is the same."""
        name = self._name("PReLU", name)
        y = self._module(name, functools.partial(PReLU, shared_axes, self.dtype, name=name))(x)
        return self._note("PReLU", name, [x], y)

    def layer_scale(
        self, x: Float[Array, "n ... c"], init: float, *, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """Apply LayerScale: a factor for each channel, at first `init`."""
        name = self._name("LayerScale", name)
        make = functools.partial(LayerScale, init, self.dtype, name=name)
        y = x if name in self._prepared.folded else self._module(name, make)(x)
        return self._note("LayerScale", name, [x], y, init=init)

    def normalization(
        self,
        x: Float[Array, "n ... c"],
        mean: float | Sequence[float] | None = None,
        variance: float | Sequence[float] | None = None,
        *,
        name: str | None = None,
    ) -> Float[Array, "n ... c"]:
        """Apply Normalization of the channels, by constants, or by values that come with the weights."""
        name = self._name("Normalization", name)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        if mean is None or variance is None:
            y = self._module(name, functools.partial(Normalization, name=name))(wide)
        else:
            y = (wide - of_channels(mean, x)) / np.maximum(np.sqrt(of_channels(variance, x)), np.float32(1e-7))
        return self._note("Normalization", name, [x], y.astype(x.dtype))

    def sequential(self, x: Array, layers: Callable[[Any, Array], Array], *, name: str | None = None) -> Array:
        """Apply Sequential: what `layers(k, x)` calls, under one name.

        `layers` is no module's method: Flax would lead those variables to that module.
        """
        name = self._name("Sequential", name)
        inner = copy.copy(self)  # what is tapped, given and counted is the same; the layers are its own
        inner._train, inner._producer = self.trains(name), {id(x): (name, x)}
        inner.nodes, inner.names, inner._modules = {}, [], {}
        inner._shared, inner._kept, inner._growing = frozenset(), frozenset(), None
        y = Sequential(functools.partial(layers, inner), name=name)(x)
        parts = tuple(inner.nodes.values())
        axes = None if self.output_stride is None else self.axes(y)
        return self._note("Sequential", name, [x], y, sum(part.flops for part in parts), parts=parts, axes=axes)


def transposed_padding(kernel: int, stride: int, dilation: int, extra: int, padding: str) -> tuple[int, int]:
    """Return what is padded on the two sides of an axis, once the steps between its values are filled with zeros.

    As Keras has it: "valid" gives (n - 1) stride + max(kernel, stride) values, "same" gives n stride; `extra`
    (Keras's output_padding, -1 for none) are added to what a convolution of that padding needs at the least.
    """
    kernel = (kernel - 1) * dilation + 1
    if padding == "valid":
        return kernel - 1, kernel - 1 + (max(kernel, stride) - kernel if extra < 0 else extra)
    whole = stride + kernel - 2 if extra < 0 else kernel + kernel % 2 - 2 + extra
    before = min(-(-whole // 2), kernel - 1)
    return before, whole - before
