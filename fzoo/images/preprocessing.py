"""From pixels to what a network takes, as Keras does it."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Images = TypeVar("Images", np.ndarray, jax.Array)


Mode = Literal["caffe", "tf", "torch", "none"]


#: The least and the largest value that preprocessing gives, by mode.
RANGES: dict[Mode, tuple[float, float]] = {
    "caffe": (-123.68, 151.061),
    "tf": (-1.0, 1.0),
    "torch": (-2.118, 2.64),
    "none": (0.0, 255.0),
}


#: The modes, by their names.
MODES: dict[str, Mode] = {mode: mode for mode in RANGES}


_CAFFE_MEAN = (103.939, 116.779, 123.68)  # B, G, R


_TORCH_MEAN, _TORCH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(images: Images, mode: Mode, *, data_format: str = "channels_last") -> Images:
    """`preprocess_input` by mode instead of by model."""
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(f"data_format={data_format!r} given, 'channels_last' or 'channels_first' expected")
    np_like: Any = jnp if isinstance(images, jax.Array) else np
    x = np_like.asarray(images)
    axis = -1 if data_format == "channels_last" else -3
    if x.ndim not in (3, 4) or (mode != "none" and mode != "tf" and x.shape[axis] != 3):
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
    elif mode == "torch":
        x = (x / np_like.asarray(255, x.dtype) - constant(_TORCH_MEAN)) / constant(_TORCH_STD)
    elif mode == "caffe":
        x = np_like.flip(x, axis) - constant(_CAFFE_MEAN)
    elif x is images:
        x = x.copy()
    return x


def check_range(images: Images, mode: Mode | None, name: str = "the network") -> None:
    """Refuse images whose values can't be what a network takes: floats that are preprocessed, or pixels of integers.

    A tenth of the range beyond its ends is put up with: a resize by cubic or Lanczos may leave it.

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
    low, high = float(images.min()), float(images.max())
    given = f"{'float images' if floating else f'images of {images.dtype}'} from {low:g} to {high:g} given"
    if not floating:
        if mode is None:
            raise ValueError(f"{given}, which {name} does not preprocess: floats expected")
        if low < 0 or high > 255:
            raise ValueError(f"{given}, pixels from 0 to 255 expected")
        return
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{given}: finite numbers expected")
    if mode is None:
        return
    least, most = RANGES[mode]
    spare = (most - least) / 10
    # Fractions next to zero are pixels that were divided, by 255 or for another mode; black ones are whole numbers.
    scaled = mode in ("caffe", "none") and max(-low, high) < 4 and bool((images != images.round()).any())
    if low < least - spare or high > most + spare or scaled:
        wanted = f"{name} takes from {least:g} to {most:g}"
        raise ValueError(f"{given}, which {wanted}: integers from 0 to 255 are preprocessed, floats are not")
