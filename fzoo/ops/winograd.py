"""Winograd's minimal filtering.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015): m outputs of a kernel of r elements come
from m + r - 1 inputs by as many products, where the sum needs m r; in two dimensions, both are squared. The tiles of
all images are gathered, so that the products are matrix products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import overload

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fzoo.ops.processor import has_wide_vectors
from fzoo.ops.shapes import Convolution, product

#: Where the polynomials behind it are evaluated, the first m + r - 2 of them: small numbers and their inverses keep the
#: error small, 8e-6 of the largest magnitude where all are used.
POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "4/3", "-4/3")))


@functools.cache
def minimal_filtering(kernel: int, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make B^T (of the input), G (of the kernel) and A^T (of the output) for one dimension (Cook and Toom)."""
    points = POINTS[: tile + kernel - 2]

    def polynomial(roots: Sequence[Fraction]) -> np.ndarray:
        """Return its coefficients, the constant first, among as many as B^T has columns."""
        coefficients = functools.reduce(lambda p, root: np.convolve(p, [-root, 1]), roots, np.array([Fraction(1)]))
        return np.concatenate([coefficients, [0] * (len(points) + 1 - len(coefficients))])

    def powers(point: Fraction, count: int) -> np.ndarray:
        return np.array([point**i for i in range(count)])

    others = [[q for q in points if q != p] for p in points]
    factors = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    last_kernel, last_output = [0] * (kernel - 1) + [1], [0] * (tile - 1) + [1]
    b = [polynomial(rest) for rest in others] + [polynomial(points)]
    g = [powers(p, kernel) / factor for p, factor in zip(points, factors, strict=True)] + [last_kernel]
    a = np.array([powers(p, tile) for p in points] + [last_output]).T
    return np.array(b, float), np.array(g, float), a.astype(float)


def winograd_tile(conv: Convolution) -> int:
    """Return the side of the output tile: 4, or 2 where much of the tiles of 4 would hang over a small image.

    With wide vectors the products saved on 14 x 14 by 3x3 are worth less than what hangs over: 1.1 to 1.4 of the speed
    in tiles of 2.
    """
    hangs_over = any(side % 4 for side in conv.size)
    small = 16 if conv.kernel == (3, 3) and hangs_over and has_wide_vectors() else 8
    return 4 if min(conv.size) > small else 2


@overload
def winograd_kernel(kernel: Array, tile: int) -> Array: ...
@overload
def winograd_kernel(kernel: np.ndarray, tile: int) -> np.ndarray: ...
def winograd_kernel(kernel: Array | np.ndarray, tile: int) -> Array | np.ndarray:
    """Compute G kernel G^T of a kernel (kh, kw, c, o), NumPy or JAX: a matrix (c, o) for each of the products."""
    sides = [minimal_filtering(k, tile)[1] if k > 1 else np.ones((1, 1)) for k in kernel.shape[:2]]
    both = np.kron(*sides).astype(np.float32)
    return (both @ kernel.reshape(both.shape[1], -1)).reshape(len(both), *kernel.shape[2:])


def winograd_transformed(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "products c o"]
) -> Float[Array, "n ho wo o"]:
    """Convolve with stride 1 by the kernel that `winograd_kernel` made."""
    sides = [k for k in conv.kernel if k > 1]
    inputs = round(kernel.shape[0] ** (1 / len(sides)))  # of a tile, in each dimension that is filtered
    tile = inputs - sides[0] + 1
    once = np.ones((1, 1))
    (bh, ah), (bw, aw) = (minimal_filtering(k, tile)[::2] if k > 1 else (once, once) for k in conv.kernel)
    (ho, wo), (top, left) = conv.size, (conv.pads[0][0], conv.pads[1][0])
    mh, mw = len(ah), len(aw)
    th, tw = -(-ho // mh), -(-wo // mw)
    bottom, right = (th - 1) * mh + len(bh) - top - conv.height, (tw - 1) * mw + len(bw) - left - conv.width
    x, n = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))), x.shape[0]
    x = filtered(bh, filtered(bw, x, mw, tw, 2), mh, th, 2)  # bh bw n th tw c
    y = product(x.reshape(kernel.shape[0], n, th, tw, conv.inputs), kernel)
    y = y.reshape(len(bh), len(bw), n, th, tw, conv.outputs)
    rows = [jnp.stack(combine(aw, list(row)), axis=3) for row in combine(ah, list(y))]  # each n th tw mw o
    y = jnp.stack([row.reshape(n, th, tw * mw, conv.outputs) for row in rows], axis=2)  # n th mh w o
    return y.reshape(n, th * mh, tw * mw, conv.outputs)[:, :ho, :wo]


def winograd_products(kernel: Sequence[int], tile: int) -> int:
    """Count the matrices that `winograd_kernel` makes of a kernel (kh, kw)."""
    return math.prod(tile + k - 1 for k in kernel if k > 1)


def filtered(matrix: np.ndarray, x: Array, step: int, count: int, axis: int) -> Array:
    """Sum x moved by 0, 1, ..., as each row of a constant matrix weighs it, at every `step` along an axis.

    As one product: its sums written out would be no faster, and would take many times longer to compile.
    """
    if len(matrix) == 1:
        return x[None]
    moved = [lax.slice_in_dim(x, i, i + (count - 1) * step + 1, step, axis) for i in range(len(matrix))]
    terms = lax.optimization_barrier(jnp.stack(moved))
    return jnp.tensordot(jnp.asarray(matrix, x.dtype), terms, 1)


def combine(matrix: np.ndarray, terms: Sequence[Array]) -> list[Array]:
    """Sum the terms by each row of a constant matrix; what is zero is left out."""
    sums = []
    for row in matrix.tolist():
        scaled = [t if c == 1 else t * c for c, t in zip(row, terms, strict=True) if c]
        sums.append(functools.reduce(jnp.add, scaled))
    return sums
