"""The record of a model, which each family's file has for its variants."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import MappingProxyType

from fzoo.images.preprocessing import Mode
from fzoo.images.recipe import Recipe
from fzoo.layers.classifier import Classifier
from fzoo.types import Options
from fzoo.weights.published import WeightFile, hub_file

#: Licences that forbid commercial use begin so.
NONCOMMERCIAL = "CC BY-NC"


@dataclasses.dataclass(frozen=True)
class Tag:
    """What is known of weights that others than Keras published, of a graph that is told beside them.

    Attributes:
        name: timm's.
        top1, top5: accuracy on ImageNet's validation images by this size, crop and interpolation, as timm's table of
            results has it, or torchvision of a file of its own, from 0 to 1.
        size: height and width, in pixels; None for the model's own.
        crop, interpolation: see `Recipe`.
        preprocessing: see `preprocess_input`.
        licence: of the weights.
        options: of the graph, beside those of all tags.
        file: where they lie, if it is not the Hub.
    """

    name: str
    top1: float
    top5: float
    size: int | None = None
    crop: float | None = Recipe.crop
    interpolation: str = Recipe.interpolation
    preprocessing: Mode = "torch"
    licence: str = "Apache 2.0"
    options: Options = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    file: WeightFile | None = None


#: Of torchvision's first weights, and of its second ones, which are trained for longer.
torchvision_tag = partial(Tag, interpolation="bilinear", licence="BSD 3-Clause")
torchvision_tag2 = partial(torchvision_tag, "tv2_in1k", crop=0.965)


#: Facts of a network whose weights all have tags.
UNTAGGED: Options = MappingProxyType({"top1": None, "top5": None, "weight_files": (), "licence": "of each tag"})


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ModelSpec:
    """What is known of a model.

    Attributes:
        name: Keras's constructor; of other weights with a tag after a dot: timm's ("ResNet50.tv2_in1k"), or the size of
            images that Keras's are for ("ResNetRS152.i192").
        family: the Flax module.
        options: what makes the family this model.
        input_size: default height and width, in pixels.
        min_size: the least height and width.
        preprocessing: "caffe", "tf", "torch", "clip" or "none"; see `preprocess_input`.
        interpolation, crop: how an image is resized and cut for the published accuracy; see `Recipe`, which
            `fzoo.recipe(name)` makes of these.
        parameters: of the default model with the top, batch statistics included.
        depth: number of layers with weights, the top's included, which is how Keras's documentation counts it.
        size_mb: of the weights file, in MB.
        top1, top5: accuracy on ImageNet's validation images, as Keras publishes it, or timm or torchvision for a tag,
            from 0 to 1; None where it is not published.
        licence: of the weights.
        paper: its URL.
        weight_files: what was published; the first that fits is the one for the default options. A network whose
            weights all have tags has none.
    """

    name: str
    family: type[Classifier]
    options: Options = dataclasses.field(default_factory=dict)
    input_size: int
    preprocessing: Mode
    interpolation: str = Recipe.interpolation
    crop: float | None = Recipe.crop
    parameters: int
    depth: int
    size_mb: int
    top1: float | None
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

    @property
    def tag(self) -> str | None:
        """What comes after the dot of the name; None for Keras's usual weights."""
        return self.name.partition(".")[2] or None

    @property
    def is_torch(self) -> bool:
        """Whether the published weights are a state dict of PyTorch's."""
        return any(file.is_state_dict for file in self.weight_files)

    @property
    def is_noncommercial(self) -> bool:
        """Whether the licence of the weights forbids commercial use."""
        return self.licence.startswith(NONCOMMERCIAL)

    def with_tags(self, source: str, options: Options, parameters: int, *tags: Tag) -> tuple[ModelSpec, ...]:
        """Make the records of weights that others published.

        Args:
            source: timm's name of the network, without a tag.
            options: that make the family's network this one, beside the record's.
            parameters: of it, batch statistics included.
            tags: of the weights.
        """
        return tuple(
            dataclasses.replace(
                self,
                name=f"{self.name}.{tag.name}",
                options={
                    **self.options,
                    **options,
                    **tag.options,
                    "tag": tag.name,
                    "preprocessing": tag.preprocessing,
                },
                input_size=tag.size or self.input_size,
                preprocessing=tag.preprocessing,
                interpolation=tag.interpolation,
                crop=tag.crop,
                parameters=parameters,
                size_mb=round(4 * parameters / 1e6),
                top1=tag.top1,
                top5=tag.top5,
                licence=tag.licence,
                weight_files=(tag.file or hub_file(f"{source}.{tag.name}"),),
            )
            for tag in tags
        )
