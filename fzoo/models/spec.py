"""The record of a model, which each family's file has for its variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fzoo.images.preprocessing import Mode
from fzoo.images.recipe import Recipe
from fzoo.layers.classifier import Classifier
from fzoo.weights.published import WeightFile


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ModelSpec:
    """What is known of a model.

    Attributes:
        name: Keras's constructor.
        family: the Flax module.
        options: what makes the family this model.
        input_size: default height and width, in pixels.
        min_size: the least height and width.
        preprocessing: "caffe", "tf", "torch" or "none"; see `preprocess_input`.
        interpolation, crop: how an image is resized and cut for the published accuracy; see `Recipe`, which
            `fzoo.recipe(name)` makes of these.
        parameters: of the default model with the top, batch statistics included.
        depth: number of layers with weights, the top's included, which is how Keras's documentation counts it.
        size_mb: of the weights file, in MB.
        top1, top5: accuracy on ImageNet's validation images, as Keras publishes it, from 0 to 1; top5 is None where it
            does not say.
        licence: of the weights.
        paper: its URL.
        weight_files: what Keras published; the first that fits is the one for the default options.
    """

    name: str
    family: type[Classifier]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    input_size: int
    preprocessing: Mode
    interpolation: str = Recipe.interpolation
    crop: float | None = Recipe.crop
    parameters: int
    depth: int
    size_mb: int
    top1: float
    top5: float | None
    licence: str
    paper: str
    weight_files: tuple[WeightFile, ...]

    def __post_init__(self):
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def min_size(self) -> int:
        """The least height and width of an image, in pixels."""
        return self.family.min_size
