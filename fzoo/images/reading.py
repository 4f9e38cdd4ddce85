"""From a file to pixels: upright, in RGB, at a size."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor

from fzoo.errors import unknown
from fzoo.images.files import describe_missing

#: What is behind a transparent picture: a name or "#rrggbb" as CSS has it, or (red, green, blue) from 0 to 255.
Color = str | tuple[int, int, int]


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


#: How many times as long as wide an image is that is cut before it is resized: 30,000 x 1 pixels would else become
#: 7,680,000 x 256. Others are resized first: Pillow holds the place of a part as float32, and the other way round the
#: values are not those of the published recipes to the last digit.
LONG = 16


#: How a picture is turned upright, by what a camera writes into its EXIF data (tag 0x0112).
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


#: TIFF's tags: bits of each value, and whether 0 is white.
_BITS, _PHOTOMETRIC = 258, 262


def load_image(
    path: str | os.PathLike | BinaryIO | io.BytesIO | Image.Image,
    size: int | tuple[int, int] | None = None,
    interpolation: str = "nearest",
    *,
    crop: float | None = None,
    exif: bool = True,
    background: Color | None = "white",
    clip: bool = False,
) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as a person sees it: upright, in RGB; at a size, squeezed to it as `keras.utils.load_img` does.

    With `crop`, as published accuracies are measured: the shorter side is resized, and the centre is cut out;
    `fzoo.load_image_for` reads an image so, as a model's weights want it. Grey of 16 bits is scaled to 8. Exactly the
    pixels of `keras.utils.load_img` come with `exif=False, background=None, clip=True`.

    Args:
        path: any format that Pillow reads; or an open binary file, or an image of Pillow's.
        size: (height, width), one number for both, or None for the image's own.
        interpolation: "nearest" (Keras's default), "bilinear", "bicubic", "lanczos", "box" or "hamming".
        crop: how much of the resized shorter side the centre crop keeps: 0.875 resizes it to 256 for a size of 224.
        exif: whether the image is turned as its camera says; Keras does not turn it.
        background: the colour behind what is transparent; None drops the transparency as Keras does, and shows what
            is hidden under it.
        clip: whether values of more than 8 bits are cut off at 255, as Keras does (16-bit grey turns white), instead of
            being scaled or, without an agreed range, refused.

    Returns:
        uint8 pixels (height, width, 3).

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: the file is not an image or a damaged one, its values have no agreed range (floats, integers of 32
            bits), or an argument is wrong.
    """
    sides = None if size is None else check_size(size)
    check_reading(interpolation, crop, background)
    if crop is not None and sides is None:
        raise ValueError(f"crop={crop!r} given, which goes with a size")
    rgb = open_image(path, exif=exif, background=background, clip=clip)
    if sides is not None:
        rgb = resize(rgb, sides, interpolation, crop)
    return np.asarray(rgb)


def check_size(size: object) -> tuple[int, int]:
    """Return (height, width) from one number or two.

    Raises:
        ValueError: these are no sides of an image.
    """
    sides = (size, size) if isinstance(size, Integral) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(n, Integral) and 0 < int(n) <= MAX_SIDE for n in sides):
        raise ValueError(f"size={size!r} given, a height and width from 1 to {MAX_SIDE} expected")
    return int(sides[0]), int(sides[1])


