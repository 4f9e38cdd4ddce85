"""Rules of the Keras classes that merge tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fzoo.layers.keras import Layers
from fzoo.layers.rules.options import flag, integer, integers, number, rule


def aligned(xs: Sequence[Any]) -> list[Any]:
    """Give tensors the same number of axes: those that have fewer are the same along the first ones.

    Constants come as numbers or as arrays; images stay images, since the batch is every tensor's first axis.
    """
    rank = max(jnp.ndim(x) for x in xs)
    return [x if jnp.ndim(x) in (0, rank) else lax.expand_dims(x, range(rank - jnp.ndim(x))) for x in xs]


def check_images(xs: Sequence[Array]) -> None:
    """Raise ValueError unless the tensors have as many axes each, or images would be mixed."""
    if len({x.ndim for x in xs}) > 1:
        shapes = ", ".join(str(("N", *x.shape[1:])) for x in xs)
        raise ValueError(f"tensors of shapes {shapes} given, of as many axes each expected")


def merge(kind: str, combine: Callable[[list[Array]], Array], inputs: int | None = None) -> None:
    """Register a layer that computes a value of the values at the same place."""

    @rule(kind, inputs=inputs)
    def apply(k: Layers, *xs: Array, name: str) -> Array:
        check_images(xs)
        return k.apply(kind, lambda *xs: combine(list(xs)), *xs, name=name)


merge("Subtract", lambda xs: xs[0] - xs[1], inputs=2)
merge("Average", lambda xs: functools.reduce(jnp.add, xs) / len(xs))
merge("Maximum", lambda xs: functools.reduce(jnp.maximum, xs))
merge("Minimum", lambda xs: functools.reduce(jnp.minimum, xs))


@rule("Add", inputs=None)
def _add(k: Layers, *xs: Array, name: str) -> Array:
    check_images(xs)
    return k.add(xs, name=name)


@rule("Multiply", inputs=None)
def _multiply(k: Layers, *xs: Array, name: str) -> Array:
    check_images(xs)
    return k.multiply(xs, name=name)


@rule("Concatenate", inputs=None, axis=integer(-1))
def _concatenate(k: Layers, *xs: Array, name: str, axis: int) -> Array:
    check_images(xs)
    return k.concat(xs, axis=axis_of(axis, xs[0].ndim, last=-1), name=name)


def axis_of(axis: int, rank: int, last: int | None = None) -> int:
    """Return an axis counted from the first, or `last` for the last one.

    Raises:
        ValueError: it is the batch's, or there is no such axis.
    """
    if not -rank <= axis < rank or axis % rank == 0:
        raise ValueError(f"axis={axis} given, one of a tensor of {rank} axes but the batch's expected")
    return last if last is not None and axis % rank == rank - 1 else axis % rank


@rule("CustomScaleLayer", inputs=2, scale=number())
def _custom_scale_layer(k: Layers, x: Array, residual: Array, *, name: str, scale: float) -> Array:
    return k.scaled_add(x, residual, scale, name=name)


@rule("Dot", inputs=2, axes=integers(), normalize=flag(False))
def _dot(k: Layers, x: Array, y: Array, *, name: str, axes: tuple[int, ...], normalize: bool) -> Array:
    """Sum products along an axis of each, for each image."""
    if len(axes) not in (1, 2):
        raise ValueError(f"axes={list(axes)} given, one or two expected")
    along = axis_of(axes[0], x.ndim), axis_of(axes[-1], y.ndim)

    def function(x: Array, y: Array) -> Array:
        if normalize:
            x, y = unit(x, (along[0],), 1e-7), unit(y, (along[1],), 1e-7)
        products = lax.dot_general(x, y, (((along[0],), (along[1],)), ((0,), (0,))))
        return products[:, None] if products.ndim == 1 else products

    return k.apply("Dot", function, x, y, name=name)


def unit(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """Divide vectors along these axes by their lengths, those that are shorter than `epsilon` by that."""
    wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(jnp.square(wide), axes, keepdims=True)
    return (wide * lax.rsqrt(jnp.maximum(squares, epsilon**2))).astype(x.dtype)


@rule("UnitNormalization", axis=integers(-1))
def _unit_normalization(k: Layers, x: Array, *, name: str, axis: tuple[int, ...]) -> Array:
    axes = tuple(axis_of(n, x.ndim) for n in axis)
    return k.apply("UnitNormalization", lambda x: unit(x, axes, 1e-12), x, name=name)
