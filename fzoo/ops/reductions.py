"""Sums over images, and how they are lowered on each platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from fzoo.ops.platforms import by_platform, known_platform


def channel_mean(x: Float[np.ndarray | Array, "... c"]) -> Float[Array, "c"]:
    """Average over all axes but the last.

    On CPU it is a product with ones: XLA sums down columns on one core, without its vectors.
    """
    return _channel_mean(known_platform(), x)


@functools.partial(jax.jit, static_argnums=0)
def _channel_mean(platform: str | None, x: Array) -> Array:
    if is_sharded(x):
        return jnp.mean(x, range(x.ndim - 1))

    def cpu(x: Array) -> Array:
        return (jnp.ones((1, x.size // x.shape[-1]), x.dtype) @ x.reshape(-1, x.shape[-1]))[0] / (x.size // x.shape[-1])

    return by_platform(platform, x, cpu=cpu, default=lambda x: jnp.mean(x, range(x.ndim - 1)))


def is_sharded(x: Array) -> bool:
    """Tell whether an array's type says that it lies on several devices, as on the explicit axes of a mesh.

    There, ones beside it would lie on each of them as a whole, and have it gathered.
    """
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def beside(x: Array, like: Array) -> Array:
    """Split an array as another of its rank is split, but for axes of one element."""
    if not is_sharded(like):
        return x
    sharding = jax.typeof(like).sharding
    spec = [axis if n > 1 else None for axis, n in zip(sharding.spec, x.shape, strict=True)]
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def broadcast_channels(values: Float[Array, "c"], like: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Broadcast values of the channels to every pixel, with a gradient that on CPU is a product with ones, too."""
    return lax.broadcast_to_rank(values, like.ndim) if is_sharded(like) else _spread_over(values, like)


@jax.custom_jvp
def _spread_over(values: Array, like: Array) -> Array:
    return _broadcast(values, like)


@_spread_over.defjvp
def _spread_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (values, like), (dvalues, _) = primals, tangents
    moved = by_platform(known_platform(), dvalues, like, cpu=_broadcast_channels, default=_broadcast)
    return _spread_over(values, like), moved


def _broadcast(values: Float[Array, "c"], like: Float[Array, "... c"]) -> Array:
    return jnp.broadcast_to(values, like.shape)


def _broadcast_channels(values: Float[Array, "c"], like: Float[Array, "... c"]) -> Array:
    ones = jnp.ones((like.size // like.shape[-1], 1), values.dtype)
    return (ones @ values[None]).reshape(like.shape)
