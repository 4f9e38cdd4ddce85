"""Pooling, and how it is lowered on each platform."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fzoo.ops.platforms import by_platform, known_platform
from fzoo.ops.shapes import Pads, Side, has_open_side, met, windows_along


@dataclasses.dataclass(frozen=True)
class Pool:
    """A pooling of NHWC images.

    Attributes:
        kind: "max" (padding never wins) or "avg" (padding is not counted).
        window: height and width.
        strides: for height and width.
        padding: "SAME" or "VALID", or what is padded before and after, for height and width.
        dilation: how far the values of a window are apart; with more than 1, `padding` says the numbers or "VALID".
    """

    kind: str
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: str | Pads
    dilation: tuple[int, int] = (1, 1)


def pool(pooling: Pool, x: Float[np.ndarray | Array, "n h w c"]) -> Float[Array, "n ho wo c"]:
    """Pool: on CPU down the columns, then along the rows, each as one operation on shifted images.

    XLA:CPU's windows go without its vectors, and are 3 to 7 times slower.
    """
    return _pool_for(pooling, known_platform(), x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pool_for(pooling: Pool, platform: str | None, x: Array) -> Array:
    return _pool_by_platform(pooling, platform, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pool_by_platform(pooling: Pool, platform: str | None, x: Array) -> Array:
    return by_platform(
        platform, x, cpu=functools.partial(_pool_shifted, pooling), default=functools.partial(_pool, pooling)
    )


@_pool_by_platform.defjvp
def _pool_jvp(
    pooling: Pool, platform: str | None, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """Derive as XLA does: of equal values in a window one takes it all, and not each its share."""
    return _pool_by_platform(pooling, platform, *primals), jax.jvp(
        functools.partial(_pool, pooling), primals, tangents
    )[1]


def _pool(pooling: Pool, x: Array) -> Array:
    if pooling.dilation != (1, 1):
        return _pool_by_phases(pooling, x)
    if has_open_side(*x.shape[1:3]):
        y = met(_filled(pooling, x), _size(pooling, x), pooling.window, pooling.strides, pooling.dilation)
        y = nn.pooling.pool(y, _NEUTRAL[pooling.kind], _COMBINE[pooling.kind], pooling.window, pooling.strides, "VALID")
        return _averaged(pooling, x, y)
    padding: Any = pooling.padding  # Flax takes numbers, too
    if pooling.kind == "max":
        return nn.max_pool(x, pooling.window, pooling.strides, padding)
    return nn.avg_pool(x, pooling.window, pooling.strides, padding, count_include_pad=False).astype(x.dtype)


#: What the values of a window are combined by, and the value that changes nothing.
_COMBINE = {"max": lax.max, "avg": lax.add}
_NEUTRAL = {"max": -jnp.inf, "avg": 0.0}


def _pool_shifted(pooling: Pool, x: Array) -> Array:
    return _averaged(pooling, x, _combined(pooling, x))


def _combined(pooling: Pool, x: Array) -> Array:
    """Take the largest of each window, or their sum."""
    y = _filled(pooling, x)
    sides = zip((1, 2), _size(pooling, x), pooling.window, pooling.strides, pooling.dilation, strict=True)
    for axis, size, window, stride, apart in sides:
        starts = range(0, window * apart, apart)
        shifted = [lax.slice_in_dim(y, i, i + (size - 1) * stride + 1, stride, axis) for i in starts]
        y = functools.reduce(_COMBINE[pooling.kind], shifted)
        y = lax.optimization_barrier(y)  # not computed anew by all that reads it
    return y


def _filled(pooling: Pool, x: Array) -> Array:
    """Pad images, in the dtype of the sums."""
    wide = x.dtype if pooling.kind == "max" else jnp.promote_types(x.dtype, jnp.float32)
    return jnp.pad(x.astype(wide), ((0, 0), *_pads(pooling, x), (0, 0)), constant_values=_NEUTRAL[pooling.kind])


def _size(pooling: Pool, x: Array) -> tuple[Side, Side]:
    """Return the height and the width of the output."""
    return windows_along(x.shape[1], x.shape[2], pooling.window, pooling.strides, _pads(pooling, x), pooling.dilation)


def _averaged(pooling: Pool, x: Array, y: Array) -> Array:
    """Make means of sums, of the pixels that lie inside of the image; what is the largest stays."""
    return y if pooling.kind == "max" else (y / jnp.asarray(_counts(pooling, x), y.dtype)).astype(x.dtype)


def _pads(pooling: Pool, x: Array) -> Pads:
    """Return what is padded before and after, for height and width."""
    if not isinstance(pooling.padding, str):
        return pooling.padding
    rows, columns = lax.padtype_to_pads(x.shape[1:3], pooling.window, pooling.strides, pooling.padding)
    return rows, columns


def _counts(pooling: Pool, x: Array) -> np.ndarray | Array:
    """Count the pixels of the image in each window: (1, ho, wo, 1)."""
    if has_open_side(*x.shape[1:3]):
        return _combined(pooling, jnp.ones((1, *x.shape[1:3], 1)))
    total = np.ones((1, 1, 1, 1))
    sides = zip((1, 2), pooling.window, pooling.strides, pooling.dilation, _pads(pooling, x), strict=True)
    for axis, window, stride, apart, pads in sides:
        inside = np.pad(np.ones(x.shape[axis]), pads)
        firsts = np.arange(0, len(inside) - (window - 1) * apart, stride)
        counts = inside[firsts[:, None] + np.arange(window) * apart].sum(1)
        total = total * np.reshape(counts, [-1 if i == axis else 1 for i in range(x.ndim)])
    return total


def _pool_by_phases(pooling: Pool, x: Array) -> Array:
    """Pool by dilated windows as by plain ones on the images that every d-th pixel makes, since XLA derives those."""
    n, _, _, c = x.shape
    pads, (down, right) = _pads(pooling, x), pooling.dilation
    wide = x.dtype if pooling.kind == "max" else jnp.promote_types(x.dtype, jnp.float32)
    neutral, combine = _NEUTRAL[pooling.kind], _COMBINE[pooling.kind]
    sides = [side + sum(around) for side, around in zip(x.shape[1:3], pads, strict=True)]
    sizes = [side - (w - 1) * by for side, w, by in zip(sides, pooling.window, pooling.dilation, strict=True)]
    filled = [(a, b - side % -by) for side, (a, b), by in zip(sides, pads, pooling.dilation, strict=True)]
    y = jnp.pad(x.astype(wide), ((0, 0), *filled, (0, 0)), constant_values=neutral)
    y = y.reshape(n, y.shape[1] // down, down, y.shape[2] // right, right, c).transpose(0, 2, 4, 1, 3, 5)
    y = y.reshape(n * down * right, *y.shape[3:])  # images that lie on several devices stay there
    y = nn.pooling.pool(y, neutral, combine, pooling.window, (1, 1), "VALID")
    y = y.reshape(n, down, right, *y.shape[1:]).transpose(0, 3, 1, 4, 2, 5)
    y = y.reshape(n, y.shape[1] * down, y.shape[3] * right, c)
    y = y[:, : sizes[0] : pooling.strides[0], : sizes[1] : pooling.strides[1]]
    return _averaged(pooling, x, y)
