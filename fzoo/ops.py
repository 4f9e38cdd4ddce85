"""How a convolution is lowered on each platform.

`conv_general_dilated` has the signature that `flax.linen.Conv` calls, so a model says *what* it convolves
and this file says *how*. Everything here differentiates, and `lax.platform_dependent` picks the form when
the program is lowered, so the same trace runs on (and exports for) CPU, GPU and TPU.

GPUs and TPUs get the plain convolution, which their libraries run well. On CPU, `CPU_FORMS` is the choice: the first
row that fits. What each row is worth is measured by `benchmarks/convolutions.py`, beside XLA's own convolution.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
Pads = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The shape of an undilated NHWC convolution: what a form is chosen by.

    Attributes:
        images, height, width, inputs: shape of the input; one image where `jax.export` leaves their number open.
        kernel, outputs, groups: of the kernel.
        strides, pads: for height and width.
        dtype: of the images and the kernel.
    """

    images: int
    height: int
    width: int
    inputs: int
    kernel: tuple[int, int]
    outputs: int
    groups: int
    strides: tuple[int, int]
    pads: Pads
    dtype: Any

    @classmethod
    def of(
        cls,
        images: Sequence[Any],
        kernel: Sequence[int],
        strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        groups: int = 1,
        dtype: Any = jnp.float32,
    ) -> Convolution:
        """From the shapes (n, h, w, c) and (kh, kw, i, o), and lax's padding."""
        (n, h, w, c), (kh, kw, _, outputs) = images, kernel
        n = int(n) if isinstance(n, Integral) else 1  # a symbolic dimension can't be compared
        down, right = (int(s) for s in strides)
        if isinstance(padding, str):
            padding = lax.padtype_to_pads((h, w), (kh, kw), (down, right), padding)
        rows, columns = ((int(before), int(after)) for before, after in padding)
        return cls(n, h, w, c, (kh, kw), outputs, groups, (down, right), (rows, columns), jnp.dtype(dtype))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        sides = zip((self.height, self.width), self.kernel, self.strides, self.pads, strict=True)
        height, width = ((side + sum(pads) - k) // stride + 1 for side, k, stride, pads in sides)
        return height, width

    @property
    def flops(self) -> int:
        """2 for each multiply-add."""
        terms = self.inputs // self.groups * self.kernel[0] * self.kernel[1]
        return 2 * self.images * self.size[0] * self.size[1] * self.outputs * terms


def conv_general_dilated(
    lhs: Float[Array, "n h w c"],
    rhs: Float[Array, "kh kw i o"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = NHWC,
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "n ho wo o"]:
    """`lax.conv_general_dilated`, in a faster form where `CPU_FORMS` has one and the platform is a CPU."""
    plain = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == NHWC
    if plain and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ()))):
        conv = Convolution.of(lhs.shape, rhs.shape, window_strides, padding, feature_group_count, lhs.dtype)
        run = cpu_form(conv)
        if run is not None:
            return _by_platform(run, conv, tuple(options.items()), lhs, rhs)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        **options,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # a network repeats its shapes: each is traced once
def _by_platform(
    run: Callable[[Convolution, Array, Array], Array],
    conv: Convolution,
    options: tuple[tuple[str, Any], ...],
    lhs: Array,
    rhs: Array,
) -> Array:
    library = functools.partial(
        lax.conv_general_dilated,
        window_strides=conv.strides,
        padding=conv.pads,
        dimension_numbers=NHWC,
        feature_group_count=conv.groups,
        **dict(options),
    )
    return lax.platform_dependent(lhs, rhs, cpu=functools.partial(run, conv), default=library)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)  # its derivative calls it, too
def depthwise_shifted(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw 1 cm"]
) -> Float[Array, "n ho wo cm"]:
    """A depthwise convolution as one multiply-add of a shifted image for each kernel element."""
    return _shifted(conv, x, kernel, lambda values, like: lax.broadcast_to_rank(values, like.ndim))


