"""A network that samples its maps more densely than its weights were trained with: the algorithme à trous.

Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully Connected
CRFs", https://arxiv.org/abs/1606.00915. Where a stride would take a map beyond the output stride, the window moves by
single values, and the taps of all later ones lie as far apart as if it had not: every r-th value is what the network
computes without, where r is what the strides left out so far make together. The others are what it computes for the
image moved by less than its stride.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from fzoo.ops.shapes import Side


@dataclasses.dataclass(frozen=True)
class Axis:
    """How a map lies along the height or the width.

    Attributes:
        stride: pixels of the image between two values of the map, if no stride were left out.
        dilation: how many values there are for each of those.
        zeros: what the ZeroPadding2D that made the map put before and after it, counted as without the option.
    """

    stride: int = 1
    dilation: int = 1
    zeros: tuple[Side, Side] = (0, 0)

    def plain_side(self, side: Side) -> Side:
        """Return how long the map would be, if no stride were left out."""
        return -(-side // self.dilation)


class Window(NamedTuple):
    """How a window goes along an axis: what `lax` takes, and how its output lies.

    Attributes:
        stride: of the window.
        pads: what is padded before and after.
        dilation: of its taps.
        axis: of the output.
    """

    stride: int
    pads: tuple[int, int]
    dilation: int
    axis: Axis


def dense_window(
    side: int, axis: Axis, output_stride: int, taps: int, stride: int, padding: str | tuple[int, int]
) -> Window:
    """Find how a window goes along an axis of a map so that it stays as dense as `output_stride` says.

    What is padded before stays what it is without the option, so that every r-th value is the same; what is padded
    after keeps the size where the layer, or a ZeroPadding2D before it, pads the image's border. Nothing is padded for a
    layer of padding "VALID" alone.

    Args:
        side: length of the map.
        axis: how it lies.
        output_stride: pixels of the image between two values, at the most.
        taps: of the window.
        stride: of it.
        padding: lax's "SAME" or "VALID", or what is padded before and after.
    """
    step = math.gcd(stride, max(1, output_stride * axis.dilation // axis.stride))
    plain = axis.plain_side(side)
    if padding == "SAME":
        both = max((-(-plain // stride) - 1) * stride + taps - plain, 0)
        pads = both // 2, both - both // 2
    else:
        pads = (0, 0) if isinstance(padding, str) else padding
    before, after = (own + zeros for own, zeros in zip(pads, axis.zeros, strict=True))
    inner = plain - sum(axis.zeros)
    is_whole = (inner + before + after - taps) // stride + 1 == -(-inner // stride)  # as many values as "SAME" gives
    if step < stride and is_whole and (padding == "SAME" or before + after):
        pads = pads[0], max(after, taps - 1 - before) - axis.zeros[1]
    before, after = (axis.dilation * n for n in pads)
    dilation = axis.dilation if taps > 1 else 1
    return Window(step, (before, after), dilation, Axis(axis.stride * stride, axis.dilation * stride // step))
