"""The Flax modules of layers with variables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from flax.linen.dtypes import promote_dtype
from flax.typing import Initializer
from jax import lax
from jaxtyping import Array, Float

from fzoo import ops
from fzoo.layers.initializers import glorot_uniform
from fzoo.ops.shapes import Pads
from fzoo.types import DTypeLike


class Layer(nn.Module, kw_only=True):
    """A Flax layer whose parameters are checked by their shapes alone; Flax traces the initializers for that."""

    param_dtype: Any = jnp.float32

    @nn.nowrap
    def param(self, name: str, init_fn: Initializer, *init_args: Any, **options: Any) -> Any:
        """Make a parameter as Flax does; `init_args` are its shape, and a dtype, which is `param_dtype` if left out."""
        shape, dtype = (*init_args, self.param_dtype)[:2]
        if self.scope is None or not self.scope.has_variable("params", name):
            return super().param(name, init_fn, shape, dtype, **options)
        value = nn.meta.unbox(self.get_variable("params", name))
        if jnp.shape(value) != tuple(shape):
            raise ScopeParamShapeError(name, self.scope.path_text, jnp.shape(value), tuple(shape))
        return value


class Conv(Layer, nn.Conv):
    """`flax.linen.Conv`."""


class Dense(Layer, nn.Dense):
    """`flax.linen.Dense`."""


class LayerNorm(Layer, nn.LayerNorm):
    """`flax.linen.LayerNorm`."""


class ConvTranspose(Layer):
    """The transpose of a convolution, its kernel (height, width, output, input) as Keras keeps it."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    use_bias: bool
    dtype: DTypeLike
    kernel_init: Initializer = glorot_uniform

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply it."""
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = lax.conv_transpose(
            x,
            kernel,
            self.strides,
            self.padding,
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=True,
        )
        return y if bias is None else y + lax.broadcast_to_rank(bias, y.ndim)


class GroupNorm(Layer):
    """Normalisation of each image over groups of its channels."""

    groups: int
    epsilon: float
    use_scale: bool
    use_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        """Apply it, in float32 at least."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels) if self.use_scale else jnp.ones(())
        bias = self.param("bias", nn.initializers.zeros, channels) if self.use_bias else jnp.zeros(channels)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        grouped = wide.reshape(*x.shape[:-1], self.groups, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        centred = grouped - jnp.mean(grouped, axes, keepdims=True)
        factor = lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + self.epsilon)
        y = (centred * factor).reshape(x.shape) * lax.broadcast_to_rank(scale, x.ndim)
        return jnp.asarray(y + lax.broadcast_to_rank(bias, x.ndim), self.dtype)


class PReLU(Layer):
    """A ReLU with a slope below zero for each value that an image has, but for the axes that share one."""

    shared_axes: tuple[int, ...]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Apply it."""
        shape = tuple(1 if axis in self.shared_axes else n for axis, n in enumerate(x.shape) if axis)
        alpha = self.param("alpha", nn.initializers.zeros, shape)
        x, alpha = promote_dtype(x, alpha, dtype=self.dtype)
        return jnp.where(x > 0, x, x * alpha[None])


class SeparableConv(nn.Module):
    """A depthwise, then a pointwise convolution under one Keras name."""

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    depthwise_conv: Callable[..., nn.Module]
    pointwise_conv: Callable[..., nn.Module]
    use_bias: bool = False
    depth_multiplier: int = 1
    dilation: tuple[int, ...] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... f"]:
        """Apply both convolutions."""
        channels = x.shape[-1]
        x = self.depthwise_conv(
            channels * self.depth_multiplier,
            self.kernel_size,
            self.strides,
            padding=self.padding,
            kernel_dilation=self.dilation,
            feature_group_count=channels,
            name="depthwise",
        )(x)
        one = (1,) * len(self.kernel_size)
        return self.pointwise_conv(self.features, one, use_bias=self.use_bias, name="pointwise")(x)


class WinogradConv(Layer):
    """A convolution of stride 1 whose kernel is kept transformed, in float32: in bfloat16 its digits would be lost."""

    features: int
    kernel_size: tuple[int, int]
    padding: str | Pads
    tile: int
    dtype: DTypeLike
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply it."""
        products = ops.winograd_products(self.kernel_size, self.tile)
        kernel = self.param("kernel", glorot_uniform, (products, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=jnp.promote_types(self.dtype, jnp.float32))
        conv = ops.Convolution.of(x.shape, (*self.kernel_size, x.shape[-1], self.features), (1, 1), self.padding)
        y = ops.winograd_transformed(conv, x, kernel)
        return jnp.asarray(y if bias is None else y + lax.broadcast_to_rank(bias, y.ndim), self.dtype)


@functools.partial(jax.jit, static_argnums=5)  # a network repeats its shapes: each is traced once
def normalised(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalise by given statistics."""
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
    dtype: DTypeLike
    use_bias: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        """Normalise by the batch's statistics in training, by the running ones otherwise."""
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, channels) if self.use_scale else jnp.ones((), jnp.float32)
        bias = (
            self.param("bias", nn.initializers.zeros, channels) if self.use_bias else jnp.zeros(channels, jnp.float32)
        )
        scale, bias = (jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32)) for v in (scale, bias))
        if not self.train:
            y = normalised(x, running_mean.value, running_var.value, scale, bias, self.epsilon)
            return jnp.asarray(y, self.dtype)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        mean = self.over_devices(ops.channel_mean(wide))
        centred = wide - ops.broadcast_channels(mean, wide)
        var = self.over_devices(ops.channel_mean(jnp.square(centred)))
        if not self.is_initializing():
            for running, new in ((running_mean, mean), (running_var, var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        factor = lax.rsqrt(var + self.epsilon) * scale
        return jnp.asarray(
            centred * ops.broadcast_channels(factor, wide) + ops.broadcast_channels(bias, wide), self.dtype
        )

    @nn.nowrap
    def over_devices(self, mean: Float[Array, "c"]) -> Float[Array, "c"]:
        """Average over the devices of `axis_name`, where there is one."""
        if self.axis_name is None or self.is_initializing():
            return mean
        try:
            return lax.pmean(mean, self.axis_name)
        except NameError as e:
            raise ValueError(
                f"axis_name={self.axis_name!r} given, but the call is inside of no jax.shard_map or jax.pmap with it"
            ) from e


class Dropout(nn.Module):
    """`flax.linen.Dropout`, whose draw is split over devices as the values are."""

    rate: float
    broadcast_dims: tuple[int, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Drop a share of the values, those along `broadcast_dims` together, and scale up what is left."""
        if self.deterministic or self.rate == 0:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        shape = [1 if axis in self.broadcast_dims else n for axis, n in enumerate(x.shape)]
        kept = ops.beside(jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape), x)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))


class LayerScale(Layer):
    """A factor for each channel that starts small."""

    start: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        """Apply it."""
        gamma = self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:])
        x, gamma = promote_dtype(x, gamma, dtype=self.dtype)
        return x * lax.broadcast_to_rank(gamma, x.ndim)


class Normalization(nn.Module):
    """A mean and a variance of each channel that came with the weights, not from training."""

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
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

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        """Apply it."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        return x * lax.broadcast_to_rank(scale, x.ndim) + lax.broadcast_to_rank(bias, x.ndim)
