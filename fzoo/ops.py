"""How a convolution is lowered on each platform.

`conv_general_dilated` has the signature that `flax.linen.Conv` calls, so a model says *what* it convolves
and this file says *how*. Everything here differentiates, and `lax.platform_dependent` picks the form when
the program is lowered, so the same trace runs on (and exports for) CPU, GPU and TPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


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
    """`lax.conv_general_dilated`, with a faster form of it where one is known for the platform.

    XLA:CPU runs a depthwise convolution as one scalar loop for each channel; the same sum written as shifted
    multiply-adds is vectorised over the channels. Every other shape is left to XLA.
    """

    def library(lhs, rhs):
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

    def shifted(lhs, rhs):
        pads = padding if isinstance(padding, str) else tuple(tuple(p) for p in padding)
        return depthwise_shifted(lhs, rhs, tuple(window_strides), pads)

    nhwc = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == NHWC
    undilated = all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    depthwise = rhs.shape[2] == 1 and feature_group_count == lhs.shape[3] > 1
    if nhwc and undilated and depthwise:
        return lax.platform_dependent(lhs, rhs, cpu=shifted, default=library)
    return library(lhs, rhs)


@functools.partial(jax.jit, static_argnames=("strides", "padding"))  # a network repeats its shapes: each is traced once
def depthwise_shifted(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw 1 cm"],
    strides: tuple[int, int],
    padding: str | tuple[tuple[int, int], ...],
) -> Float[Array, "n ho wo cm"]:
    """A depthwise convolution as one multiply-add of a shifted image for each kernel element."""
    n, h, w, channels = x.shape
    kh, kw, _, outputs = kernel.shape
    if isinstance(padding, str):
        padding = tuple(lax.padtype_to_pads((h, w), (kh, kw), strides, padding))
    rows, columns = padding
    x = jnp.pad(x, ((0, 0), rows, columns, (0, 0)))
    if outputs != channels:  # output c * m + j reads channel c
        x = jnp.repeat(x, outputs // channels, axis=3)
    (sh, sw), (_, h, w, _) = strides, x.shape
    ho, wo = (h - kh) // sh + 1, (w - kw) // sw + 1
    total = jnp.zeros((), jnp.float32)
    for i in range(kh):
        for j in range(kw):
            window = lax.slice(
                x,
                (0, i, j, 0),
                (n, i + (ho - 1) * sh + 1, j + (wo - 1) * sw + 1, outputs),
                (1, sh, sw, 1),
            )
            total = total + window * kernel[i, j, 0]
    return lax.convert_element_type(total, x.dtype)
