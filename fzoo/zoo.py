"""The models, as data: one record for each. The only file that knows both a family and its files."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import io
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from fzoo.errors import unknown
from fzoo.images.preprocessing import Images, Mode, preprocess
from fzoo.images.reading import check_size
from fzoo.images.recipe import Recipe, change_recipe
from fzoo.layers.activations import Activation
from fzoo.layers.classifier import Classifier, Head
from fzoo.layers.graph import random_variables
from fzoo.models import efficientnet_v2, mobilenet_v3
from fzoo.models.convnext import ConvNeXt
from fzoo.models.densenet import DenseNet
from fzoo.models.efficientnet import EfficientNet
from fzoo.models.efficientnet_v2 import EfficientNetV2
from fzoo.models.inception_resnet_v2 import InceptionResNetV2
from fzoo.models.inception_v3 import InceptionV3
from fzoo.models.mobilenet import MobileNet
from fzoo.models.mobilenet_v2 import MobileNetV2
from fzoo.models.mobilenet_v3 import MobileNetV3
from fzoo.models.nasnet import NASNet
from fzoo.models.resnet import ResNet
from fzoo.models.resnet_v2 import ResNetV2
from fzoo.models.vgg import VGG
from fzoo.models.xception import Xception
from fzoo.weights import check_fit, load_variables
from fzoo.weights.download import Proof, fetch, file_hash
from fzoo.weights.published import FILES, WeightFile


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSpec:
    """What is known of a model.

    Attributes:
        name: Keras's constructor.
        family: the Flax module.
        options: what makes the family this model.
        input_size: default height and width, in pixels.
        min_size: the least height and width.
        preprocessing: "caffe", "tf", "torch" or "none"; see `preprocess_input`.
        parameters: of the default model with the top, batch statistics included.
        depth: number of layers with weights, the top's included, which is how Keras's documentation counts it.
        size_mb: of the weights file, in MB.
        top1, top5: accuracy on ImageNet's validation images, as Keras publishes it, from 0 to 1; top5 is None where it
            does not say.
        licence: of the weights.
        paper: its URL.
        weight_files: what Keras published.
    """

    name: str
    family: type[Classifier]
    options: Mapping[str, Any]
    input_size: int
    preprocessing: Mode
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


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where weights come from: their licence, and the URL of the paper."""

    licence: str
    paper: str


_CONVNEXT = _Source("MIT (Meta)", "https://arxiv.org/abs/2201.03545")


_DENSENET = _Source("BSD 3-clause (Facebook)", "https://arxiv.org/abs/1608.06993")


_EFFICIENTNET = _Source("Apache 2.0", "https://arxiv.org/abs/1905.11946")


_EFFICIENTNET_V2 = _Source("Apache 2.0", "https://arxiv.org/abs/2104.00298")


_INCEPTION = _Source("Apache 2.0", "https://arxiv.org/abs/1512.00567")


_INCEPTION_RESNET = _Source("Apache 2.0", "https://arxiv.org/abs/1602.07261")


_MOBILENET = _Source("Apache 2.0", "https://arxiv.org/abs/1704.04861")


_MOBILENET_V2 = _Source("Apache 2.0", "https://arxiv.org/abs/1801.04381")


_MOBILENET_V3 = _Source("Apache 2.0", "https://arxiv.org/abs/1905.02244")


_NASNET = _Source("Apache 2.0", "https://arxiv.org/abs/1707.07012")


_RESNET = _Source("MIT (Kaiming He)", "https://arxiv.org/abs/1512.03385")


_RESNET_V2 = _Source("Apache 2.0", "https://arxiv.org/abs/1603.05027")


_VGG = _Source("CC BY 4.0 (Visual Geometry Group, Oxford)", "https://arxiv.org/abs/1409.1556")


_XCEPTION = _Source("Apache 2.0", "https://arxiv.org/abs/1610.02357")


def _spec(
    name: str,
    family: type[Classifier],
    input_size: int,
    preprocessing: Mode,
    parameters: int,
    depth: int,
    size_mb: int,
    top1: float,
    top5: float | None,
    source: _Source,
    **options: Any,
) -> ModelSpec:
    return ModelSpec(
        name,
        family,
        options,
        input_size,
        preprocessing,
        parameters,
        depth,
        size_mb,
        top1,
        top5,
        source.licence,
        source.paper,
        FILES[name],
    )


