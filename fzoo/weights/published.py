"""The files of published ImageNet weights, as data: where each lies, its hash, what it was trained for.

Keras gives no hash for MobileNet and MobileNetV2: of these, the number and shapes of the arrays are the only check. The
Hub of Hugging Face, where timm's files lie, says a file's hash when it is asked for the file. PyTorch's own files have
the first digits of theirs in their names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_BASE = "https://storage.googleapis.com/tensorflow/keras-applications/"
_HUB = "https://huggingface.co/timm/"
_TORCHVISION = "https://download.pytorch.org/models/"


@dataclasses.dataclass(frozen=True, eq=False)
class WeightFile:
    """A published file of ImageNet weights.

    Attributes:
        url: where it lies.
        hash: of its content, "md5:..." or "sha256:...", where its first digits may be all that is published; None where
            none is published beside it.
        include_top: whether it holds the classifier.
        name: in the cache; the URL's last part unless Keras calls it otherwise.
        options: what the model must have been created with, e.g. {"alpha": 0.5}.
        size: height and width it was trained for, where there is one file for each size; None for the only one.
    """

    url: str
    hash: str | None
    include_top: bool
    name: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    size: int | None = None

    @property
    def is_state_dict(self) -> bool:
        """Whether it is PyTorch's, which a network without the top takes as well."""
        return self.name.endswith((".safetensors", ".pth"))

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.url.rsplit("/", 1)[1])
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))


def hub_file(name: str) -> WeightFile:
    """Return the file of timm's weights of this name, with its tag, on the Hub."""
    return WeightFile(f"{_HUB}{name}/resolve/main/model.safetensors", None, True, name=f"{name}.safetensors")


def torchvision_file(name: str) -> WeightFile:
    """Return torchvision's own file of this name, whose end are the first eight digits of its SHA-256.

    It is one of `torch.save`, which fzoo[torch] reads.
    """
    return WeightFile(f"{_TORCHVISION}{name}.pth", f"sha256:{name.rpartition('-')[2]}", True)


def _pair(stem: str, with_top: str, without: str, no_top: str = "_notop.h5", **options: Any) -> tuple[WeightFile, ...]:
    """The two files of most models: of a URL's beginning, two hashes, and how the name without the top ends."""
    return (
        WeightFile(f"{stem}.h5", with_top, True, options=options),
        WeightFile(f"{stem}{no_top}", without, False, options=options),
    )


def _md5(folder: str, stem: str, with_top: str, without: str) -> tuple[WeightFile, ...]:
    stem = f"{_BASE}{folder}/{stem}_weights_tf_dim_ordering_tf_kernels"
    return _pair(stem, f"md5:{with_top}", f"md5:{without}")


def _resnet(name: str, with_top: str, without: str) -> tuple[WeightFile, ...]:
    return _md5("resnet", name, with_top, without)


def _mobilenet() -> tuple[WeightFile, ...]:
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


def _mobilenet_v2() -> tuple[WeightFile, ...]:
    stem = f"{_BASE}mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels"
    return tuple(
        WeightFile(
            f"{stem}_{alpha}_{size}{'' if top else '_no_top'}.h5", None, top, options={"alpha": alpha}, size=size
        )
        for alpha in (1.0, 0.35, 0.5, 0.75, 1.3, 1.4)
        for size in (224, 192, 160, 128, 96)
        for top in (True, False)
    )


def _mobilenet_v3(kind: str, alpha: float, minimalistic: bool, with_top: str, without: str) -> tuple[WeightFile, ...]:
    stem = f"{_BASE}mobilenet_v3/weights_mobilenet_v3_{kind}{'_minimalistic' * minimalistic}_224_{alpha}_float"
    options = {"alpha": alpha, "minimalistic": minimalistic}
    return _pair(stem, f"md5:{with_top}", f"md5:{without}", "_no_top_v2.h5", **options)


def _nasnet(kind: str, with_top: str, without: str) -> tuple[WeightFile, ...]:
    url = f"{_BASE}nasnet/NASNet-{kind}"
    return (
        WeightFile(f"{url}.h5", f"md5:{with_top}", True, name=f"nasnet_{kind}.h5"),
        WeightFile(f"{url}-no-top.h5", f"md5:{without}", False, name=f"nasnet_{kind}_no_top.h5"),
    )


def _efficientnet(kind: str, with_top: str, without: str) -> tuple[WeightFile, ...]:
    stem = f"https://storage.googleapis.com/keras-applications/efficientnet{kind}"
    return _pair(stem, f"md5:{with_top}", f"md5:{without}", divide_by_std=True)


