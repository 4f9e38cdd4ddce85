"""What the network of a user's Keras file takes: read from its graph, or from a backbone that it was built on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fzoo.images.preprocessing import MODES_IN_WORDS, Mode
from fzoo.images.recipe import Recipe
from fzoo.layers.steps import Step
from fzoo.models.keras_model import KerasModel
from fzoo.types import Variables
from fzoo.zoo import recipe as model_recipe
from fzoo.zoo import spec

#: Layers of the beginnings of families, by a model of each, which those with another preprocessing lack. Families that
#: preprocess inside are known by that.
LANDMARKS: Mapping[str, tuple[str, ...]] = {
    "MobileNetV2": ("bn_Conv1", "expanded_conv_depthwise", "block_1_expand"),
    "MobileNet": ("conv1_bn", "conv_dw_1", "conv_pw_1"),
    "NASNetMobile": ("stem_conv1", "stem_bn1", "reduction_conv_1_stem_1"),
    "DenseNet121": ("conv1_conv", "conv2_block1_0_bn", "conv2_block1_concat"),
    "Xception": ("block1_conv1_bn", "block1_conv2_bn", "block2_sepconv1"),
    "InceptionV3": ("mixed0", "mixed1", "mixed2"),
    "InceptionResNetV2": ("mixed_5b", "block35_1_mixed", "block35_1_conv"),
    "ResNet50": ("conv1_bn", "conv2_block1_0_bn", "conv2_block1_3_bn"),
    "ResNet50V2": ("conv1_conv", "conv2_block1_preact_bn", "conv2_block1_0_conv"),
    "VGG16": ("block1_conv2", "block1_pool", "block2_conv1"),
}

#: Kinds of steps that leave the values of pixels as they are, beside random augmentation, which inference is without.
KEEPING = frozenset(
    {
        "Model",
        "Identity",
        "Resizing",
        "CenterCrop",
        "ZeroPadding2D",
        "Cropping2D",
        "Dropout",
        "SpatialDropout2D",
        "GaussianNoise",
        "GaussianDropout",
        "ActivityRegularization",
        "Permute",
        "ops.Cast",
        "ops.Identity",
        "ops.Flip",
        "ops.GetItem",
        "ops.Resize",
        "ops.Pad",
    }
)

#: What Teachable Machine calls the layers of its head.
TEACHABLE_MACHINE = re.compile(r"(.*/)?dense_Dense\d+")


class KnownPreprocessing(NamedTuple):
    """What a network wants of its pixels.

    Attributes:
        mode: of the preprocessing, as in `preprocess_input`.
        reason: how that is known, in words.
    """

    mode: Mode
    reason: str


def recognize_preprocessing(module: KerasModel, variables: Variables) -> KnownPreprocessing | None:
    """Find the preprocessing that the network of a user's file wants; None where nothing tells.

    Args:
        module, variables: from `fzoo.load_model`.
    """
    scaling = scaling_step(module, variables)
    if scaling is not None:
        return KnownPreprocessing("none", f"its layer {scaling.name} does it")
    if is_teachable_machine(module):
        return KnownPreprocessing("tf", "it is Teachable Machine's")
    name = recognize_backbone(module)
    reason = f"its layers are named as those of {name}"
    return None if name is None else KnownPreprocessing(spec(name).preprocessing, reason)


def require_preprocessing(module: KerasModel, variables: Variables, source: str) -> KnownPreprocessing:
    """Find the preprocessing that the network of a user's file wants, where the user does not say.

    Args:
        module, variables: from `fzoo.load_model`.
        source: the file, for the message.

    Raises:
        ValueError: nothing tells.
    """
    preprocessing = recognize_preprocessing(module, variables)
    if preprocessing is None:
        raise ValueError(
            f"{source} does not show what it wants of its pixels: preprocess=... (--preprocess) expected: "
            f"{MODES_IN_WORDS}, or the name of a model that wants the same"
        )
    return preprocessing


def recognize_backbone(module: KerasModel) -> str | None:
    """Find a model whose family the network begins as, by the names of its layers, nested or not; None for none."""
    parts = [step.name.rpartition("/") for step in module.graph.steps]
    for model, landmarks in LANDMARKS.items():
        current_name = spec(model).family.current_name
        names = {model_name + slash + current_name(name) for model_name, slash, name in parts}
        first, *others = landmarks
        prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith(f"/{first}")]
        if any(all(prefix + other in names for other in others) for prefix in prefixes):
            return model
    return None


def is_teachable_machine(module: KerasModel) -> bool:
    """Tell whether a network is an image model that Teachable Machine exported."""
    return any(TEACHABLE_MACHINE.fullmatch(step.name) for step in module.graph.steps)


def usual_recipe(module: KerasModel) -> Recipe:
    """Return how an image becomes the input of the network of a user's file, where the user does not say.

    Teachable Machine's cut the centre out of the image. A network with ImageNet's classes reads as its model does.
    Others have the whole image squeezed to their size, as Keras's data sets (`image_dataset_from_directory`) do.
    """
    height, width, channels = module.example_shape
    size, channels = (height, width), 1 if channels == 1 else 3
    if is_teachable_machine(module):
        return Recipe(size, "lanczos", crop=1.0, channels=channels)
    backbone = recognize_backbone(module)
    if backbone is not None and module.classes == 1000:
        return model_recipe(backbone, size)
    return Recipe(size, "bilinear", crop=None, channels=channels)


def scaling_step(module: KerasModel, variables: Variables) -> Step | None:
    """Find the first step after the input that makes small numbers of pixels from 0 to 255; None for none."""
    for step in steps_at_input(module):
        if is_scaling(step, variables):
            return step
    return None


def steps_at_input(module: KerasModel) -> Iterator[Step]:
    """Yield the steps that take what is still the pixels."""
    steps, pixels = module.graph.steps, set()
    for number, step in enumerate(steps):
        if step.kind == "InputLayer":
            pixels.add(number)
        elif len(step.inputs) == 1 and step.inputs[0] in pixels:
            yield step
            if step.kind in KEEPING or step.kind.startswith("Random"):
                pixels.add(number)


def is_scaling(step: Step, variables: Variables) -> bool:
    """Tell whether a step takes pixels from 0 to 255: its numbers are of their size, not of that of 0 to 1."""
    options: dict[str, Any] = dict(step.options)
    if step.kind == "Rescaling":
        scale, offset = (np.max(np.abs(options.get(name, usual))) for name, usual in (("scale", 1), ("offset", 0)))
        return bool(scale < 0.1 or offset > 1.5 * scale)
    if step.kind == "Normalization":
        mean = variables.get("batch_stats", {}).get(step.name, {}).get("mean", options.get("mean"))
        return mean is not None and bool(np.max(np.abs(np.asarray(mean, np.float32))) > 1.5)
    numbers = [np.max(np.abs(value)) for _, value in options.get("numbers", ())]
    size = max(numbers, default=0)
    if step.kind in ("ops.TrueDivide", "ops.Divide"):
        return bool(size > 10)
    if step.kind == "ops.Multiply":
        return bool(0 < size < 0.1)
    return step.kind in ("ops.Subtract", "ops.Add") and bool(size > 1.5)