# Columns as in `_spec`: name, family, input size, preprocessing, parameters, depth, MB, top-1, top-5, source; options.
# fmt: off
_SPECS = (
    _spec("ConvNeXtBase", ConvNeXt, 224, "none", 88_591_464, 186, 339, 0.854, None, _CONVNEXT,
          depths=(3, 3, 27, 3), projection_dims=(128, 256, 512, 1024), prefix="convnext_base"),
    _spec("ConvNeXtLarge", ConvNeXt, 224, "none", 197_767_336, 186, 755, 0.864, None, _CONVNEXT,
          depths=(3, 3, 27, 3), projection_dims=(192, 384, 768, 1536), prefix="convnext_large"),
    _spec("ConvNeXtSmall", ConvNeXt, 224, "none", 50_223_688, 186, 192, 0.824, None, _CONVNEXT,
          depths=(3, 3, 27, 3), projection_dims=(96, 192, 384, 768), prefix="convnext_small"),
    _spec("ConvNeXtTiny", ConvNeXt, 224, "none", 28_589_128, 96, 109, 0.813, None, _CONVNEXT,
          depths=(3, 3, 9, 3), projection_dims=(96, 192, 384, 768), prefix="convnext_tiny"),
    _spec("ConvNeXtXLarge", ConvNeXt, 224, "none", 350_196_968, 186, 1310, 0.867, None, _CONVNEXT,
          depths=(3, 3, 27, 3), projection_dims=(256, 512, 1024, 2048), prefix="convnext_xlarge"),
    _spec("DenseNet121", DenseNet, 224, "torch", 8_062_504, 242, 33, 0.75, 0.923, _DENSENET, blocks=(6, 12, 24, 16)),
    _spec("DenseNet169", DenseNet, 224, "torch", 14_307_880, 338, 57, 0.762, 0.932, _DENSENET, blocks=(6, 12, 32, 32)),
    _spec("DenseNet201", DenseNet, 224, "torch", 20_242_984, 402, 80, 0.773, 0.936, _DENSENET, blocks=(6, 12, 48, 32)),
    _spec("EfficientNetB0", EfficientNet, 224, "none", 5_330_571, 132, 29, 0.771, 0.933, _EFFICIENTNET,
          width_coefficient=1.0, depth_coefficient=1.0, default_size=224, dropout_rate=0.2),
    _spec("EfficientNetB1", EfficientNet, 240, "none", 7_856_239, 186, 31, 0.791, 0.944, _EFFICIENTNET,
          width_coefficient=1.0, depth_coefficient=1.1, default_size=240, dropout_rate=0.2),
    _spec("EfficientNetB2", EfficientNet, 260, "none", 9_177_569, 186, 36, 0.801, 0.949, _EFFICIENTNET,
          width_coefficient=1.1, depth_coefficient=1.2, default_size=260, dropout_rate=0.3),
    _spec("EfficientNetB3", EfficientNet, 300, "none", 12_320_535, 210, 48, 0.816, 0.957, _EFFICIENTNET,
          width_coefficient=1.2, depth_coefficient=1.4, default_size=300, dropout_rate=0.3),
    _spec("EfficientNetB4", EfficientNet, 380, "none", 19_466_823, 258, 75, 0.829, 0.964, _EFFICIENTNET,
          width_coefficient=1.4, depth_coefficient=1.8, default_size=380, dropout_rate=0.4),
    _spec("EfficientNetB5", EfficientNet, 456, "none", 30_562_527, 312, 118, 0.836, 0.967, _EFFICIENTNET,
          width_coefficient=1.6, depth_coefficient=2.2, default_size=456, dropout_rate=0.4),
    _spec("EfficientNetB6", EfficientNet, 528, "none", 43_265_143, 360, 166, 0.84, 0.968, _EFFICIENTNET,
          width_coefficient=1.8, depth_coefficient=2.6, default_size=528, dropout_rate=0.5),
    _spec("EfficientNetB7", EfficientNet, 600, "none", 66_658_687, 438, 256, 0.843, 0.97, _EFFICIENTNET,
          width_coefficient=2.0, depth_coefficient=3.1, default_size=600, dropout_rate=0.5),
    _spec("EfficientNetV2B0", EfficientNetV2, 224, "none", 7_200_312, 151, 29, 0.787, 0.943, _EFFICIENTNET_V2,
          width_coefficient=1.0, depth_coefficient=1.0, default_size=224),
    _spec("EfficientNetV2B1", EfficientNetV2, 240, "none", 8_212_124, 185, 34, 0.798, 0.95, _EFFICIENTNET_V2,
          width_coefficient=1.0, depth_coefficient=1.1, default_size=240),
    _spec("EfficientNetV2B2", EfficientNetV2, 260, "none", 10_178_374, 193, 42, 0.805, 0.951, _EFFICIENTNET_V2,
          width_coefficient=1.1, depth_coefficient=1.2, default_size=260),
    _spec("EfficientNetV2B3", EfficientNetV2, 300, "none", 14_467_622, 225, 59, 0.82, 0.958, _EFFICIENTNET_V2,
          width_coefficient=1.2, depth_coefficient=1.4, default_size=300),
    _spec("EfficientNetV2L", EfficientNetV2, 480, "none", 119_027_848, 557, 479, 0.857, 0.975, _EFFICIENTNET_V2,
          stages=efficientnet_v2.L, stem_filters=32, imagenet_statistics=False, default_size=480),
    _spec("EfficientNetV2M", EfficientNetV2, 480, "none", 54_431_388, 403, 220, 0.853, 0.974, _EFFICIENTNET_V2,
          stages=efficientnet_v2.M, stem_filters=24, imagenet_statistics=False, default_size=480),
    _spec("EfficientNetV2S", EfficientNetV2, 384, "none", 21_612_360, 281, 88, 0.839, 0.967, _EFFICIENTNET_V2,
          stages=efficientnet_v2.S, stem_filters=24, imagenet_statistics=False, default_size=384),
    _spec("InceptionResNetV2", InceptionResNetV2, 299, "tf", 55_873_736, 449, 215, 0.803, 0.953, _INCEPTION_RESNET),
    _spec("InceptionV3", InceptionV3, 299, "tf", 23_851_784, 189, 92, 0.779, 0.937, _INCEPTION),
    _spec("MobileNet", MobileNet, 224, "tf", 4_253_864, 55, 16, 0.704, 0.895, _MOBILENET),
    _spec("MobileNetV2", MobileNetV2, 224, "tf", 3_538_984, 105, 14, 0.713, 0.901, _MOBILENET_V2),
    _spec("MobileNetV3Large", MobileNetV3, 224, "none", 5_507_432, 110, 22, 0.756, None, _MOBILENET_V3,
          blocks=mobilenet_v3.LARGE, last_filters=1280),
    _spec("MobileNetV3Small", MobileNetV3, 224, "none", 2_554_968, 88, 10, 0.681, None, _MOBILENET_V3,
          blocks=mobilenet_v3.SMALL, last_filters=1024),
    _spec("NASNetLarge", NASNet, 331, "tf", 88_949_818, 533, 343, 0.825, 0.96, _NASNET,
          penultimate_filters=4032, num_blocks=6, stem_block_filters=96, skip_reduction=True, default_size=331),
    _spec("NASNetMobile", NASNet, 224, "tf", 5_326_716, 389, 23, 0.744, 0.919, _NASNET,
          penultimate_filters=1056, num_blocks=4, stem_block_filters=32, skip_reduction=False, default_size=224),
    _spec("ResNet101", ResNet, 224, "caffe", 44_707_176, 209, 171, 0.764, 0.928, _RESNET, blocks=(3, 4, 23, 3)),
    _spec("ResNet101V2", ResNetV2, 224, "tf", 44_675_560, 205, 171, 0.772, 0.938, _RESNET_V2, blocks=(3, 4, 23, 3)),
    _spec("ResNet152", ResNet, 224, "caffe", 60_419_944, 311, 232, 0.766, 0.931, _RESNET, blocks=(3, 8, 36, 3)),
    _spec("ResNet152V2", ResNetV2, 224, "tf", 60_380_648, 307, 232, 0.78, 0.942, _RESNET_V2, blocks=(3, 8, 36, 3)),
    _spec("ResNet50", ResNet, 224, "caffe", 25_636_712, 107, 98, 0.749, 0.921, _RESNET, blocks=(3, 4, 6, 3)),
    _spec("ResNet50V2", ResNetV2, 224, "tf", 25_613_800, 103, 98, 0.76, 0.93, _RESNET_V2, blocks=(3, 4, 6, 3)),
    _spec("VGG16", VGG, 224, "caffe", 138_357_544, 16, 528, 0.713, 0.901, _VGG, convs=(2, 2, 3, 3, 3)),
    _spec("VGG19", VGG, 224, "caffe", 143_667_240, 19, 549, 0.713, 0.9, _VGG, convs=(2, 2, 4, 4, 4)),
    _spec("Xception", Xception, 299, "tf", 22_910_480, 81, 88, 0.79, 0.945, _XCEPTION),
)
# fmt: on


