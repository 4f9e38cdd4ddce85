"""Keras's conventions of sizes, padding and names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array

from fzoo.ops.shapes import Pads

Padding = str | Pads


def of_channels(constant: float | Sequence[float], x: Array) -> np.ndarray:
    """Give a constant for each channel, or for all, as an array of x's rank."""
    return np.reshape(np.asarray(constant, np.float32), (1,) * (x.ndim - 1) + (-1,))


def pair(n: int | tuple[int, int]) -> tuple[int, int]:
    """Give both spatial values of a size that is one number or two."""
    return (n, n) if isinstance(n, int) else n


def lax_padding(padding: Padding) -> Padding:
    """Translate Keras's "same" and "valid" into lax's "SAME" and "VALID"."""
    return padding.upper() if isinstance(padding, str) else padding


def snake_case(kind: str) -> str:
    """Put a class name into Keras's snake case: "Conv2D" gives "conv2d", "ReLU" gives "re_lu"."""
    kind = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)
    return re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round a number of channels to a multiple of `divisor`, but never down by more than 10 %.

    From the MobileNet reference code, as Keras has it.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
