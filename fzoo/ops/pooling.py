"""Pooling, and how it is lowered on each platform."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Pool:
    """A pooling of NHWC images.

    Attributes:
        kind: "max" (padding never wins) or "avg" (padding is not counted).
        window: height and width.
        strides: for height and width.
        padding: "SAME" or "VALID".
    """

    kind: str
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: str


@functools.partial(jax.jit, static_argnums=0)
def pool(how: Pool, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo c"]:
    """Pool: on CPU down the columns, then along the rows, each as one operation on shifted images.

    XLA:CPU's windows go without its vectors, and are 3 to 7 times slower.
    """
    return _pool_by_platform(how, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pool_by_platform(how: Pool, x: Array) -> Array:
    return lax.platform_dependent(x, cpu=functools.partial(_pool_shifted, how), default=functools.partial(_pool, how))


@_pool_by_platform.defjvp
def _pool_jvp(how: Pool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Derive as XLA does: of equal values in a window one takes it all, and not each its share."""
    return _pool_by_platform(how, *primals), jax.jvp(functools.partial(_pool, how), primals, tangents)[1]


def _pool(how: Pool, x: Array) -> Array:
    if how.kind == "max":
        return nn.max_pool(x, how.window, how.strides, how.padding)
    return nn.avg_pool(x, how.window, how.strides, how.padding, count_include_pad=False).astype(x.dtype)


def _pool_shifted(how: Pool, x: Array) -> Array:
    combine, neutral = (jnp.maximum, -jnp.inf) if how.kind == "max" else (jnp.add, 0)
    pads = lax.padtype_to_pads(x.shape[1:3], how.window, how.strides, how.padding)
    wide = x.dtype if how.kind == "max" else jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.pad(x.astype(wide), ((0, 0), *pads, (0, 0)), constant_values=neutral)
    count = 1.0  # of the pixels in a window
    for axis, window, stride, (before, after) in zip((1, 2), how.window, how.strides, pads, strict=True):
        size = (y.shape[axis] - window) // stride + 1
        shifted = [lax.slice_in_dim(y, i, i + (size - 1) * stride + 1, stride, axis) for i in range(window)]
        y = lax.optimization_barrier(functools.reduce(combine, shifted))  # not computed anew by all that reads it
        inside = np.pad(np.ones(x.shape[axis]), (before, after))
        counts = [inside[i * stride : i * stride + window].sum() for i in range(size)]
        count = count * np.reshape(counts, [-1 if i == axis else 1 for i in range(x.ndim)])
    return y if how.kind == "max" else (y / jnp.asarray(count, wide)).astype(x.dtype)
