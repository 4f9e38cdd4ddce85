"""The models that there are, collected from the families' files; how one is created and loaded."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import io
import os
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from fzoo import models
from fzoo.errors import unknown
from fzoo.images.preprocessing import MODES, Images, Mode, preprocess
from fzoo.images.reading import check_size
from fzoo.images.recipe import Recipe, change_recipe
from fzoo.layers.activations import Activation
from fzoo.layers.classifier import Classifier, Head
from fzoo.models.spec import ModelSpec
from fzoo.types import DTypeLike, Options


def collect_variants(package: ModuleType) -> Mapping[str, ModelSpec]:
    """Find the records that the families' files have, by the models' names.

    Args:
        package: of these files.

    Raises:
        ValueError: two of them have the same name.
    """
    variants: dict[str, ModelSpec] = {}
    for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        attributes = vars(importlib.import_module(file.name))
        for record in (*attributes.values(), *attributes.get("TAGS", ())):
            if isinstance(record, ModelSpec) and variants.setdefault(record.name, record) is not record:
                raise ValueError(f"two models are called {record.name}, the second in {file.name}")
    return MappingProxyType(variants)


VARIANTS = collect_variants(models)

#: The preprocessing that Keras's weights of each family want; `predict` asks at each call.
FAMILY_MODES: Mapping[type, Mode] = {
    record.family: record.preprocessing for record in VARIANTS.values() if "preprocessing" not in record.options
}


#: Options of every network that are facts of its weights.
OF_WEIGHTS = ("tag", "preprocessing")


def list_models(pattern: str = "*", *, tagged: bool | None = None) -> list[str]:
    """List the models' names in alphabetical order: as Keras's constructors are called, and of weights with a tag.

    Args:
        pattern: with `fnmatch`'s wildcards; case does not matter.
        tagged: True for names with a tag ("ResNet50.tv2_in1k") alone, False for those without, None for all.
    """
    return sorted(
        name
        for name, record in VARIANTS.items()
        if fnmatch.fnmatch(name.lower(), pattern.lower()) and tagged in (None, record.tag is not None)
    )


def spec(name: str) -> ModelSpec:
    """Return what is known of a model.

    Raises:
        ValueError: there is no such model; the message names the nearest.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        model, dot, _ = str(name).partition(".")
        tags = list_models(f"{model}.*") if dot and model in VARIANTS else []
        raise ValueError(unknown("model", name, tags or VARIANTS))
    return VARIANTS[name]


def create(
    name: str,
    *,
    include_top: bool = True,
    classes: int = 1000,
    pooling: str | None = None,
    classifier_activation: Activation = "softmax",
    input_shape: tuple[int | None, int | None, int] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    precision: str | jax.lax.Precision | None = None,
    remat: bool = False,
    plain_convolutions: bool = False,
    axis_name: str | None = None,
    head: Head | None = None,
    output_stride: int | None = None,
    **family_options: Any,
) -> Classifier:
    """Make a model's network: a Flax module, without variables. Nothing is read or computed.

    Args:
        name: of the model, from `list_models()`.
        include_top: whether the classifier at the end is part of the network.
        classes: number of outputs of the classifier; goes with the top.
        pooling: without the top: None for the feature map, "avg" or "max" for a vector.
        classifier_activation: of the last layer: a name of Keras's, a callable, or None for logits.
        input_shape: (height, width, channels); see `Classifier`.
        dtype: of the computation.
        param_dtype: of the parameters, as they are made and loaded: jnp.bfloat16 for half the memory of a network that
            is not trained.
        precision: of convolutions and products on accelerators: "default", "high" or "highest"; None for JAX's default.
        remat: whether a backward pass computes the outputs of layers again, part by part, to keep few of them.
        plain_convolutions: whether a CPU runs XLA's own convolutions: slower, but compiled in less time.
        axis_name: of a `jax.shard_map` or `jax.pmap` over whose devices BNs take the batch's statistics in training.
        head: a new classifier (`fzoo.Head`) in place of the family's own, for fine-tuning.
        output_stride: 8 or 16 pixels of the image between two values of the last maps in place of 32, by dilation: for
            dense prediction with the same weights; see `Classifier`.
        **family_options: the family's own, e.g. `alpha` of MobileNetV2; see its module. Also `preprocessing`, for
            weights that want another mode of `preprocess_input` than the model's.

    Raises:
        ValueError: an unknown model or option, or one that can't be honoured.
    """
    record = spec(name)
    known = family_defaults(record)
    for option in family_options:
        if option not in known and option not in OF_WEIGHTS:
            raise ValueError(unknown(f"option of {name}", option, known or ["none beyond those of every model"]))
    if not include_top and classes != 1000:
        raise ValueError(f"classes={classes} goes with include_top=True: without the top there are no classes")
    options = {**record.options, **family_options}
    left_out = options.get("include_preprocessing") is False and "preprocessing" not in family_options
    if left_out and options.get("preprocessing") == "none":  # that was said of the network that does it by itself
        del options["preprocessing"]
    return record.family(
        include_top=include_top,
        classes=classes,
        pooling=pooling,
        classifier_activation=classifier_activation,
        input_shape=input_shape,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        remat=remat,
        plain_convolutions=plain_convolutions,
        axis_name=axis_name,
        head=head,
        output_stride=output_stride,
        **options,
    )


