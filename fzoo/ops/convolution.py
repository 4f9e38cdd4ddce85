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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from fzoo.ops import onednn
from fzoo.ops.platforms import by_platform, known_platform, may_call_library
from fzoo.ops.processor import has_wide_vectors
from fzoo.ops.reductions import is_sharded
from fzoo.ops.shapes import NHWC, Convolution, Side, padded, product, product_sums, windows
from fzoo.ops.winograd import winograd_kernel, winograd_tile, winograd_transformed

#: What moves of images and of a kernel; `SymbolicZero` for what does not.
Tangents = tuple[Array | SymbolicZero, Array | SymbolicZero]


def conv_general_dilated(
    lhs: Float[Array, "n h w c"],
    rhs: Float[Array, "kh kw i o"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[Side, Side]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | tuple[str, str, str] | None = NHWC,
    feature_group_count: int = 1,
    form: str | None = None,
    **options: Any,
) -> Float[Array, "n ho wo o"]:
    """Do what `lax.conv_general_dilated` does, in a faster form where `CPU_FORMS` has one and on a CPU.

    `form` is the name of one, or `LIBRARY`, that was found to be the fastest, and is taken where it computes this.
    """
    is_nhwc = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == NHWC
    if is_nhwc and all(d == 1 for d in lhs_dilation or ()):
        shapes = lhs.shape, rhs.shape, window_strides, padding, feature_group_count
        conv = Convolution.of(*shapes, lhs.dtype, rhs_dilation)
        run = cpu_form(conv, form)
        if run is not None:
            return _by_platform(run, conv, tuple(options.items()), known_platform(), lhs, rhs)
        if conv.is_open:
            return plain(conv, lhs, rhs, feature_group_count=feature_group_count, **options)
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # a network repeats its shapes: each is traced once
def _by_platform(
    run: Callable[[Convolution, Array, Array], Array],
    conv: Convolution,
    options: tuple[tuple[str, Any], ...],
    platform: str | None,
    lhs: Array,
    rhs: Array,
) -> Array:
    library = functools.partial(plain, conv, feature_group_count=conv.groups, **dict(options))
    return by_platform(platform, lhs, rhs, cpu=functools.partial(run, conv), default=library)


def plain(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c_group o"], **options: Any
) -> Float[Array, "n ho wo o"]:
    """Convolve as XLA does; the groups are among the options."""
    pads = conv.pads
    if conv.is_open:  # XLA pads by numbers
        x, pads = padded(conv, x), "VALID"
    options |= {"rhs_dilation": conv.dilation, "dimension_numbers": NHWC}
    return lax.conv_general_dilated(x, kernel, conv.strides, pads, **options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)  # its derivative calls it, too
def depthwise_shifted(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw 1 cm"]
) -> Float[Array, "n ho wo cm"]:
    """Convolve depthwise as one multiply-add of a shifted image for each kernel element."""
    return _shifted(conv, x, kernel)


@functools.partial(depthwise_shifted.defjvp, symbolic_zeros=True)
def _depthwise_jvp(conv: Convolution, primals: tuple[Array, Array], tangents: Tangents) -> tuple[Array, Array]:
    """Sum the same, written so that what JAX makes of it for the gradients is as good.

    JAX turns what is linear around, step by step: what is placed into a sum becomes a window that is cut out of it.
    """
    (x, kernel), (dx, dkernel) = primals, tangents
    parts, known = [], not conv.is_open and not is_sharded(x)
    if not isinstance(dx, SymbolicZero):
        placed = known and conv.strides == (1, 1) and conv.outputs == conv.inputs
        parts.append((_placed if placed else depthwise_shifted)(conv, dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        parts.append((_by_row if known else _shifted)(conv, x, dkernel))
    return depthwise_shifted(conv, x, kernel), sum(parts[1:], parts[0])


def _shifted(conv: Convolution, x: Array, kernel: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)  # before the windows are cut out: each would be rounded for itself
    total, weights = jnp.zeros((), wide), kernel.reshape(-1, conv.outputs).astype(wide)
    for i, (_, window) in enumerate(windows(conv, _for_outputs(conv, x.astype(wide)))):
        total = total + window * lax.broadcast_to_rank(lax.index_in_dim(weights, i, keepdims=False), window.ndim)
    return lax.convert_element_type(total, x.dtype)


def _for_outputs(conv: Convolution, x: Array) -> Array:
    """Repeat channels where a kernel has several for each: output c * m + j reads channel c."""
    return x if conv.outputs == conv.inputs else jnp.repeat(x, conv.outputs // conv.inputs, axis=3)


def _placed(conv: Convolution, x: Array, kernel: Array) -> Array:
    """Compute `_shifted` of stride 1 as a sum of the image, weighted and placed, for each kernel element.

    The gradient of the image is a sum of windows, one operation, which takes a fifth of the time of that of windows.
    """
    reach = [(k - 1) * by for k, by in zip(conv.kernel, conv.dilation, strict=True)]
    total = jnp.zeros((), jnp.float32)
    for i, j in np.ndindex(conv.kernel):
        down, along = (start * by for start, by in zip((i, j), conv.dilation, strict=True))
        around = [(reach[0] - down, down), (reach[1] - along, along)]
        weight = lax.broadcast_to_rank(kernel[i, j, 0], x.ndim)
        total = total + jnp.pad(x.astype(jnp.float32) * weight, ((0, 0), *around, (0, 0)))
    edges = [(pads[0] - r, pads[1] - r, 0) for pads, r in zip(conv.pads, reach, strict=True)]
    return lax.pad(total, jnp.zeros((), total.dtype), [(0, 0, 0), *edges, (0, 0, 0)]).astype(x.dtype)


def _by_row(conv: Convolution, x: Array, kernel: Array) -> Array:
    """Compute `_shifted` a row of the output at a time, and of that an element of the kernel.

    The kernel's gradient, a sum over all pixels for each of its elements, has a row in the cache for all of them, and
    what is in a loop is compiled once. The images have a kernel each: those on several devices are added up at the end.
    """
    (down, along), (below, beside), (ho, wo) = conv.strides, conv.dilation, conv.size
    x = padded(conv, _for_outputs(conv, x))
    places = np.array(list(np.ndindex(conv.kernel))) * (below, beside)
    kernels = kernel.astype(jnp.float32).reshape(len(places), 1, 1, -1)
    kernels = jnp.broadcast_to(kernels, (len(places), x.shape[0], 1, x.shape[3]))

    @jax.checkpoint  # the windows are cut out again, and not kept
    def row(x: Array, kernels: Array, number: Array) -> Array:
        def add(total: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
            (top, left), weights = given
            sizes = x.shape[0], 1, (wo - 1) * along + 1, x.shape[3]
            line = lax.dynamic_slice(x, (0, number * down + top, left, 0), sizes)
            return total + line[:, 0, ::along] * weights, None

        start = jnp.zeros((x.shape[0], wo, x.shape[3]), jnp.float32)
        return lax.scan(add, start, (jnp.asarray(places), kernels))[0]

    rows = lax.map(functools.partial(row, x, kernels), jnp.arange(ho))
    return jnp.moveaxis(rows, 0, 1).astype(x.dtype)


def by_groups(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c_group o"]
) -> Float[Array, "n ho wo o"]:
    """Convolve in groups as a convolution of its own for each, or for a few small ones together.

    Those share a kernel that is zero between them: XLA's convolution runs far below its best for a few channels.
    """
    together = groups_together(conv)
    parts = conv.groups // together
    kernels = jnp.split(kernel, parts, axis=3)
    if together > 1:
        mask = jnp.repeat(jnp.repeat(jnp.eye(together), conv.inputs // conv.groups, 0), conv.outputs // conv.groups, 1)
        kernels = [jnp.tile(part, (1, 1, together, 1)) * mask.astype(part.dtype)[None, None] for part in kernels]
    run = functools.partial(plain, conv)
    return jnp.concatenate([run(*part) for part in zip(jnp.split(x, parts, axis=3), kernels, strict=True)], axis=3)


def groups_together(conv: Convolution) -> int:
    """Return how many groups make some 16 channels together: a divisor of their number."""
    most = max(1, 16 // (conv.inputs // conv.groups))
    return next(count for count in range(most, 0, -1) if conv.groups % count == 0)


def pointwise(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "1 1 c o"]
) -> Float[Array, "n ho wo o"]:
    """Convolve by 1x1 as a matrix product."""
    [(_, x)] = windows(conv, x)
    return product(x, kernel[0, 0])


def columns(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c o"]
) -> Float[Array, "n ho wo o"]:
    """Convolve as a matrix product with the windows written out (im2col)."""
    x = lax.optimization_barrier(jnp.concatenate([window for _, window in windows(conv, x)], axis=-1))
    return product(x, kernel.reshape(-1, conv.outputs))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def shifted_products(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c o"]
) -> Float[Array, "n ho wo o"]:
    """Convolve as a sum of matrix products, one for each kernel element: no windows are written out."""
    total = jnp.zeros((), jnp.float32)
    for (i, j), (_, window) in zip(np.ndindex(conv.kernel), windows(conv, x), strict=True):
        total = total + product_sums(window, kernel[i, j])
    return lax.convert_element_type(total, x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def row_columns(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c o"]
) -> Float[Array, "n ho wo o"]:
    """Do as `columns`, a row of a window at a time: its pixels lie side by side, which counts where they are small."""
    (kh, kw), (down, right), (ho, wo) = conv.kernel, conv.strides, conv.size
    x = jnp.pad(x, ((0, 0), *conv.pads, (0, 0)))
    x = x.reshape(*x.shape[:2], -1)
    runs = np.arange(wo)[:, None] * right * conv.inputs + np.arange(kw * conv.inputs)
    rows = [lax.slice_in_dim(x, i, i + (ho - 1) * down + 1, down, 1)[:, :, runs] for i in range(kh)]
    x = lax.optimization_barrier(jnp.concatenate(rows, axis=-1))
    return product(x, kernel.reshape(-1, conv.outputs))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def winograd(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c o"]
) -> Float[Array, "n ho wo o"]:
    """Convolve with stride 1 by Winograd's minimal filtering, the kernel transformed on the way."""
    return winograd_transformed(conv, x, winograd_kernel(kernel, winograd_tile(conv)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def by_onednn(
    conv: Convolution, x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c_group o"]
) -> Float[Array, "n ho wo o"]:
    """Convolve by oneDNN, past XLA."""
    return onednn.convolve(conv, x, kernel)


def _plain_jvp(
    form: Callable[[Convolution, Array, Array], Array],
    conv: Convolution,
    primals: tuple[Array, Array],
    tangents: Any,
) -> tuple[Array, Array]:
    """Derive by XLA's convolution: the transposes of a form's steps are ten times slower than its own."""
    (x, kernel), (dx, dkernel) = primals, tangents
    pairs = [pair for pair in ((dx, kernel), (x, dkernel)) if not any(isinstance(a, SymbolicZero) for a in pair)]
    y = form(conv, x, kernel)
    derive = functools.partial(plain, conv, feature_group_count=conv.groups)
    return y, sum((derive(*pair) for pair in pairs[1:]), derive(*pairs[0]))


for _form in (shifted_products, row_columns, winograd, by_onednn):
    _form.defjvp(functools.partial(_plain_jvp, _form), symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to lower a convolution.

    Attributes:
        name: what the choice of a tuned network calls it.
        fits: whether it is the way for such a convolution, where nothing was timed.
        run: (convolution, images, kernel) to output.
        computes: whether it can be the way.
        takes_dilated: whether also a kernel whose elements are apart.
        takes_open: whether also images whose height and width `jax.export` leaves open.
    """

    name: str
    fits: Callable[[Convolution], bool]
    run: Callable[[Convolution, Array, Array], Array]
    computes: Callable[[Convolution], bool]
    takes_dilated: bool = False
    takes_open: bool = False

    def takes(self, conv: Convolution) -> bool:
        """Tell whether it computes such a convolution."""
        lies_so = (self.takes_dilated or not is_dilated(conv)) and (self.takes_open or not conv.is_open)
        return lies_so and self.computes(conv)


#: What a choice of forms calls XLA's own convolution.
LIBRARY = "library"


def is_depthwise(conv: Convolution) -> bool:
    """Tell whether there is one kernel for each channel."""
    return conv.groups == conv.inputs > 1


def is_dilated(conv: Convolution) -> bool:
    """Tell whether the kernel's elements are apart."""
    return conv.dilation != (1, 1)


def is_grouped(conv: Convolution) -> bool:
    """Tell whether there are groups of so few channels that XLA's own grouped convolution is slower."""
    return 1 < conv.groups < conv.inputs and conv.inputs // conv.groups < 48


def is_pointwise(conv: Convolution) -> bool:
    """Tell whether the kernel is of one pixel, and for all channels together."""
    return conv.kernel == (1, 1) and conv.groups == 1


def is_small_stem(conv: Convolution) -> bool:
    """Tell whether a sum has so few terms that XLA's convolution can't use its vectors: 3x3 on RGB."""
    return conv.groups == 1 and conv.kernel[0] * conv.kernel[1] * conv.inputs <= 32 and conv.inputs <= 4


#: The most bytes of float32 sums that stay in the caches while products are added up, and of windows written out.
SUMS, WINDOWS = 13 << 19, 1 << 22


def is_narrow(conv: Convolution) -> bool:
    """Tell whether it is of bfloat16, whose units on a CPU only a matrix product uses, with terms enough for one."""
    return conv.dtype == jnp.bfloat16 and conv.groups == 1 and conv.inputs >= 64


def is_narrow_and_dense(conv: Convolution) -> bool:
    """Tell whether products of bfloat16 can be added up: windows lie as the images do, the sums are in the cache."""
    if not is_narrow(conv) or conv.strides != (1, 1):
        return False
    return conv.is_open or 4 * conv.pixels * conv.outputs <= SUMS


def is_narrow_and_small(conv: Convolution) -> bool:
    """Tell whether windows of bfloat16 can be written out for one product."""
    terms = math.prod(conv.kernel) * conv.inputs
    return is_narrow(conv) and 2 * conv.pixels * terms <= WINDOWS


#: The kernels that minimal filtering was measured for.
FILTERED = ((3, 3), (5, 5), (1, 7), (7, 1))


def is_winograd(conv: Convolution, prepared: bool = False) -> bool:
    """Tell whether the kernel is of `FILTERED`, and the products saved outweigh the transforms.

    Those of the image touch each pixel once for each channel, so there must be channels enough; a transformed tile is
    2.25 to 6.25 times its pixels, so past some size memory is what counts. That of the kernel, unless it is prepared,
    needs many pixels to pay where it has two dimensions.
    """
    if not is_filtered(conv):
        return False
    few, many = sorted((conv.inputs, conv.outputs))
    cheap = prepared or 1 in conv.kernel or conv.pixels >= 4 * conv.inputs
    least = 32 if has_wide_vectors() and conv.pixels >= 784 else 48
    return few >= least and 150 <= conv.pixels <= (1 << 21) // many and cheap


def has_one_group(conv: Convolution) -> bool:
    """Tell whether each output is of all channels."""
    return conv.groups == 1


def has_groups(conv: Convolution) -> bool:
    """Tell whether each output is of some channels."""
    return 1 < conv.groups < conv.inputs


def is_filtered(conv: Convolution) -> bool:
    """Tell whether Winograd's algorithm computes it, in float32, where it keeps its digits."""
    filtered = conv.kernel in FILTERED and conv.strides == (1, 1) and not is_dilated(conv)
    return filtered and conv.groups == 1 and conv.dtype == jnp.float32


def is_onednns(conv: Convolution) -> bool:
    """Tell whether oneDNN is there for it, in a program that may call it."""
    return may_call_library() and onednn.computes(conv) and onednn.has_onednn()


#: Operations of a call from which on oneDNN is ahead in float32, whatever the convolution: each call of it has a cost.
LARGE_CALL = 300_000_000


def is_fast_in_onednn(conv: Convolution) -> bool:
    """Tell whether oneDNN is the fastest where it is there, by what whole networks take on AVX512_BF16.

    In bfloat16, always. In float32, not where Winograd's algorithm saves more, or where it is called for little: for
    depthwise kernels from 5x5 on, for other kernels that are no stem, and for what is large.
    """
    if conv.dtype == jnp.bfloat16 or not has_wide_vectors():
        return has_wide_vectors()
    if is_depthwise(conv):
        return conv.strides == (1, 1) and math.prod(conv.kernel) >= 25
    kernel = math.prod(conv.kernel) > 1 and conv.inputs > 4 and conv.groups == 1
    return (kernel or conv.flops >= LARGE_CALL) and not is_winograd(conv, prepared=True)


#: What a CPU runs instead of XLA's convolution: the first that fits.
CPU_FORMS = (
    Form("onednn", is_fast_in_onednn, by_onednn, is_onednns, takes_dilated=True),
    Form("shifted", is_depthwise, depthwise_shifted, is_depthwise, takes_dilated=True, takes_open=True),
    Form("by groups", is_grouped, by_groups, has_groups, takes_open=True),
    Form("product", is_pointwise, pointwise, is_pointwise, takes_open=True),
    Form("columns by rows", is_small_stem, row_columns, has_one_group),
    Form("shifted products", is_narrow_and_dense, shifted_products, has_one_group, takes_dilated=True, takes_open=True),
    Form("columns", is_narrow_and_small, columns, has_one_group),
    Form("winograd", is_winograd, winograd, is_filtered),
)


def cpu_form(conv: Convolution, chosen: str | None = None) -> Callable[[Convolution, Array, Array], Array] | None:
    """Choose how a CPU runs a convolution: a function of (convolution, images, kernel), or None for XLA's own way.

    `chosen` is the name of a form, or `LIBRARY`; where that does not compute this convolution, the first that fits is.
    """
    if chosen == LIBRARY and not conv.is_open:
        return None
    forms = [form for form in CPU_FORMS if form.takes(conv)]
    forms = [form for form in forms if form.name == chosen] or [form for form in forms if form.fits(conv)]
    return forms[0].run if forms else None