def _efficientnet_v2(kind: str, with_top: str, without: str) -> tuple[WeightFile, ...]:
    return _pair(f"{_BASE}efficientnet_v2/efficientnetv2-{kind}", f"md5:{with_top}", f"md5:{without}")


def _convnext(kind: str, with_top: str, without: str) -> tuple[WeightFile, ...]:
    return _pair(f"{_BASE}convnext/convnext_{kind}", f"sha256:{with_top}", f"sha256:{without}")


# For each model of a family: its files, that for its default options first.

CONVNEXT = {
    "ConvNeXtBase": _convnext(
        "base",
        "52cbb006d3dadd03f6e095a8ca1aca47aecdd75acb4bc74bce1f5c695d0086e6",
        "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45",
    ),
    "ConvNeXtLarge": _convnext(
        "large",
        "070c5ed9ed289581e477741d3b34beffa920db8cf590899d6d2c67fba2a198a6",
        "96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd",
    ),
    "ConvNeXtSmall": _convnext(
        "small",
        "ce1277d8f1ee5a0ef0e171469089c18f5233860ceaf9b168049cb9263fd7483c",
        "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab",
    ),
    "ConvNeXtTiny": _convnext(
        "tiny",
        "8ae6e78ce2933352b1ef4008e6dd2f17bc40771563877d156bc6426c7cf503ff",
        "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1",
    ),
    "ConvNeXtXLarge": _convnext(
        "xlarge",
        "c1f5ccab661354fc3a79a10fa99af82f0fbf10ec65cb894a3ae0815f17a889ee",
        "de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05",
    ),
}

DENSENET = {
    "DenseNet121": _md5(
        "densenet", "densenet121", "9d60b8095a5708f2dcce2bca79d332c7", "30ee3e1110167f948a6b9946edeeb738"
    ),
    "DenseNet169": _md5(
        "densenet", "densenet169", "d699b8f76981ab1b30698df4c175e90b", "b8c4d4c20dd625c148057b9ff1c1176b"
    ),
    "DenseNet201": _md5(
        "densenet", "densenet201", "1ceb130c1ea1b78c3bf6114dbdfd8807", "c13680b51ded0fb44dff2d8f86ac8bb1"
    ),
}

EFFICIENTNET = {
    "EfficientNetB0": _efficientnet("b0", "902e53a9f72be733fc0bcb005b3ebbac", "50bc09e76180e00e4465e1a485ddc09d"),
    "EfficientNetB1": _efficientnet("b1", "1d254153d4ab51201f1646940f018540", "74c4e6b3e1f6a1eea24c589628592432"),
    "EfficientNetB2": _efficientnet("b2", "b15cce36ff4dcbd00b6dd88e7857a6ad", "111f8e2ac8aa800a7a99e3239f7bfb39"),
    "EfficientNetB3": _efficientnet("b3", "ffd1fdc53d0ce67064dc6a9c7960ede0", "af6d107764bb5b1abb91932881670226"),
    "EfficientNetB4": _efficientnet("b4", "18c95ad55216b8f92d7e70b3a046e2fc", "ebc24e6d6c33eaebbd558eafbeedf1ba"),
    "EfficientNetB5": _efficientnet("b5", "ace28f2a6363774853a83a0b21b9421a", "38879255a25d3c92d5e44e04ae6cec6f"),
    "EfficientNetB6": _efficientnet("b6", "165f6e37dce68623721b423839de8be5", "9ecce42647a20130c1f39a5d4cb75743"),
    "EfficientNetB7": _efficientnet("b7", "8c03f828fec3ef71311cd463b6759d99", "cbcfe4450ddf6f3ad90b1b398090fe4a"),
}

EFFICIENTNET_V2 = {
    "EfficientNetV2B0": _efficientnet_v2("b0", "21ecbf6da12460d5c40bb2f29ceb2188", "893217f2bb855e2983157299931e43ff"),
    "EfficientNetV2B1": _efficientnet_v2("b1", "069f0534ff22adf035c89e2d9547a9dc", "0e80663031ca32d657f9caa404b6ec37"),
    "EfficientNetV2B2": _efficientnet_v2("b2", "424e49f28180edbde1e94797771950a7", "1dfe2e7a5d45b6632553a8961ea609eb"),
    "EfficientNetV2B3": _efficientnet_v2("b3", "1f1fc43bd98a6e4fd8fdfd551e02c7a0", "f6abf7b5849ac99a89b50dd3fd532856"),
    "EfficientNetV2L": _efficientnet_v2("l", "27e6d408b53c7ebc868fefa357689935", "b0b66b5c863aef5b46e8608fe1711615"),
    "EfficientNetV2M": _efficientnet_v2("m", "a3bf6aa3276309f4fc6a34aa114c95cd", "1b8dc055df72dde80d614482840fe342"),
    "EfficientNetV2S": _efficientnet_v2("s", "e1d88a8495beba45748fedd0cecbe016", "af0682fb74e8c54910f2d4393339c070"),
}

