"""From a file of pixels to what a network takes, as Keras does it."""

from __future__ import annotations

import io
import os
import struct
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fzoo.errors import unknown

Images = TypeVar("Images", np.ndarray, jax.Array)


Mode = Literal["caffe", "tf", "torch", "none"]


#: Names of Pillow's filters, as Keras has them.
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


#: Pixels; a resize to more is a mistake, and would take the machine's memory.
MAX_SIDE = 16384


_CAFFE_MEAN = (103.939, 116.779, 123.68)  # B, G, R


_TORCH_MEAN, _TORCH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_image(
    path: str | os.PathLike | BinaryIO | io.BytesIO,
    size: int | tuple[int, int] | None = None,
    interpolation: str = "nearest",
    *,
    crop: float | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as `keras.utils.load_img` does: RGB, squeezed to the size, no matter the aspect ratio.

    With `crop`, as published accuracies are measured: the shorter side is resized, and the centre is cut out.

    Args:
        path: any format that Pillow reads; or an open binary file.
        size: (height, width), one number for both, or None for the image's own.
        interpolation: "nearest" (Keras's default), "bilinear", "bicubic", "lanczos", "box" or "hamming".
        crop: how much of the resized shorter side the centre crop keeps: 0.875 resizes it to 256 for a size of 224.

    Returns:
        uint8 pixels (height, width, 3).

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: the file is not an image or a damaged one, or an argument is wrong.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(unknown("interpolation", interpolation, INTERPOLATIONS))
    sides = None if size is None else check_size(size)
    if crop is not None and not (sides and isinstance(crop, Real) and 0 < crop <= 1):
        raise ValueError(f"crop={crop!r} given, a share from 0 to 1 expected, with a size")
    rgb = open_image(path)
    if sides is not None:
        rgb = resize(rgb, sides, INTERPOLATIONS[interpolation], crop)
    return np.asarray(rgb)


def check_size(size: Any) -> tuple[int, int]:
    """(height, width) from one number or two.

    Raises:
        ValueError: these are no sides of an image.
    """
    sides = (size, size) if isinstance(size, Integral) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(n, Integral) and 0 < int(n) <= MAX_SIDE for n in sides):
        raise ValueError(f"size={size!r} given, a height and width from 1 to {MAX_SIDE} expected")
    return int(sides[0]), int(sides[1])


def open_image(path: str | os.PathLike | BinaryIO | io.BytesIO) -> Image.Image:
    """An image in RGB, at its own size; raises as `load_image` does."""
    if isinstance(path, (str, os.PathLike)):
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory, an image expected")
        if not path.exists():
            raise FileNotFoundError(f"no such image: {path}")
    try:
        with Image.open(path) as image:
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # the same colours, by the way that Pillow does not warn of
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as e:
        reason = "not an image that Pillow knows" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        name = path if isinstance(path, Path) else getattr(path, "name", "an open file")
        raise ValueError(f"cannot read the image {name}: {reason}") from e


def resize(
    image: Image.Image, sides: tuple[int, int], filter: Image.Resampling, crop: float | None = None
) -> Image.Image:
    """Squeeze an image to (height, width), or cut its centre out, as `load_image` says."""
    height, width = sides
    if crop is None:
        return image if image.size == (width, height) else image.resize((width, height), filter)
    factor = max(height / image.height, width / image.width) / crop
    whole = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    return image.resize(whole, filter).crop((left, top, left + width, top + height))


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
