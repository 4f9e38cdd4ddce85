"""The models, as data: one record for each. The only file that knows both a family and its files."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fzoo.layers import Activation, Classifier, random_variables, unknown
from fzoo.models.densenet import DenseNet
from fzoo.models.inception_resnet_v2 import InceptionResNetV2
from fzoo.models.inception_v3 import InceptionV3
from fzoo.models.mobilenet import MobileNet
from fzoo.models.mobilenet_v2 import MobileNetV2
from fzoo.models.nasnet import NASNet
from fzoo.models.resnet import ResNet
from fzoo.models.vgg import VGG
from fzoo.models.xception import Xception
from fzoo.preprocessing import Mode
from fzoo.weights import load_keras_weights
from fzoo.weights.download import fetch

_BASE = "https://storage.googleapis.com/tensorflow/keras-applications/"


@dataclasses.dataclass(frozen=True, eq=False)
class WeightFile:
    """A file of ImageNet weights that Keras published.

    Attributes:
        url: where it lies.
        md5: of its content, or None where Keras publishes none.
        include_top: whether it holds the classifier.
        name: in the cache; the URL's last part unless Keras calls it otherwise.
        options: what the model must have been created with, e.g. {"alpha": 0.5}.
        size: height and width it was trained for, where there is one file for each size; None for the only one.
    """

    url: str
    md5: str | None
    include_top: bool
    name: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    size: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.url.rsplit("/", 1)[1])


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
        depth: layers on the longest way, as Keras's documentation counts them.
        size_mb: of the weights file, in MB.
        top1, top5: accuracy on ImageNet's validation images, as Keras publishes it, from 0 to 1.
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
    top5: float
    licence: str
    paper: str
    weight_files: tuple[WeightFile, ...]

    def __post_init__(self):
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def min_size(self) -> int:
        """The least height and width of an image, in pixels."""
        return self.family.min_size


def _pair(folder: str, stem: str, md5: str, md5_no_top: str) -> tuple[WeightFile, ...]:
    """The two files of most models."""
    stem = f"{_BASE}{folder}/{stem}_weights_tf_dim_ordering_tf_kernels"
    return (WeightFile(f"{stem}.h5", md5, True), WeightFile(f"{stem}_notop.h5", md5_no_top, False))


def _mobilenet_v2_files() -> tuple[WeightFile, ...]:
    stem = f"{_BASE}mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels"
    return tuple(
        WeightFile(
            f"{stem}_{alpha}_{size}{'' if top else '_no_top'}.h5", None, top, options={"alpha": alpha}, size=size
        )
        for alpha in (1.0, 0.35, 0.5, 0.75, 1.3, 1.4)
        for size in (224, 192, 160, 128, 96)
        for top in (True, False)
    )


def _mobilenet_files() -> tuple[WeightFile, ...]:
    names = {1.0: "1_0", 0.75: "7_5", 0.5: "5_0", 0.25: "2_5"}
    return tuple(
        WeightFile(
            f"{_BASE}mobilenet/mobilenet_{names[alpha]}_{size}_tf{'' if top else '_no_top'}.h5",
            None,
            top,
            options={"alpha": alpha},
            size=size,
        )
        for alpha in names
        for size in (224, 192, 160, 128)
        for top in (True, False)
    )


def _nasnet_files(kind: str, md5: str, md5_no_top: str) -> tuple[WeightFile, ...]:
    return (
        WeightFile(f"{_BASE}nasnet/NASNet-{kind}.h5", md5, True, name=f"nasnet_{kind}.h5"),
        WeightFile(f"{_BASE}nasnet/NASNet-{kind}-no-top.h5", md5_no_top, False, name=f"nasnet_{kind}_no_top.h5"),
    )


_APACHE = "Apache 2.0"
_BSD = "BSD 3-clause (Facebook)"
_MIT = "MIT (Kaiming He)"
_VGG = "CC BY 4.0 (Visual Geometry Group, Oxford)"

_SPECS = (
    ModelSpec(
        name="DenseNet121",
        family=DenseNet,
        options={"blocks": (6, 12, 24, 16)},
        input_size=224,
        preprocessing="torch",
        parameters=8_062_504,
        depth=242,
        size_mb=33,
        top1=0.75,
        top5=0.923,
        licence=_BSD,
        paper="https://arxiv.org/abs/1608.06993",
        weight_files=_pair(
            "densenet", "densenet121", "9d60b8095a5708f2dcce2bca79d332c7", "30ee3e1110167f948a6b9946edeeb738"
        ),
    ),
    ModelSpec(
        name="DenseNet169",
        family=DenseNet,
        options={"blocks": (6, 12, 32, 32)},
        input_size=224,
        preprocessing="torch",
        parameters=14_307_880,
        depth=338,
        size_mb=57,
        top1=0.762,
        top5=0.932,
        licence=_BSD,
        paper="https://arxiv.org/abs/1608.06993",
        weight_files=_pair(
            "densenet", "densenet169", "d699b8f76981ab1b30698df4c175e90b", "b8c4d4c20dd625c148057b9ff1c1176b"
        ),
    ),
    ModelSpec(
        name="DenseNet201",
        family=DenseNet,
        options={"blocks": (6, 12, 48, 32)},
        input_size=224,
        preprocessing="torch",
        parameters=20_242_984,
        depth=402,
        size_mb=80,
        top1=0.773,
        top5=0.936,
        licence=_BSD,
        paper="https://arxiv.org/abs/1608.06993",
        weight_files=_pair(
            "densenet", "densenet201", "1ceb130c1ea1b78c3bf6114dbdfd8807", "c13680b51ded0fb44dff2d8f86ac8bb1"
        ),
    ),
    ModelSpec(
        name="InceptionResNetV2",
        family=InceptionResNetV2,
        options={},
        input_size=299,
        preprocessing="tf",
        parameters=55_873_736,
        depth=449,
        size_mb=215,
        top1=0.803,
        top5=0.953,
        licence=_APACHE,
        paper="https://arxiv.org/abs/1602.07261",
        weight_files=_pair(
            "inception_resnet_v2",
            "inception_resnet_v2",
            "e693bd0210a403b3192acc6073ad2e96",
            "d19885ff4a710c122648d3b5c3b684e4",
        ),
    ),
    ModelSpec(
        name="InceptionV3",
        family=InceptionV3,
        options={},
        input_size=299,
        preprocessing="tf",
        parameters=23_851_784,
        depth=189,
        size_mb=92,
        top1=0.779,
        top5=0.937,
        licence=_APACHE,
        paper="https://arxiv.org/abs/1512.00567",
        weight_files=_pair(
            "inception_v3", "inception_v3", "9a0d58056eeedaa3f26cb7ebd46da564", "bcbd6486424b2319ff4ef7d526e38f63"
        ),
    ),
    ModelSpec(
        name="MobileNet",
        family=MobileNet,
        options={},
        input_size=224,
        preprocessing="tf",
        parameters=4_253_864,
        depth=55,
        size_mb=16,
        top1=0.704,
        top5=0.895,
        licence=_APACHE,
        paper="https://arxiv.org/abs/1704.04861",
        weight_files=_mobilenet_files(),
    ),
    ModelSpec(
        name="MobileNetV2",
        family=MobileNetV2,
        options={},
        input_size=224,
        preprocessing="tf",
        parameters=3_538_984,
        depth=105,
        size_mb=14,
        top1=0.713,
        top5=0.901,
        licence=_APACHE,
        paper="https://arxiv.org/abs/1801.04381",
        weight_files=_mobilenet_v2_files(),
    ),
    ModelSpec(
        name="NASNetLarge",
        family=NASNet,
        options={
            "penultimate_filters": 4032,
            "num_blocks": 6,
            "stem_block_filters": 96,
            "skip_reduction": True,
            "default_size": 331,
        },
        input_size=331,
        preprocessing="tf",
        parameters=88_949_818,
        depth=533,
        size_mb=343,
        top1=0.825,
        top5=0.96,
        licence=_APACHE,
        paper="https://arxiv.org/abs/1707.07012",
        weight_files=_nasnet_files("large", "11577c9a518f0070763c2b964a382f17", "d81d89dc07e6e56530c4e77faddd61b5"),
    ),
    ModelSpec(
        name="NASNetMobile",
        family=NASNet,
        options={
            "penultimate_filters": 1056,
            "num_blocks": 4,
            "stem_block_filters": 32,
            "skip_reduction": False,
            "default_size": 224,
        },
        input_size=224,
        preprocessing="tf",
        parameters=5_326_716,
        depth=389,
        size_mb=23,
        top1=0.744,
        top5=0.919,
        licence=_APACHE,
        paper="https://arxiv.org/abs/1707.07012",
        weight_files=_nasnet_files("mobile", "020fb642bf7360b370c678b08e0adf61", "1ed92395b5b598bdda52abe5c0dbfd63"),
    ),
    ModelSpec(
        name="ResNet50",
        family=ResNet,
        options={"blocks": (3, 4, 6, 3)},
        input_size=224,
        preprocessing="caffe",
        parameters=25_636_712,
        depth=107,
        size_mb=98,
        top1=0.749,
        top5=0.921,
        licence=_MIT,
        paper="https://arxiv.org/abs/1512.03385",
        weight_files=_pair(
            "resnet", "resnet50", "2cb95161c43110f7111970584f804107", "4d473c1dd8becc155b73f8504c6f6626"
        ),
    ),
    ModelSpec(
        name="VGG16",
        family=VGG,
        options={"convs": (2, 2, 3, 3, 3)},
        input_size=224,
        preprocessing="caffe",
        parameters=138_357_544,
        depth=16,
        size_mb=528,
        top1=0.713,
        top5=0.901,
        licence=_VGG,
        paper="https://arxiv.org/abs/1409.1556",
        weight_files=_pair("vgg16", "vgg16", "64373286793e3c8b2b4e3219cbf3544b", "6d6bbae143d832006294945121d1f1fc"),
    ),
    ModelSpec(
        name="VGG19",
        family=VGG,
        options={"convs": (2, 2, 4, 4, 4)},
        input_size=224,
        preprocessing="caffe",
        parameters=143_667_240,
        depth=19,
        size_mb=549,
        top1=0.713,
        top5=0.9,
        licence=_VGG,
        paper="https://arxiv.org/abs/1409.1556",
        weight_files=_pair("vgg19", "vgg19", "cbe5617147190e668d6c5d5026f83318", "253f8cb515780f3b799900260a226db6"),
    ),
    ModelSpec(
        name="Xception",
        family=Xception,
        options={},
        input_size=299,
        preprocessing="tf",
        parameters=22_910_480,
        depth=81,
        size_mb=88,
        top1=0.79,
        top5=0.945,
        licence=_APACHE,
        paper="https://arxiv.org/abs/1610.02357",
        weight_files=_pair(
            "xception", "xception", "0a58e3b7378bc2990ea3b43d5981f1f6", "b0042744bf5b25fce3cb969f33bebb97"
        ),
    ),
)

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
            Keras wrote, or None for random ones, with Keras's initialisers.
        rng: a `jax.random.key` for `weights=None`; key 0 by default.
        **create_options: see `create`.

    Returns:
        (module, variables), for `module.apply`, `predict` and `features`.

    Raises:
        ValueError: a bad option, no published file for these options, or a file that does not fit.
        OSError: the file is not there, or can't be downloaded.
    """
    module = create(name, **create_options)
    if weights is None:
        return module, random_variables(module, jax.random.key(0) if rng is None else rng)
    if rng is not None:
        raise ValueError(f"rng goes with weights=None, weights={str(weights)!r} given")
    if not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights):
        raise ValueError(f"weights={weights!r} given, 'imagenet', None or a path expected")
    if weights == "imagenet":
        file = published(name, module)
        weights = fetch(file.url, file.name, file.md5, ", or pass the path of one: weights=PATH, --weights PATH")
    return module, load_keras_weights(module, weights)


def published(name: str, module: Classifier) -> WeightFile:
    """The published file for a model created with these options.

    Raises:
        ValueError: Keras published none; the message says for which options it did.
    """
    if module.include_top and module.classes != 1000:
        raise ValueError(f"the ImageNet weights of {name} have 1000 classes, classes={module.classes} given")
    record = spec(name)
    defaults = {option: value for option, value in family_defaults(record).items() if option != "dropout"}
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
