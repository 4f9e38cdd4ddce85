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


def pool(how: Pool, x: Float[np.ndarray | Array, "n h w c"]) -> Float[Array, "n ho wo c"]:
    """Pool: on CPU down the columns, then along the rows, each as one operation on shifted images.

    XLA:CPU's windows go without its vectors, and are 3 to 7 times slower.
    """
    return _pool_for(how, known_platform(), x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pool_for(how: Pool, platform: str | None, x: Array) -> Array:
    return _pool_by_platform(how, platform, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pool_by_platform(how: Pool, platform: str | None, x: Array) -> Array:
    return by_platform(platform, x, cpu=functools.partial(_pool_shifted, how), default=functools.partial(_pool, how))


@_pool_by_platform.defjvp
def _pool_jvp(how: Pool, platform: str | None, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Derive as XLA does: of equal values in a window one takes it all, and not each its share."""
    return _pool_by_platform(how, platform, *primals), jax.jvp(functools.partial(_pool, how), primals, tangents)[1]


def _pool(how: Pool, x: Array) -> Array:
    if how.dilation != (1, 1):
        return _pool_by_phases(how, x)
    if has_open_side(*x.shape[1:3]):
        y = met(_filled(how, x), _size(how, x), how.window, how.strides, how.dilation)
        y = nn.pooling.pool(y, _NEUTRAL[how.kind], _COMBINE[how.kind], how.window, how.strides, "VALID")
        return _averaged(how, x, y)
    padding: Any = how.padding  # Flax takes numbers, too
    if how.kind == "max":
        return nn.max_pool(x, how.window, how.strides, padding)
    return nn.avg_pool(x, how.window, how.strides, padding, count_include_pad=False).astype(x.dtype)


#: What the values of a window are combined by, and the value that changes nothing.
_COMBINE = {"max": lax.max, "avg": lax.add}
_NEUTRAL = {"max": -jnp.inf, "avg": 0.0}


def _pool_shifted(how: Pool, x: Array) -> Array:
    return _averaged(how, x, _combined(how, x))


def _combined(how: Pool, x: Array) -> Array:
    """Take the largest of each window, or their sum."""
    y = _filled(how, x)
    sides = zip((1, 2), _size(how, x), how.window, how.strides, how.dilation, strict=True)
    for axis, size, window, stride, apart in sides:
        starts = range(0, window * apart, apart)
        shifted = [lax.slice_in_dim(y, i, i + (size - 1) * stride + 1, stride, axis) for i in starts]
        y = functools.reduce(_COMBINE[how.kind], shifted)
        y = lax.optimization_barrier(y)  # not computed anew by all that reads it
    return y


def _filled(how: Pool, x: Array) -> Array:
    """Pad images, in the dtype of the sums."""
    wide = x.dtype if how.kind == "max" else jnp.promote_types(x.dtype, jnp.float32)
    return jnp.pad(x.astype(wide), ((0, 0), *_pads(how, x), (0, 0)), constant_values=_NEUTRAL[how.kind])


def _size(how: Pool, x: Array) -> tuple[Side, Side]:
    """Return the height and the width of the output."""
    return windows_along(x.shape[1], x.shape[2], how.window, how.strides, _pads(how, x), how.dilation)


def _averaged(how: Pool, x: Array, y: Array) -> Array:
    """Make means of sums, of the pixels that lie inside of the image; what is the largest stays."""
    return y if how.kind == "max" else (y / jnp.asarray(_counts(how, x), y.dtype)).astype(x.dtype)


def _pads(how: Pool, x: Array) -> Pads:
    """Return what is padded before and after, for height and width."""
    if not isinstance(how.padding, str):
        return how.padding
    rows, columns = lax.padtype_to_pads(x.shape[1:3], how.window, how.strides, how.padding)
    return rows, columns


def _counts(how: Pool, x: Array) -> np.ndarray | Array:
    """Count the pixels of the image in each window: (1, ho, wo, 1)."""
    if has_open_side(*x.shape[1:3]):
        return _combined(how, jnp.ones((1, *x.shape[1:3], 1)))
    total = np.ones((1, 1, 1, 1))
    sides = zip((1, 2), how.window, how.strides, how.dilation, _pads(how, x), strict=True)
    for axis, window, stride, apart, pads in sides:
        inside = np.pad(np.ones(x.shape[axis]), pads)
        firsts = np.arange(0, len(inside) - (window - 1) * apart, stride)
        counts = inside[firsts[:, None] + np.arange(window) * apart].sum(1)
        total = total * np.reshape(counts, [-1 if i == axis else 1 for i in range(x.ndim)])
    return total


def _pool_by_phases(how: Pool, x: Array) -> Array:
    """Pool by dilated windows as by plain ones on the images that every d-th pixel makes, since XLA derives those."""
    n, _, _, c = x.shape
    pads, (down, right) = _pads(how, x), how.dilation
    wide = x.dtype if how.kind == "max" else jnp.promote_types(x.dtype, jnp.float32)
    neutral, combine = _NEUTRAL[how.kind], _COMBINE[how.kind]
    sides = [side + sum(around) for side, around in zip(x.shape[1:3], pads, strict=True)]
    sizes = [side - (w - 1) * by for side, w, by in zip(sides, how.window, how.dilation, strict=True)]
    filled = [(a, b - side % -by) for side, (a, b), by in zip(sides, pads, how.dilation, strict=True)]
    y = jnp.pad(x.astype(wide), ((0, 0), *filled, (0, 0)), constant_values=neutral)
    y = y.reshape(n, y.shape[1] // down, down, y.shape[2] // right, right, c).transpose(0, 2, 4, 1, 3, 5)
    y = y.reshape(n * down * right, *y.shape[3:])  # images that lie on several devices stay there
    y = nn.pooling.pool(y, neutral, combine, how.window, (1, 1), "VALID")
    y = y.reshape(n, down, right, *y.shape[1:]).transpose(0, 3, 1, 4, 2, 5)
    y = y.reshape(n, y.shape[1] * down, y.shape[3] * right, c)
    y = y[:, : sizes[0] : how.strides[0], : sizes[1] : how.strides[1]]
    return _averaged(how, x, y)