@depthwise_shifted.defjvp
def _depthwise_jvp(
    conv: Convolution, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The same sums, but the kernel's gradient, a sum over all pixels, is as `spread` has it."""
    (x, kernel), (dx, dkernel) = primals, tangents
    return depthwise_shifted(conv, x, kernel), depthwise_shifted(conv, dx, kernel) + _shifted(conv, x, dkernel, _spread)


def _shifted(conv: Convolution, x: Array, kernel: Array, spread: Callable[[Array, Array], Array]) -> Array:
    if conv.outputs != conv.inputs:  # output c * m + j reads channel c
        x = jnp.repeat(x, conv.outputs // conv.inputs, axis=3)
    total = jnp.zeros((), jnp.float32)
    weights = kernel.reshape(-1, conv.outputs)
    for i, (_, window) in enumerate(windows(conv, x)):
        total = total + window * spread(lax.index_in_dim(weights, i, keepdims=False), window)
    return lax.convert_element_type(total, x.dtype)


def pointwise(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "1 1 c o"]
) -> Float[Array, "n ho wo o"]:
    """A 1x1 convolution as a matrix product."""
    [(_, x)] = windows(conv, x)
    return product(x.reshape(-1, conv.inputs), kernel[0, 0]).reshape(*x.shape[:3], conv.outputs)


def columns(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c o"]
) -> Float[Array, "n ho wo o"]:
    """A convolution as a matrix product with the windows written out (im2col)."""
    x = lax.optimization_barrier(jnp.concatenate([window for _, window in windows(conv, x)], axis=-1))
    kernel = kernel.reshape(-1, conv.outputs)
    return product(x.reshape(-1, kernel.shape[0]), kernel).reshape(*x.shape[:3], conv.outputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def row_columns(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c o"]
) -> Float[Array, "n ho wo o"]:
    """`columns`, a row of a window at a time: its pixels lie side by side, which counts where they are small."""
    (kh, kw), (down, right), (ho, wo) = conv.kernel, conv.strides, conv.size
    x = jnp.pad(x, ((0, 0), *conv.pads, (0, 0)))
    x = x.reshape(*x.shape[:2], -1)
    runs = np.arange(wo)[:, None] * right * conv.inputs + np.arange(kw * conv.inputs)
    rows = [lax.slice_in_dim(x, i, i + (ho - 1) * down + 1, down, 1)[:, :, runs] for i in range(kh)]
    x = lax.optimization_barrier(jnp.concatenate(rows, axis=-1))
    kernel = kernel.reshape(-1, conv.outputs)
    return product(x.reshape(-1, kernel.shape[0]), kernel).reshape(*x.shape[:3], conv.outputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def winograd(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c o"]
) -> Float[Array, "n ho wo o"]:
    """A convolution of stride 1 by Winograd's minimal filtering, its kernel transformed on the way."""
    return winograd_transformed(conv, x, winograd_kernel(kernel, winograd_tile(conv)))


def _plain_jvp(form: Any, conv: Convolution, primals: tuple[Array, Array], tangents: Any) -> tuple[Array, Any]:
    """The derivative by XLA's convolution: the transposes of a form's steps are ten times slower than its own."""
    plain = functools.partial(
        lax.conv_general_dilated, window_strides=conv.strides, padding=conv.pads, dimension_numbers=NHWC
    )
    (x, kernel), (dx, dkernel) = primals, tangents
    pairs = [pair for pair in ((dx, kernel), (x, dkernel)) if not any(isinstance(a, SymbolicZero) for a in pair)]
    y = form(conv, x, kernel)
    return y, sum((plain(*pair) for pair in pairs[1:]), plain(*pairs[0]))


for _form in (row_columns, winograd):
    _form.defjvp(functools.partial(_plain_jvp, _form), symbolic_zeros=True)


def windows(conv: Convolution, x: Float[Array, "n h w c"]) -> list[tuple[tuple[int, int], Float[Array, "n ho wo c"]]]:
    """For each kernel element, the part of the padded image that it meets."""
    x = jnp.pad(x, ((0, 0), *conv.pads, (0, 0))) if any(map(any, conv.pads)) else x
    (n, _, _, c), (sh, sw), (ho, wo) = x.shape, conv.strides, conv.size
    return [
        ((i, j), lax.slice(x, (0, i, j, 0), (n, i + (ho - 1) * sh + 1, j + (wo - 1) * sw + 1, c), (1, sh, sw, 1)))
        for i in range(conv.kernel[0])
        for j in range(conv.kernel[1])
    ]


def product(x: Float[Array, "... m k"], kernel: Float[Array, "... k n"]) -> Float[Array, "... m n"]:
    """A matrix product that sums in float32, whatever its operands are."""
    batch = tuple(range(x.ndim - 2))
    dimensions = (((x.ndim - 1,), (x.ndim - 2,)), (batch, batch))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, kernel, dimensions, preferred_element_type=wide).astype(x.dtype)


# -- pooling ----------------------------------------------------------------------------------------------------------


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
    """Pooling: on CPU down the columns, then along the rows, each as one operation on shifted images.

    XLA:CPU's windows go without its vectors, and are 3 to 7 times slower.
    """
    return _pool_by_platform(how, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pool_by_platform(how: Pool, x: Array) -> Array:
    return lax.platform_dependent(x, cpu=functools.partial(_pool_shifted, how), default=functools.partial(_pool, how))


@_pool_by_platform.defjvp
def _pool_jvp(how: Pool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """XLA's derivative: of equal values in a window one takes it all, and not each its share."""
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


# -- sums over images -------------------------------------------------------------------------------------------------


@jax.jit
def channel_mean(x: Float[Array, "... c"]) -> Float[Array, "c"]:
    """The mean over all axes but the last.

    On CPU it is a product with ones: XLA sums down columns on one core, without its vectors.
    """

    def cpu(x: Array) -> Array:
        return (jnp.ones((1, x.size // x.shape[-1]), x.dtype) @ x.reshape(-1, x.shape[-1]))[0] / (x.size // x.shape[-1])

    return lax.platform_dependent(x, cpu=cpu, default=lambda x: jnp.mean(x, range(x.ndim - 1)))


@jax.custom_jvp
def spread(values: Float[Any, "c"], like: Float[Any, "... c"]) -> Float[Array, "... c"]:
    """Values of the channels at every pixel: a broadcast, whose gradient on CPU is a product with ones, too."""
    return _broadcast(values, like)


@spread.defjvp
def _spread_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (values, like), (dvalues, _) = primals, tangents
    return spread(values, like), lax.platform_dependent(dvalues, like, cpu=_spread, default=_broadcast)


def _broadcast(values: Float[Any, "c"], like: Float[Any, "... c"]) -> Array:
    return jnp.broadcast_to(values, like.shape)


def _spread(values: Float[Any, "c"], like: Float[Any, "... c"]) -> Array:
    ones = jnp.ones((like.size // like.shape[-1], 1), values.dtype)
    return (ones @ values[None]).reshape(like.shape)


# -- Winograd's minimal filtering --------------------------------------------------------------------------------------
# Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015): m outputs of a kernel of r elements come
# from m + r - 1 inputs by as many products, where the sum needs m r; in two dimensions, both are squared. The tiles of
# all images are gathered, so that the products are matrix products.

#: Where the polynomials behind it are evaluated, the first m + r - 2 of them: small numbers and their inverses keep the
#: error small, 8e-6 of the largest magnitude where all are used.
POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "4/3", "-4/3")))


@functools.cache
def minimal_filtering(kernel: int, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices B^T (of the input), G (of the kernel) and A^T (of the output) for one dimension (Cook and Toom)."""
    points = POINTS[: tile + kernel - 2]

    def polynomial(roots: Sequence[Fraction]) -> np.ndarray:
        """Its coefficients, the constant first, among as many as B^T has columns."""
        found = functools.reduce(lambda p, root: np.convolve(p, [-root, 1]), roots, np.array([Fraction(1)]))
        return np.concatenate([found, [0] * (len(points) + 1 - len(found))])

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
    """The side of the output tile: 4, or 2 where the image is so small that tiles of 4 would mostly hang over."""
    return 4 if min(conv.size) > 8 else 2


def winograd_kernel(kernel: Any, tile: int) -> Any:
    """G kernel G^T of a kernel (kh, kw, c, o), NumPy or JAX: a matrix (c, o) for each of the products."""
    sides = [minimal_filtering(k, tile)[1] if k > 1 else np.ones((1, 1)) for k in kernel.shape[:2]]
    both = np.kron(*sides).astype(np.float32)
    return (both @ kernel.reshape(both.shape[1], -1)).reshape(len(both), *kernel.shape[2:])


def winograd_transformed(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "products c o"]
) -> Float[Array, "n ho wo o"]:
    """A convolution of stride 1 from the kernel that `winograd_kernel` made."""
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
    stacked = x.reshape(kernel.shape[0], -1, conv.inputs)
    y = product(stacked, kernel).reshape(len(bh), len(bw), n, th, tw, conv.outputs)
    rows = combine(ah, list(y))
    y = jnp.stack([jnp.stack(combine(aw, list(row)), axis=3) for row in rows], axis=2)  # n th m tw m o
    return y.reshape(n, th * mh, tw * mw, conv.outputs)[:, :ho, :wo]


def winograd_products(kernel: Sequence[int], tile: int) -> int:
    """How many matrices `winograd_kernel` makes of a kernel (kh, kw)."""
    return math.prod(tile + k - 1 for k in kernel if k > 1)


def filtered(matrix: np.ndarray, x: Array, step: int, count: int, axis: int) -> Array:
    """The sums of x moved by 0, 1, ..., as each row of a constant matrix weighs them, at every `step` along an axis.

    As one product: its sums written out would be no faster, and would take many times longer to compile.
    """
    if len(matrix) == 1:
        return x[None]
    moved = [lax.slice_in_dim(x, i, i + (count - 1) * step + 1, step, axis) for i in range(len(matrix))]
    terms = lax.optimization_barrier(jnp.stack([each.reshape(-1) for each in moved]))
    return (jnp.asarray(matrix, x.dtype) @ terms).reshape(len(matrix), *moved[0].shape)


def combine(matrix: np.ndarray, terms: Sequence[Array]) -> list[Array]:
    """Row by row of a constant matrix, the sum of the terms; what is zero is left out."""
    sums = []
    for row in matrix.tolist():
        scaled = [t if c == 1 else t * c for c, t in zip(row, terms, strict=True) if c]
        sums.append(functools.reduce(jnp.add, scaled))
    return sums


# -- the choice -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to lower a convolution.

    Attributes:
        fits: whether it is the way for such a convolution.
        run: (convolution, images, kernel) to output.
    """

    fits: Callable[[Convolution], bool]
    run: Callable[[Convolution, Array, Array], Array]


def is_depthwise(conv: Convolution) -> bool:
    """One kernel for each channel."""
    return conv.groups == conv.inputs > 1


def is_pointwise(conv: Convolution) -> bool:
    """A kernel of one pixel, and all channels together."""
    return conv.kernel == (1, 1) and conv.groups == 1


def is_small_stem(conv: Convolution) -> bool:
    """So few terms in a sum that XLA's convolution can't use its vectors: 3x3 on RGB."""
    return conv.groups == 1 and conv.kernel[0] * conv.kernel[1] * conv.inputs <= 32 and conv.inputs <= 4


def is_narrow(conv: Convolution) -> bool:
    """Of bfloat16, for which only a matrix product reaches a CPU's units; the windows must stay in its cache."""
    windows = conv.images * math.prod(conv.size) * math.prod(conv.kernel) * conv.inputs
    return conv.dtype == jnp.bfloat16 and conv.groups == 1 and 2 * windows <= 1 << 24


#: The kernels that minimal filtering was measured for.
FILTERED = ((3, 3), (5, 5), (1, 7), (7, 1))


def is_winograd(conv: Convolution, prepared: bool = False) -> bool:
    """A kernel of `FILTERED` where the products saved outweigh the transforms.

    Those of the image touch each pixel once for each channel, so there must be channels enough; a transformed tile is
    2.25 to 6.25 times its pixels, so past some size memory is what counts. That of the kernel, unless it is prepared,
    needs many pixels to pay where it has two dimensions.
    """
    if conv.kernel not in FILTERED or conv.groups != 1 or conv.strides != (1, 1) or conv.dtype != jnp.float32:
        return False
    pixels = conv.images * conv.size[0] * conv.size[1]
    few, many = sorted((conv.inputs, conv.outputs))
    cheap = prepared or 1 in conv.kernel or pixels >= 4 * conv.inputs
    return few >= 48 and 150 <= pixels <= (1 << 21) // many and cheap


#: What a CPU runs instead of XLA's convolution: the first that fits.
CPU_FORMS = (
    Form(is_depthwise, depthwise_shifted),
    Form(is_pointwise, pointwise),
    Form(is_small_stem, row_columns),
    Form(is_narrow, columns),
    Form(is_winograd, winograd),
)


def cpu_form(conv: Convolution) -> Callable[[Convolution, Array, Array], Array] | None:
    """How a CPU runs a convolution, of (convolution, images, kernel); None for XLA's own way."""
    return next((form.run for form in CPU_FORMS if form.fits(conv)), None)