INCEPTION_RESNET_V2 = {
    "InceptionResNetV2": _md5(
        "inception_resnet_v2",
        "inception_resnet_v2",
        "e693bd0210a403b3192acc6073ad2e96",
        "d19885ff4a710c122648d3b5c3b684e4",
    ),
}

INCEPTION_V3 = {
    "InceptionV3": _md5(
        "inception_v3", "inception_v3", "9a0d58056eeedaa3f26cb7ebd46da564", "bcbd6486424b2319ff4ef7d526e38f63"
    ),
}

MOBILENET = {
    "MobileNet": _mobilenet(),
}

MOBILENET_V2 = {
    "MobileNetV2": _mobilenet_v2(),
}

MOBILENET_V3 = {
    "MobileNetV3Large": (
        *_mobilenet_v3("large", 1.0, False, "59e551e166be033d707958cf9e29a6a7", "07fb09a5933dd0c8eaafa16978110389"),
        *_mobilenet_v3("large", 0.75, False, "765b44a33ad4005b3ac83185abf1d0eb", "40af19a13ebea4e2ee0c676887f69a2e"),
        *_mobilenet_v3("large", 1.0, True, "675e7b876c45c57e9e63e6d90a36599c", "ec5221f64a2f6d1ef965a614bdae7973"),
    ),
    "MobileNetV3Small": (
        *_mobilenet_v3("small", 1.0, False, "8768d4c2e7dee89b9d02b2d03d65d862", "d3e8ec802a04aa4fc771ee12a9a9b836"),
        *_mobilenet_v3("small", 0.75, False, "cb65d4e5be93758266aa0a7f2c6708b7", "ebdb5cc8e0b497cd13a7c275d475c819"),
        *_mobilenet_v3("small", 1.0, True, "99cd97fb2fcdad2bf028eb838de69e37", "cde8136e733e811080d9fcd8a252f7e4"),
    ),
}

NASNET = {
    "NASNetLarge": _nasnet("large", "11577c9a518f0070763c2b964a382f17", "d81d89dc07e6e56530c4e77faddd61b5"),
    "NASNetMobile": _nasnet("mobile", "020fb642bf7360b370c678b08e0adf61", "1ed92395b5b598bdda52abe5c0dbfd63"),
}

RESNET = {
    "ResNet101": _resnet("resnet101", "f1aeb4b969a6efcfb50fad2f0c20cfc5", "88cf7a10940856eca736dc7b7e228a21"),
    "ResNet152": _resnet("resnet152", "100835be76be38e30d865e96f2aaae62", "ee4c566cf9a93f14d82f913c2dc6dd0c"),
    "ResNet50": _resnet("resnet50", "2cb95161c43110f7111970584f804107", "4d473c1dd8becc155b73f8504c6f6626"),
    "ResNeXt101": _resnet("resnext101", "34fb605428fcc7aa4d62f44404c11509", "0f678c91647380debd923963594981b3"),
    "ResNeXt50": _resnet("resnext50", "67a5b30d522ed92f75a1f16eef299d1a", "62527c363bdd9ec598bed41947b379fc"),
}

RESNET_V2 = {
    "ResNet101V2": _resnet("resnet101v2", "6343647c601c52e1368623803854d971", "c0ed64b8031c3730f411d2eb4eea35b5"),
    "ResNet152V2": _resnet("resnet152v2", "a49b44d1979771252814e80f8ec446f9", "ed17cf2e0169df9d443503ef94b23b33"),
    "ResNet50V2": _resnet("resnet50v2", "3ef43a0b657b3be2300d5770ece849e0", "fac2f116257151a9d068a22e544a4917"),
}

VGG = {
    "VGG16": _md5("vgg16", "vgg16", "64373286793e3c8b2b4e3219cbf3544b", "6d6bbae143d832006294945121d1f1fc"),
    "VGG19": _md5("vgg19", "vgg19", "cbe5617147190e668d6c5d5026f83318", "253f8cb515780f3b799900260a226db6"),
}

XCEPTION = {
    "Xception": _md5("xception", "xception", "0a58e3b7378bc2990ea3b43d5981f1f6", "b0042744bf5b25fce3cb969f33bebb97"),
}