def check_reading(interpolation: object, crop: object, background: object) -> None:
    """Raise ValueError for an argument of `load_image` that can't be honoured."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(unknown("interpolation", interpolation, INTERPOLATIONS))
    if crop is not None and not (isinstance(crop, Real) and 0 < float(crop) <= 1):
        raise ValueError(f"crop={crop!r} given, a share from 0 to 1 expected, or None")
    if background is not None:
        rgb_color(background)


def rgb_color(color: Any) -> tuple[int, int, int]:
    """Return (red, green, blue) of a colour; raises ValueError for what is none."""
    try:
        red, green, blue = ImageColor.getrgb(color)[:3] if isinstance(color, str) else color
        if all(isinstance(value, Integral) and 0 <= int(value) <= 255 for value in (red, green, blue)):
            return int(red), int(green), int(blue)
    except (ValueError, TypeError):
        pass
    raise ValueError(f"background={color!r} given, a colour such as 'white', '#ffffff' or (255, 255, 255) expected")


def open_image(
    path: str | os.PathLike | BinaryIO | io.BytesIO | Image.Image,
    *,
    exif: bool = True,
    background: Color | None = "white",
    clip: bool = False,
) -> Image.Image:
    """Open an image in RGB, at its own size; arguments and errors are those of `load_image`."""
    if isinstance(path, (str, os.PathLike)):
        path = Path(path)
        check_file(path)
    try:
        with contextlib.nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as image:
            image.load()
            upright = turn_upright(image) if exif else image
            return to_rgb(upright, image, background, clip)
    # A damaged file ends in whatever its decoder meets first: OSError, SyntaxError, RuntimeError, AttributeError, ...
    except Exception as e:
        reason = "not an image that Pillow knows" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        name = path if isinstance(path, Path) else getattr(path, "name", "an open file")
        raise ValueError(f"cannot read the image {name}: {reason or type(e).__name__}") from e


def check_file(path: Path) -> None:
    """Raise an error unless there is a file: a pipe would be waited for, for ever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as e:
        raise FileNotFoundError(describe_missing(path)) from e
    except ValueError as e:
        raise ValueError(f"{str(path)!r} given, the path of an image expected: {e}") from e
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a directory, an image expected")
    if not stat.S_ISREG(mode):
        raise ValueError(f"cannot read the image {path}: not a file, but a pipe, a socket or a device")


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its camera says; EXIF data that can't be read say nothing."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data, of as many kinds as damaged images
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image, file: Image.Image, background: Color | None, clip: bool) -> Image.Image:
    """Convert an image to RGB of 8 bits, over a background; `file` has the format and the tags it came with."""
    if not clip and (image.mode == "F" or image.mode.startswith("I")):
        return to_8_bits(image, file).convert("RGB")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if transparent and background is not None:
        under = Image.new("RGBA", image.size, (*rgb_color(background), 255))
        return Image.alpha_composite(under, image.convert("RGBA")).convert("RGB")
    if image.mode == "P" and transparent:
        image = image.convert("RGBA")  # the same colours, by the way that Pillow does not warn of
    return image.convert("RGB")


def to_8_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Scale grey of 16 bits to 8.

    Raises:
        ValueError: it has 32 bits, or floats: which value is white is not agreed on.
    """
    # PNG and PGM have 16 bits at the most, which some versions of Pillow hold as integers of 32.
    if image.mode == "F" or (image.mode == "I" and file.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(
            f"grey values that are {kind}, of which no range is agreed on: save it with 8 or 16 bits, scaled to them"
        )
    tags = getattr(file, "tag_v2", {})
    bits = min(np.ravel(tags.get(_BITS, 16))[0], 16)
    values = np.asarray(image).astype(np.float32) * (255 / (2**bits - 1))
    grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey)


def resize(image: Image.Image, sides: tuple[int, int], interpolation: str, crop: float | None = None) -> Image.Image:
    """Squeeze an image to (height, width), or cut its centre out, as `load_image` says."""
    height, width = sides
    resampling = INTERPOLATIONS[interpolation]
    if crop is None:
        return image if image.size == (width, height) else image.resize((width, height), resampling)
    factor = max(height / image.height, width / image.width) / crop
    whole = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    if max(image.size) <= LONG * min(image.size):
        return image.resize(whole, resampling).crop((left, top, left + width, top + height))
    across, down = image.width / whole[0], image.height / whole[1]
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize((width, height), resampling, (*box[:2], min(box[2], image.width), min(box[3], image.height)))
