"""From pixels to what a network takes, as Keras does it."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Images = TypeVar("Images", np.ndarray, jax.Array)


Mode = Literal["caffe", "tf", "torch", "clip", "unit", "none"]


#: The least and the largest value that preprocessing gives, by mode.
RANGES: dict[Mode, tuple[float, float]] = {
    "caffe": (-123.68, 151.061),
    "tf": (-1.0, 1.0),
    "torch": (-2.118, 2.64),
    "clip": (-1.793, 2.146),
    "unit": (0.0, 1.0),
    "none": (0.0, 255.0),
}


#: The modes, by their names.
MODES: dict[str, Mode] = {mode: mode for mode in RANGES}


#: Those that are for RGB alone; the others take any channels.
RGB_MODES: tuple[Mode, ...] = ("caffe", "torch", "clip")


#: The modes in words, for a message that asks for one.
MODES_IN_WORDS = "tf (from -1 to 1), unit (from 0 to 1), torch, clip, caffe, none (from 0 to 255 as they are)"


_CAFFE_MEAN = (103.939, 116.779, 123.68)  # B, G, R


#: Mean and standard deviation of R, G, B from 0 to 1, by mode: of ImageNet, and of what CLIP was trained on.
STATISTICS = {
    "torch": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def preprocess(images: Images, mode: Mode, *, data_format: str = "channels_last") -> Images:
    """Do what `preprocess_input` does, by mode instead of by model."""
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(f"data_format={data_format!r} given, 'channels_last' or 'channels_first' expected")
    np_like: Any = jnp if isinstance(images, jax.Array) else np
    x = np_like.asarray(images)
    axis = -1 if data_format == "channels_last" else -3
    if x.ndim not in (3, 4) or (mode in RGB_MODES and x.shape[axis] != 3):
        raise ValueError(f"images of shape {x.shape} given, three RGB channels expected ({data_format})")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.kind in "iub"):
        raise ValueError(f"images of {x.dtype} given, integers or floats expected")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(np.float32)

    def constant(values):
        shape = [3 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        return np_like.asarray(values, x.dtype).reshape(shape)

    if mode == "tf":
        x = x / np_like.asarray(127.5, x.dtype) - np_like.asarray(1, x.dtype)
    elif mode in STATISTICS:
        mean, deviation = map(constant, STATISTICS[mode])
        x = (x / np_like.asarray(255, x.dtype) - mean) / deviation
    elif mode == "unit":
        x = x / np_like.asarray(255, x.dtype)
    elif mode == "caffe":
        x = np_like.flip(x, axis) - constant(_CAFFE_MEAN)
    elif x is images:
        x = x.copy()
    return x


def check_range(images: Images, mode: Mode | None, name: str = "the network") -> None:
    """Refuse images whose values can't be what a network takes: floats that are preprocessed, or pixels of integers.

    Args:
        images: any shape, NumPy or JAX, not traced.
        mode: of the network's preprocessing; None where it takes floats of any range and no pixels.
        name: of the network, for the message.

    Raises:
        ValueError: integers that are no pixels (below 0 or above 255) or that nothing preprocesses, floats that are not
            finite, or that preprocessing in this mode can't have given.
    """
    floating = jnp.issubdtype(images.dtype, jnp.floating)
    if not floating and images.dtype.kind not in "iu":
        raise ValueError(f"images of {images.dtype} given, integers or floats expected")
    if not images.size:
        return
    fault = ""
    if floating and not np.isfinite([float(images.min()), float(images.max())]).all():
        fault = ": finite numbers expected"
    elif floating and mode is not None and not has_values_of(images, mode):
        least, most = RANGES[mode]
        fault = (
            f", which {name} takes from {least:g} to {most:g}: integers from 0 to 255 are preprocessed, floats are not"
        )
    elif not floating and mode is None:
        fault = f", which {name} does not preprocess: floats expected"
    elif not floating and not has_values_of(images, "none"):
        fault = ", pixels from 0 to 255 expected"
    if fault:
        raise ValueError(f"{values_in_words(images)} given{fault}")


def values_in_words(images: Images) -> str:
    """Say of which dtype images are, and from which value to which; there is one at least."""
    return f"images of {images.dtype} from {float(images.min()):g} to {float(images.max()):g}"


def has_values_of(images: Images, mode: Mode, noise: bool = False) -> bool:
    """Tell whether images have values that preprocessing in a mode can have given: of pixels in the mode "none".

    Floats may go a tenth of the range beyond its ends: a resize by cubic or Lanczos may leave it.

    Args:
        images: any shape but an empty one, NumPy or JAX, integers or floats, not traced.
        mode: of the preprocessing.
        noise: whether random numbers around 0 are put up with: to try a network with them is no mistake.
    """
    low, high = float(images.min()), float(images.max())
    least, most = RANGES[mode]
    floating, of_pixels = jnp.issubdtype(images.dtype, jnp.floating), mode in ("caffe", "none")
    spare = (most - least) / 10 if floating else 0
    if noise and not of_pixels:
        spare = 8 * most
    # Fractions next to zero are pixels that were divided, by 255 or for another mode; black ones are whole numbers.
    near_zero = max(-low, high) <= 1 if noise else max(-low, high) < 4
    divided = of_pixels and floating and near_zero and bool((images != images.round()).any())
    return not (low < least - spare or high > most + spare or divided)  # NaN is no fault here: the output shows it