def family_defaults(record: ModelSpec) -> Options:
    """Return the options of a model's family, beyond those of every model, with the model's values."""
    common = {field.name for field in dataclasses.fields(Classifier)}
    fields = [field for field in dataclasses.fields(record.family) if field.name not in common]
    return {field.name: record.options.get(field.name, field.default) for field in fields}


def model_options(record: ModelSpec) -> Options:
    """Return the options of a network that a user names beside its model: its family's, and those of every network.

    With the model's values.
    """
    return {**family_defaults(record), "output_stride": None}


def preprocessing_of(module: Any) -> Mode | None:
    """Return the preprocessing that a network's family wants ("caffe", "tf", "torch", "none", ...).

    None for a network whose own was left out (`include_preprocessing=False`), and for one of no family.
    """
    if getattr(module, "preprocessing", None) is not None:
        return MODES[module.preprocessing]
    return FAMILY_MODES.get(type(module)) if getattr(module, "include_preprocessing", True) else None


def recipe(name: str, size: int | tuple[int, int] | None = None) -> Recipe:
    """Return how a photograph becomes the input of a model, as the published accuracies are measured.

    Args:
        name: the model.
        size: (height, width), or one number for both; the model's own by default.

    Raises:
        ValueError: an unknown model, or no size of an image.
    """
    record = spec(name)
    sides = check_size(record.input_size if size is None else size)
    return Recipe(sides, record.interpolation, record.crop)


def load_image_for(
    path: str | os.PathLike | BinaryIO | io.BytesIO,
    name: str,
    size: int | tuple[int, int] | None = None,
    **changes: Any,
) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as a model's weights want it: the size, the resize and the crop of `recipe(name, size)`.

    Args:
        path: any format that Pillow reads; or an open binary file.
        name: the model.
        size: (height, width), or one number for both; the model's own by default.
        **changes: of the recipe, e.g. `crop=None` to squeeze the image to the size; see `Recipe`.

    Returns:
        uint8 pixels (height, width, 3), for `preprocess_input` or `predict(..., preprocess=name)`.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: an unknown model or part of a recipe, a file that is no image or a damaged one; see `load_image`.
    """
    return change_recipe(recipe(name, size), changes).load(path)


def preprocess_input(images: Images, name: str, *, data_format: str = "channels_last") -> Images:
    """Scale pixels as a model's weights expect; the `preprocess_input` of the model's Keras file.

    Pure: the caller's array is never written to. Works under `jax.jit`.

    Args:
        images: (N, H, W, 3) or (H, W, 3) RGB pixels from 0 to 255, NumPy or JAX, integer or float; for the modes "tf",
            "unit" and "none" of any number of channels.
        name: the model, e.g. "ResNet50", which fixes the mode, or the mode itself, for a network of `load_model`:
            "caffe" (RGB to BGR, minus ImageNet's mean), "tf" (to -1..1), "torch" (to 0..1, then ImageNet's mean and
            deviation), "clip" (the same of CLIP's training images), "unit" (to 0..1, by 255), "none" (the network does
            it itself).
        data_format: "channels_last", or "channels_first" for (N, 3, H, W). The layout is kept: fzoo's networks take
            channels last.

    Returns:
        An array of the same kind, shape and float dtype; float32 for integers.

    Raises:
        ValueError: an unknown model or data format, or an array without three channels where that says they are.
    """
    return preprocess(images, preprocessing_mode(name), data_format=data_format)


def preprocessing_mode(name: str) -> Mode:
    """Return the mode of preprocessing of a model, or the mode of this name.

    Raises:
        ValueError: it is neither.
    """
    if name not in MODES and name not in VARIANTS:
        raise ValueError(f"{unknown('model', name, VARIANTS)}, or one of the modes {', '.join(MODES)}")
    return spec(name).preprocessing if name in VARIANTS else MODES[name]