_BY_NAME = MappingProxyType({spec.name: spec for spec in _SPECS})


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models, as Keras's constructors are called, in alphabetical order.

    Args:
        pattern: with `fnmatch`'s wildcards; case does not matter.
    """
    return sorted(name for name in _BY_NAME if fnmatch.fnmatch(name.lower(), pattern.lower()))


def spec(name: str) -> ModelSpec:
    """What is known of a model.

    Raises:
        ValueError: there is no such model; the message names the nearest.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(unknown("model", name, _BY_NAME))
    return _BY_NAME[name]


def create(
    name: str,
    *,
    include_top: bool = True,
    classes: int = 1000,
    pooling: str | None = None,
    classifier_activation: Activation = "softmax",
    input_shape: tuple[int | None, int | None, int] | None = None,
    dtype: Any = jnp.float32,
    head: Head | None = None,
    **family_options: Any,
) -> Classifier:
    """A model's network: a Flax module, without variables. Nothing is read or computed.

    Args:
        name: Keras's name of the model, from `list_models()`.
        include_top: whether the classifier at the end is part of the network.
        classes: number of outputs of the classifier; goes with the top.
        pooling: without the top: None for the feature map, "avg" or "max" for a vector.
        classifier_activation: of the last layer: a name of Keras's, a callable, or None for logits.
        input_shape: (height, width, channels); see `Classifier`.
        dtype: of the computation; parameters are float32.
        head: a new classifier (`fzoo.Head`) in place of the family's own, for fine-tuning.
        **family_options: the family's own, e.g. `alpha` of MobileNetV2; see its module.

    Raises:
        ValueError: an unknown model or option, or one that can't be honoured.
    """
    record = spec(name)
    known = family_defaults(record)
    for option in family_options:
        if option not in known:
            raise ValueError(unknown(f"option of {name}", option, known or ["none beyond those of every model"]))
    if not include_top and classes != 1000:
        raise ValueError(f"classes={classes} goes with include_top=True: without the top there are no classes")
    return record.family(
        include_top=include_top,
        classes=classes,
        pooling=pooling,
        classifier_activation=classifier_activation,
        input_shape=input_shape,
        dtype=dtype,
        head=head,
        **{**record.options, **family_options},
    )


