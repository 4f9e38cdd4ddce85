"""What decides a fine-tuning, said and checked once: for Python, the command line, and a run's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp

from fzoo.errors import unknown
from fzoo.images.reading import Color
from fzoo.images.recipe import Recipe
from fzoo.layers.classifier import OF_RUNS, Head
from fzoo.layers.options import is_count
from fzoo.pretrained import load_model
from fzoo.pretrained.whole import is_whole_model, network_in
from fzoo.recognition import require_preprocessing
from fzoo.training.steps import TWO_PHASES, Phase
from fzoo.types import DTypeLike, Options, Weights
from fzoo.zoo import model_options, preprocessing_mode, spec

#: What a run may be resumed with other values of.
FREE = frozenset(("workers", "max_broken", "checkpoint_every"))


#: What config.json says as "recipe" and, with all that makes the network, as "options".
IN_RECIPE = tuple(field.name for field in dataclasses.fields(Recipe) if field.name != "channels")  # which are RGB's
IN_OPTIONS = ("dtype", "options")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Describe a fine-tuning: all that decides its result, but for the images.

    Attributes:
        model: the backbone: a name of `list_models`, or the path of a whole model that Keras saved, which is cut at its
            last feature map, or at the layer `cut` (one of `options`), and has its own weights.
        preprocess: the model, or the mode ("unit"), whose `preprocess_input` makes the input of pixels, where `model`
            is a file; by default what its network shows: by layers that scale pixels ("none"), or names of a backbone.
        weights: of the backbone: "imagenet", a file, the folder of a run, or None for random ones. The head of a file
            or of a run is kept where it fits (a run's: where the classes are the same, too); else a new one starts.
        phases: what trains, how long, and how; by default the head alone, then the top of the backbone.
        head: the new classifier's layers.
        classes: their number, where the data is an iterable or arrays; a folder says it itself.
        size: height and width; the model's own by default. interpolation, crop, augment, exif, background, clip: see
            `Recipe`.
        batch_size: over all devices and processes.
        accumulate: batches whose gradients make one step; at the end of a phase, those that are left make one, too.
        label_smoothing: how much of each label is spread over all classes.
        dtype: of the computation: jnp.bfloat16 for mixed precision; parameters are float32.
        validation_split: share of each class held out, where the data is a folder without val/, or arrays; 0 for none.
        steps_per_epoch: batches; by default all that the data fills.
        cache_features: keep the outputs of the frozen part, instead of computing them in each epoch; by default
            where the data is no iterable, nothing is augmented, and they take 2 GiB or less.
        max_broken: images that can't be read are reported and skipped, so many at the most.
        workers: threads that decode.
        seed: of the split, the order, the new layers, dropout and augmentation.
        checkpoint_every: steps; by default at the end of epochs (every 30 seconds at the most) and of phases, and every
            five minutes of a longer epoch; with several processes, at the end of every epoch.
        options: of the model's family, see `create`.

    Raises:
        ValueError: one of these can't be honoured.
    """

    model: str = "MobileNetV2"
    weights: Weights = "imagenet"
    phases: Sequence[Phase] = TWO_PHASES
    head: Head | None = None
    classes: int | None = None
    size: int | None = None
    interpolation: str = Recipe.interpolation
    crop: float | None = Recipe.crop
    augment: bool = Recipe.augment
    exif: bool = Recipe.exif
    background: Color | None = Recipe.background
    clip: bool = Recipe.clip
    batch_size: int = 32
    accumulate: int = 1
    label_smoothing: float = 0.0
    dtype: DTypeLike = jnp.float32
    validation_split: float = 0.2
    steps_per_epoch: int | None = None
    cache_features: bool | None = None
    max_broken: int = 10
    workers: int = 4
    seed: int = 0
    checkpoint_every: int | None = None
    options: Options = dataclasses.field(default_factory=dict)
    preprocess: str | None = None

    def __post_init__(self):
        """Check the values; what was left to the model is filled in."""
        known, side, preprocess = described_model(self.model, self.preprocess)
        shape, usual = self.options.get("input_shape"), ("classifier_activation", "softmax")
        filled = {"phases": tuple(self.phases), "head": self.head or Head()}
        filled |= {"preprocess": preprocess}
        if self.size is None:
            filled["size"] = shape[0] if shape else side
        filled |= {"options": {name: value for name, value in self.options.items() if (name, value) != usual}}
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        if not self.phases or not all(isinstance(phase, Phase) for phase in self.phases):
            raise ValueError(f"phases={self.phases!r} given, one fzoo.Phase or more expected")
        for name in ("batch_size", "accumulate", "workers", "classes", "steps_per_epoch", "checkpoint_every"):
            value = getattr(self, name)
            if not (is_count(value) or (value is None and name in OPTIONAL)):
                raise ValueError(f"{name}={value!r} given, a positive number expected")
        for name in ("max_broken", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r} given, 0 or a positive number expected")
        for name in ("label_smoothing", "validation_split"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) < 1:
                raise ValueError(f"{name}={value!r} given, from 0 to less than 1 expected")
        if self.cache_features and self.augment:
            raise ValueError("cache_features=True given, which goes with augment=False")
        for name, value in self.options.items():
            if name in REFUSED:
                raise ValueError(f"{name}={value!r} given, {REFUSED[name]}")
            if name not in known and name not in ("input_shape", *OF_RUNS):
                raise ValueError(unknown("option", name, [*FIELDS, *known]))
        if shape and tuple(shape[:2]) != (self.size, self.size):
            raise ValueError(f"size={self.size} and input_shape={shape} given, the same height and width expected")
        self.recipe()

    def recipe(self) -> Recipe:
        """Make the recipe that the images are read by."""
        assert self.size is not None
        return Recipe((self.size, self.size), **{name: getattr(self, name) for name in IN_RECIPE if name != "size"})

    @property
    def pixels_for(self) -> str:
        """The model, or the mode, whose `preprocess_input` makes the network's input of pixels."""
        return self.preprocess or self.model

    def settings(self) -> dict[str, Any]:
        """Return what config.json says of this, by name; `describe` makes JSON of it."""
        elsewhere = FREE.union(IN_RECIPE, IN_OPTIONS)
        return {name: getattr(self, name) for name in FIELDS if name not in elsewhere} | {"recipe": self.recipe()}

    @classmethod
    def of(cls, given: Options, usual: Options | None = None) -> FinetuneConfig:
        """Make one from keyword arguments, those that are none of its fields being options of the model.

        Args:
            given: the arguments.
            usual: fields by name, for what is not given.
        """
        own = {**(usual or {}), **{name: value for name, value in given.items() if name in FIELDS}}
        rest = {name: value for name, value in given.items() if name not in FIELDS}
        options = {**(usual or {}).get("options", {}), **own.get("options", {}), **rest}
        return cls(**{**own, "options": options})


