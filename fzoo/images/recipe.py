"""How a photograph becomes a network's input: what belongs to weights as much as their values."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fzoo.errors import unknown
from fzoo.images.reading import (
    INTERPOLATIONS,
    Color,
    check_reading,
    check_size,
    load_image,
    open_image,
    rgb_color,
)
from fzoo.types import Json, Options

#: How `keras.utils.load_img` reads an image, but for its size and resize: not turned, alpha dropped, cut off at 8 bits.
KERAS_READING: Options = {"exif": False, "background": None, "clip": True}

#: All of it: squeezed by nearest neighbour, too.
KERAS_PIXELS: Options = {"interpolation": "nearest", "crop": None, **KERAS_READING}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a photograph becomes a network's input.

    The default is how accuracies on ImageNet are published: the shorter side resized by bicubic (to 256 for 224), and
    the centre cut out. `Recipe.keras(224)` is what `keras.utils.load_img` gives.

    Attributes:
        size: (height, width) in pixels; one number for both.
        interpolation: as in `load_image`.
        crop: how much of the shorter side the centre crop keeps; None to squeeze the image to the size.
        augment: in training, a random part of the image (8 to 100 % of its area, 3:4 to 4:3) instead of the centre,
            mirrored half of the time, as GoogLeNet was trained (Szegedy et al. 2014, arXiv 1409.4842).
        exif, background, clip: as in `load_image`.
        channels: 3 for RGB, 1 for grey (luma, as Pillow's mode L and Keras's `color_mode="grayscale"`).

    Raises:
        ValueError: one of these can't be honoured.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    crop: float | None = 0.875
    augment: bool = False
    exif: bool = True
    background: Color | None = "white"
    clip: bool = False
    channels: int = 3

    def __post_init__(self):
        """Check the values; a colour is kept as (red, green, blue)."""
        check_reading(self.interpolation, self.crop, self.background)
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels!r} given, 3 for RGB or 1 for grey expected")
        object.__setattr__(self, "size", check_size(self.size))
        if self.background is not None:
            object.__setattr__(self, "background", rgb_color(self.background))

    @classmethod
    def keras(cls, size: int | tuple[int, int]) -> Recipe:
        """Make the recipe of `keras.utils.load_img`: squeezed by nearest neighbour, not turned, alpha dropped."""
        return cls(check_size(size), **KERAS_PIXELS)

    @classmethod
    def from_json(cls, values: Mapping[str, Json]) -> Recipe:
        """Make the recipe that `to_json` wrote; what it lacks is as it was before there was a choice."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**KERAS_READING, **values, **lists})

    def to_json(self) -> dict[str, Json]:
        """Return the fields as what JSON holds."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def __str__(self) -> str:
        """Say it in words, for reports."""
        height, width = self.size
        if self.crop is None:
            resized = f"squeezed to {height} x {width} by {self.interpolation}"
        else:
            shorter = round(min(height, width) / self.crop)
            resized = f"shorter side to {shorter} by {self.interpolation}, centre crop of {height} x {width}"
        notes = [resized]
        if not self.exif:
            notes.append("not turned upright")
        if self.background != (255, 255, 255):
            notes.append("alpha dropped" if self.background is None else f"over the colour {self.background}")
        if self.clip:
            notes.append("cut off at 8 bits")
        if self.channels == 1:
            notes.append("in grey")
        return ", ".join(notes)

    def load(
        self, path: str | os.PathLike | BinaryIO | io.BytesIO | Image.Image, rng: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "h w c"]:
        """Read the pixels of an image file or of Pillow's image; with `rng`, augmented where the recipe says so.

        Raises as `load_image`.
        """
        pixels = self.load_rgb(path, rng)
        return pixels if self.channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]

    def load_rgb(
        self, path: str | os.PathLike | BinaryIO | io.BytesIO | Image.Image, rng: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Do what `load` does, before RGB becomes grey."""
        options = {"exif": self.exif, "background": self.background, "clip": self.clip}
        if rng is None or not self.augment:
            return load_image(path, self.size, self.interpolation, crop=self.crop, **options)
        image = open_image(path, **options)
        height, width = self.size
        image = image.resize((width, height), INTERPOLATIONS[self.interpolation], random_box(*image.size, rng))
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image)

    def show(self, path: str | os.PathLike, side: int) -> UInt8[np.ndarray, "h w 3"]:
        """Read the part of an image that the network sees, in its own proportions, at most `side` pixels long."""
        image = open_image(path, exif=self.exif, background=self.background, clip=self.clip)
        if self.crop is not None:
            height, width = self.size
            scale = self.crop * min(image.height / height, image.width / width)
            left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
            right, bottom = left + max(1, scale * width), top + max(1, scale * height)  # of a thin image, too
            image = image.crop((round(left), round(top), round(right), round(bottom)))
        image.thumbnail((side, side))
        return np.asarray(image)


def change_recipe(recipe: Recipe, changes: Options) -> Recipe:
    """Return a recipe with other values in some of its fields.

    Raises:
        ValueError: there is no such field, or its value can't be honoured.
    """
    fields = [field.name for field in dataclasses.fields(Recipe)]
    for name in changes:
        if name not in fields:
            raise ValueError(unknown("part of a recipe", name, fields))
    return dataclasses.replace(recipe, **changes)


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw (left, top, right, bottom) of 8 to 100 % of an image's area, of a shape from 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)  # an image so narrow that no such part was met
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