def family_defaults(record: ModelSpec) -> dict[str, Any]:
    """The options of a model's family, beyond those of every model, with the model's values."""
    common = {field.name for field in dataclasses.fields(Classifier)}
    fields = [field for field in dataclasses.fields(record.family) if field.name not in common]
    return {field.name: record.options.get(field.name, field.default) for field in fields}


def load(
    name: str,
    *,
    weights: str | os.PathLike | None = "imagenet",
    rng: jax.Array | None = None,
    **create_options: Any,
) -> tuple[Classifier, dict[str, Any]]:
    """A model's network with its variables.

    Args:
        name: Keras's name of the model.
        weights: "imagenet" for what Keras published (downloaded once into Keras's own cache), the path of a file that
            Keras or `save_variables` wrote, or None for random ones, with Keras's initialisers. EfficientNet's
            published files, wherever they lie, come with `divide_by_std=True`, which their training wants; one that
            another wrote does not (Keras, too, adds that step for "imagenet" alone).
        rng: a `jax.random.key` for `weights=None`; key 0 by default.
        **create_options: see `create`.

    Returns:
        (module, variables), for `module.apply`, `predict` and `features`.

    Raises:
        ValueError: a bad option, no published file for these options, or a file that does not fit.
        OSError: the file is not there, or can't be downloaded.
    """
    if weights is not None and rng is not None:
        raise ValueError(f"rng goes with weights=None, weights={str(weights)!r} given")
    if weights is None:
        module = create(name, **create_options)
        return module, random_variables(module, jax.random.key(0) if rng is None else rng)
    if not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights):
        raise ValueError(f"weights={weights!r} given, 'imagenet', None or a path expected")
    if weights == "imagenet" or is_published(name, weights):
        create_options = {**needed(name), **create_options}
    module = create(name, **create_options)
    if weights == "imagenet":
        file = published(name, module)
        proof = proof_of(file, module)
        weights = fetch(file.url, file.name, proof, ", or pass the path of one: weights=PATH, --weights PATH")
    return module, load_variables(module, weights)