def described_model(model: str, preprocess: str | None) -> tuple[Options, int, str | None]:
    """Return (its options and their defaults, the side of its images, what preprocesses) of a model or of a file.

    Raises:
        ValueError: there is no such model, or it can't be told what its pixels are.
    """
    if not is_whole_model(model):
        if preprocess is not None:
            raise ValueError(
                f"preprocess={preprocess!r} given, which goes with a file as the model: {model} has its own"
            )
        return model_options(spec(model)), spec(model).input_size, None
    # Only to recognise what it wants are weights needed: those of a Normalization.
    module, variables = load_model(model) if preprocess is None else (network_in(model)[0], {})
    if len(module.graph.inputs) > 1:
        raise ValueError(f"{model} takes {', '.join(module.graph.input_names)}, a network of images alone expected")
    height, width, channels = module.example_shape
    if height != width or channels != 3:
        raise ValueError(f"{model} takes images of {height} x {width} x {channels}, square ones of 3 channels expected")
    if preprocess is None:
        preprocess = require_preprocessing(module, variables, model).mode
    preprocessing_mode(preprocess)
    return {"cut": None}, height, preprocess


#: Names of the fields.
FIELDS = tuple(field.name for field in dataclasses.fields(FinetuneConfig))


#: Those that may be None among the counts.
OPTIONAL = ("classes", "steps_per_epoch", "checkpoint_every")


#: Options of `create` that a fine-tuning can't honour, and what would do.
REFUSED = {
    "classifier_activation": "'softmax' expected: each image is of one class, and the loss is softmax cross-entropy",
    "param_dtype": "float32 is trained, whose small steps others lose: dtype=jnp.bfloat16 computes in that",
    "include_top": "a classifier is what is trained: head=fzoo.Head(...) says which",
    "pooling": "it is the head's: head=fzoo.Head(pooling=...)",
}
