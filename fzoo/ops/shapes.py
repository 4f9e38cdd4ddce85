"""The shape of a convolution, and the steps that several ways to compute it share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from fzoo.types import DTypeLike

NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


#: An integer, or an expression where `jax.export` leaves a size open.
Side = Any

#: Before and after, for height and width.
Pads = tuple[tuple[Side, Side], tuple[Side, Side]]


def has_open_side(*sides: Side) -> bool:
    """Tell whether `jax.export` leaves one of these sizes open."""
    return any(map(is_symbolic_dim, sides))


def windows_along(
    height: Side,
    width: Side,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int],
) -> tuple[Side, Side]:
    """Count the windows down and along an image.

    Rounded up, as lax has "SAME": of two sizes that are equal, `jax.export` only sees it where they are computed alike.
    """
    sides = zip((height, width), kernel, strides, pads, dilation, strict=True)
    down, along = (-(((k - 1) * by - side - sum(around)) // stride) for side, k, stride, around, by in sides)
    return down, along


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The shape of an NHWC convolution: what a form is chosen by.

    Attributes:
        images, height, width, inputs: shape of the input; one image where `jax.export` leaves their number open. It
            may leave the height and the width open, too.
        kernel, outputs, groups: of the kernel.
        strides, pads: for height and width.
        dtype: of the images and the kernel.
        dilation: how far the kernel's elements are apart, for height and width; 1 where there is only one.
    """

    images: int
    height: Side
    width: Side
    inputs: int
    kernel: tuple[int, int]
    outputs: int
    groups: int
    strides: tuple[int, int]
    pads: Pads
    dtype: np.dtype
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(
        cls,
        images: Sequence[Side],
        kernel: Sequence[int],
        strides: Sequence[int],
        padding: str | Sequence[tuple[Side, Side]],
        groups: int = 1,
        dtype: DTypeLike = jnp.float32,
        dilation: Sequence[int] | None = None,
    ) -> Convolution:
        """Read it from the shapes (n, h, w, c) and (kh, kw, i, o), and lax's padding."""
        (n, h, w, c), (kh, kw, _, outputs) = images, kernel
        n = int(n) if isinstance(n, Integral) else 1  # a symbolic dimension can't be compared
        down, right = (int(s) for s in strides)
        below, beside = (int(by) if k > 1 else 1 for k, by in zip((kh, kw), dilation or (1, 1), strict=True))
        if isinstance(padding, str):
            reach = (kh - 1) * below + 1, (kw - 1) * beside + 1
            padding = lax.padtype_to_pads((h, w), reach, (down, right), padding)
        rows, columns = ((whole(before), whole(after)) for before, after in padding)
        strides, apart = (down, right), (below, beside)
        return cls(n, h, w, c, (kh, kw), outputs, groups, strides, (rows, columns), jnp.dtype(dtype), apart)

    @property
    def is_open(self) -> bool:
        """Whether `jax.export` leaves the height or the width open."""
        return has_open_side(self.height, self.width)

    @property
    def size(self) -> tuple[Side, Side]:
        """Height and width of the output."""
        return windows_along(self.height, self.width, self.kernel, self.strides, self.pads, self.dilation)

    @property
    def pixels(self) -> Side:
        """How many the outputs of all images have."""
        return self.images * self.size[0] * self.size[1]

    @property
    def flops(self) -> int:
        """2 for each multiply-add."""
        terms = self.inputs // self.groups * self.kernel[0] * self.kernel[1]
        return 2 * self.pixels * self.outputs * terms


def whole(side: Side) -> Side:
    """Make Python's own integer of any, and leave what is open as it is."""
    return side if is_symbolic_dim(side) else int(side)


def padded(conv: Convolution, x: Float[Array, "n h w c"]) -> Float[Array, "n hp wp c"]:
    """Pad images by zeros, and leave nothing after the last window where the size is open."""
    x = jnp.pad(x, ((0, 0), *conv.pads, (0, 0))) if any(map(any, conv.pads)) else x
    return met(x, conv.size, conv.kernel, conv.strides, conv.dilation) if conv.is_open else x


def met(
    x: Float[Array, "n hp wp c"],
    size: tuple[Side, Side],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
) -> Float[Array, "n hm wm c"]:
    """Leave of padded images what so many windows meet."""
    sides = zip(size, kernel, strides, dilation, strict=True)
    height, width = ((side - 1) * stride + (k - 1) * by + 1 for side, k, stride, by in sides)
    return lax.dynamic_slice(x, (0, 0, 0, 0), (x.shape[0], height, width, x.shape[3]))


def windows(conv: Convolution, x: Float[Array, "n h w c"]) -> list[tuple[tuple[int, int], Float[Array, "n ho wo c"]]]:
    """Cut out, for each kernel element, the part of the padded image that it meets; with it, where that begins."""
    x = padded(conv, x)
    (n, _, _, c), (sh, sw), (ho, wo) = x.shape, conv.strides, conv.size
    places = [(i * conv.dilation[0], j * conv.dilation[1]) for i, j in np.ndindex(conv.kernel)]
    return [
        ((i, j), lax.slice(x, (0, i, j, 0), (n, i + (ho - 1) * sh + 1, j + (wo - 1) * sw + 1, c), (1, sh, sw, 1)))
        for i, j in places
    ]


def product(x: Float[Array, "... k"], kernel: Float[Array, "... k n"]) -> Float[Array, "... n"]:
    """Multiply rows by a matrix, or by one of several for each of x's first axis, with sums in float32 at least.

    The axes between stay as they are: images that lie on several devices, and are made one axis with others, would be
    gathered.
    """
    return product_sums(x, kernel).astype(x.dtype)


def product_sums(x: Float[Array, "... k"], kernel: Float[Array, "... k n"]) -> Float[Array, "... n"]:
    """Do as `product`, and leave the sums as wide as they are."""
    batch = tuple(range(kernel.ndim - 2))
    dimensions = (((x.ndim - 1,), (kernel.ndim - 2,)), (batch, batch))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, kernel, dimensions, preferred_element_type=wide)