def proof_of(file: WeightFile, module: Classifier) -> Proof:
    """What a published file is known by: its hash, or, where Keras publishes none, that it fits its network."""
    return file.hash or functools.partial(check_fit, module)


def needed(name: str) -> dict[str, Any]:
    """The options that all published files of a model want: EfficientNet's division by the standard deviation."""
    wanted = [file.options.items() for file in spec(name).weight_files]
    return {key: value for key, value in wanted[0] if all((key, value) in items for items in wanted)}


def is_published(name: str, path: str | os.PathLike) -> bool:
    """Whether a file is one that Keras published, by its hash; asked only where that makes a difference."""
    if not needed(name) or not os.path.isfile(path):
        return False
    hashes = {file.hash for file in spec(name).weight_files}
    return any(file_hash(path, algorithm) in hashes for algorithm in ("md5", "sha256"))


def published(name: str, module: Classifier) -> WeightFile:
    """The published file for a model created with these options.

    Raises:
        ValueError: Keras published none; the message says for which options it did.
    """
    if module.head is not None:
        raise ValueError("the ImageNet weights have no such head: fzoo.transfer starts a network with a head from them")
    if module.include_top and module.classes != 1000:
        raise ValueError(f"the ImageNet weights of {name} have 1000 classes, classes={module.classes} given")
    record = spec(name)
    defaults = {
        option: value for option, value in family_defaults(record).items() if option not in record.family.weightless
    }
    height, width, channels = module.example_shape
    if channels != 3:
        raise ValueError(f"the ImageNet weights of {name} are for 3 channels, {channels} given")
    if module.fixed_size and module.include_top and (height, width) != (record.input_size,) * 2:
        size = f"{record.input_size} x {record.input_size}"
        raise ValueError(f"the ImageNet weights of {name} with its top are for {size}, {height} x {width} given")
    files = [file for file in record.weight_files if file.include_top == module.include_top]
    fitting = [f for f in files if all(getattr(module, k) == f.options.get(k, v) for k, v in defaults.items())]
    if not fitting:
        given = ", ".join(f"{k}={getattr(module, k)!r}" for k in defaults)
        offers = dict.fromkeys(", ".join(f"{k}={v!r}" for k, v in {**defaults, **f.options}.items()) for f in files)
        raise ValueError(f"no ImageNet weights of {name} for {given}; Keras published {' | '.join(offers)}")
    # One file a size: that of the input if square and published, else that of the default size, as Keras chooses.
    exact = [f for f in fitting if f.size == height == width]
    return (exact or fitting)[0]


def recipe(name: str, size: int | tuple[int, int] | None = None) -> Recipe:
    """Return how a photograph becomes the input of a model, as the published accuracies are measured.

    Args:
        name: the model.
        size: (height, width), or one number for both; the model's own by default.

    Raises:
        ValueError: an unknown model, or no size of an image.
    """
    record = spec(name)
    return Recipe(check_size(record.input_size if size is None else size))


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
        images: (N, H, W, 3) or (H, W, 3) RGB pixels from 0 to 255, NumPy or JAX, integer or float.
        name: the model, e.g. "ResNet50", which fixes the mode: "caffe" (RGB to BGR, minus ImageNet's mean), "tf" (to
            -1..1), "torch" (to 0..1, then ImageNet's mean and deviation), "none" (the network does it itself).
        data_format: "channels_last", or "channels_first" for (N, 3, H, W). The layout is kept: fzoo's networks take
            channels last.

    Returns:
        An array of the same kind, shape and float dtype; float32 for integers.

    Raises:
        ValueError: an unknown model or data format, or an array without three channels where that says they are.
    """
    return preprocess(images, spec(name).preprocessing, data_format=data_format)
