"""EfficientNetV2: EfficientNet with plain convolutions in its first stages, where depthwise ones are slow.

Tan and Le, "EfficientNetV2: Smaller Models and Faster Training", https://arxiv.org/abs/2104.00298, as in
keras/applications/efficientnet_v2.py. The preprocessing is part of the network: it takes pixels from 0 to 255.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, option, rows
from fzoo.models.efficientnet import CONV_INIT, Scaled, residual, squeeze_and_excite
from fzoo.models.spec import UNTAGGED, ModelSpec, Tag
from fzoo.weights import published


class Stage(NamedTuple):
    """A row of the paper's table 4; its kernels are 3x3.

    Attributes:
        fused: a plain convolution in place of a 1x1 and a depthwise one, and no squeeze-and-excitation.
        expansion: channels inside, over those of the input.
        filters: channels of the output.
        repeats: number of blocks.
        stride: of the first.
    """

    fused: bool
    expansion: int
    filters: int
    repeats: int
    stride: int


B = (
    Stage(True, 1, 16, 1, 1),
    Stage(True, 4, 32, 2, 2),
    Stage(True, 4, 48, 2, 2),
    Stage(False, 4, 96, 3, 2),
    Stage(False, 6, 112, 5, 1),
    Stage(False, 6, 192, 8, 2),
)
S = (
    Stage(True, 1, 24, 2, 1),
    Stage(True, 4, 48, 4, 2),
    Stage(True, 4, 64, 4, 2),
    Stage(False, 4, 128, 6, 2),
    Stage(False, 6, 160, 9, 1),
    Stage(False, 6, 256, 15, 2),
)
M = (
    Stage(True, 1, 24, 3, 1),
    Stage(True, 4, 48, 5, 2),
    Stage(True, 4, 80, 5, 2),
    Stage(False, 4, 160, 7, 2),
    Stage(False, 6, 176, 14, 1),
    Stage(False, 6, 304, 18, 2),
    Stage(False, 6, 512, 5, 1),
)
L = (
    Stage(True, 1, 32, 4, 1),
    Stage(True, 4, 64, 7, 2),
    Stage(True, 4, 96, 7, 2),
    Stage(False, 4, 192, 10, 2),
    Stage(False, 6, 224, 19, 1),
    Stage(False, 6, 384, 25, 2),
    Stage(False, 6, 640, 7, 1),
)
XL = (
    Stage(True, 1, 32, 4, 1),
    Stage(True, 4, 64, 8, 2),
    Stage(True, 4, 96, 8, 2),
    Stage(False, 4, 192, 16, 2),
    Stage(False, 6, 256, 24, 1),
    Stage(False, 6, 512, 32, 2),
    Stage(False, 6, 640, 8, 1),
)


class EfficientNetV2(Scaled):
    """EfficientNetV2.

    Attributes:
        stages: of the network: `B`, `S`, `M`, `L` or `XL`.
        stem_filters: channels of the first convolution.
        imagenet_statistics: whether RGB is normalised with ImageNet's mean and deviation; otherwise pixels / 128 - 1.
        include_preprocessing: whether pixels from 0 to 255 are taken; otherwise preprocessed values.
    """

    stages: tuple[Stage, ...] = option(B, rows(Stage))
    stem_filters: int = option(32, COUNT)
    imagenet_statistics: bool = option(True, FLAG)
    include_preprocessing: bool = option(True, FLAG)

    weightless = (*Scaled.weightless, "include_preprocessing")

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that the libraries have."""
        return self.names_of_stages([(stage.fused, stage.expansion) for stage in self.stages])

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, the stages, and a last 1x1 convolution."""
        if self.include_preprocessing:
            x = self.preprocessed(k, x)
        x = self.batch_norm(k, self.conv(k, x, self.width(self.stem_filters), 3, 2, "stem_conv"), "stem_bn")
        x = k.activation(x, "swish", name="stem_activation")
        block, blocks = 0, sum(stage.repeats for stage in self.stages)  # as Keras has it: before they are scaled
        for number, stage in enumerate(self.stages, 1):
            for i in range(self.repeats(stage.repeats)):
                letters = ("" if i < 26 else "a") + chr(ord("a") + i % 26)
                prefix, stride = f"block{number}{letters}_", stage.stride if i == 0 else 1
                inside = fused if stage.fused else separate
                y = inside(self, k, x, stage.expansion, self.width(stage.filters), stride, prefix)
                x = residual(k, y, x, self.drop_connect_rate * block / blocks, prefix) if x.shape == y.shape else y
                block += 1
        x = self.batch_norm(k, self.conv(k, x, self.width(1280), 1, 1, "top_conv"), "top_bn")
        return k.activation(x, "swish", name="top_activation")

    def preprocessed(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Bring pixels to values around zero."""
        if not self.imagenet_statistics or x.shape[-1] != 3:
            return k.rescaling(x, 1 / 128, -1)
        return k.normalization(k.rescaling(x, 1 / 255), (0.485, 0.456, 0.406), (0.229**2, 0.224**2, 0.225**2))

    def width(self, filters: int) -> int:
        """Scale a number of channels to a multiple of 8."""
        return max(8, int(filters * self.width_coefficient + 4) // 8 * 8)

    def conv(
        self, k: Layers, x: Float[Array, "n h w c"], filters: int, kernel: int, stride: int, name: str
    ) -> Float[Array, "n ho wo f"]:
        """Apply a convolution of 1x1 or 3x3, without biases."""
        x, padding = self.padded(k, x, stride, name)
        return k.conv2d(x, filters, kernel, stride, padding, use_bias=False, kernel_init=CONV_INIT, name=name)

    def padded(
        self, k: Layers, x: Float[Array, "n h w c"], stride: int, name: str
    ) -> tuple[Float[Array, "n hp wp c"], str]:
        """Pad for a 3x3 convolution that has a stride, where it is on both sides; also say what padding is left."""
        if self.symmetric_padding and stride > 1:
            return k.zero_pad(x, 1, name=f"{name}_pad"), "valid"
        return x, "same"

    def batch_norm(self, k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h w c"]:
        """Normalise by a BN with the family's momentum."""
        return k.batch_norm(x, momentum=0.9, epsilon=self.epsilon, name=name)


def fused(
    net: EfficientNetV2, k: Layers, x: Float[Array, "n h w c"], expansion: int, filters: int, stride: int, prefix: str
) -> Float[Array, "n ho wo f"]:
    """Expand by a 3x3 convolution and project by a 1x1; without expansion, apply a 3x3 alone."""
    if expansion == 1:
        x = net.batch_norm(k, net.conv(k, x, filters, 3, stride, f"{prefix}project_conv"), f"{prefix}project_bn")
        return k.activation(x, "swish", name=f"{prefix}project_activation")
    x = net.conv(k, x, x.shape[-1] * expansion, 3, stride, f"{prefix}expand_conv")
    x = k.activation(net.batch_norm(k, x, f"{prefix}expand_bn"), "swish", name=f"{prefix}expand_activation")
    return net.batch_norm(k, net.conv(k, x, filters, 1, 1, f"{prefix}project_conv"), f"{prefix}project_bn")


def separate(
    net: EfficientNetV2, k: Layers, x: Float[Array, "n h w c"], expansion: int, filters: int, stride: int, prefix: str
) -> Float[Array, "n ho wo f"]:
    """Expand by a 1x1 convolution, filter depthwise, squeeze and excite, project."""
    channels = x.shape[-1]
    if expansion > 1:
        x = net.conv(k, x, channels * expansion, 1, 1, f"{prefix}expand_conv")
        x = k.activation(net.batch_norm(k, x, f"{prefix}expand_bn"), "swish", name=f"{prefix}expand_activation")
    name = f"{prefix}dwconv2"
    x, padding = net.padded(k, x, stride, name)
    x = k.depthwise_conv2d(x, 3, stride, padding, use_bias=False, kernel_init=CONV_INIT, name=name)
    x = k.activation(net.batch_norm(k, x, f"{prefix}bn"), "swish", name=f"{prefix}activation")
    x = squeeze_and_excite(k, x, max(1, channels // 4), prefix)
    return net.batch_norm(k, net.conv(k, x, filters, 1, 1, f"{prefix}project_conv"), f"{prefix}project_bn")


# The small ones are cut as EfficientNet's; the authors show S the largest square, M and L the whole image, squeezed.
variant = partial(
    ModelSpec,
    family=EfficientNetV2,
    preprocessing="none",
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/2104.00298",
)

EfficientNetV2B0 = variant(
    name="EfficientNetV2B0",
    input_size=224,
    parameters=7_200_312,
    depth=151,
    size_mb=29,
    top1=0.787,
    top5=0.943,
    options={"width_coefficient": 1.0, "depth_coefficient": 1.0, "default_size": 224},
    weight_files=published.EFFICIENTNET_V2["EfficientNetV2B0"],
)

EfficientNetV2B1 = variant(
    name="EfficientNetV2B1",
    input_size=240,
    crop=0.882,
    parameters=8_212_124,
    depth=185,
    size_mb=34,
    top1=0.798,
    top5=0.95,
    options={"width_coefficient": 1.0, "depth_coefficient": 1.1, "default_size": 240},
    weight_files=published.EFFICIENTNET_V2["EfficientNetV2B1"],
)

EfficientNetV2B2 = variant(
    name="EfficientNetV2B2",
    input_size=260,
    crop=0.89,
    parameters=10_178_374,
    depth=193,
    size_mb=42,
    top1=0.805,
    top5=0.951,
    options={"width_coefficient": 1.1, "depth_coefficient": 1.2, "default_size": 260},
    weight_files=published.EFFICIENTNET_V2["EfficientNetV2B2"],
)

EfficientNetV2B3 = variant(
    name="EfficientNetV2B3",
    input_size=300,
    crop=0.904,
    parameters=14_467_622,
    depth=225,
    size_mb=59,
    top1=0.82,
    top5=0.958,
    options={"width_coefficient": 1.2, "depth_coefficient": 1.4, "default_size": 300},
    weight_files=published.EFFICIENTNET_V2["EfficientNetV2B3"],
)

EfficientNetV2S = variant(
    name="EfficientNetV2S",
    input_size=384,
    crop=1.0,
    parameters=21_612_360,
    depth=281,
    size_mb=88,
    top1=0.839,
    top5=0.967,
    options={"stages": S, "stem_filters": 24, "imagenet_statistics": False, "default_size": 384},
    weight_files=published.EFFICIENTNET_V2["EfficientNetV2S"],
)

EfficientNetV2M = variant(
    name="EfficientNetV2M",
    input_size=480,
    crop=None,
    parameters=54_431_388,
    depth=403,
    size_mb=220,
    top1=0.853,
    top5=0.974,
    options={"stages": M, "stem_filters": 24, "imagenet_statistics": False, "default_size": 480},
    weight_files=published.EFFICIENTNET_V2["EfficientNetV2M"],
)

EfficientNetV2L = variant(
    name="EfficientNetV2L",
    input_size=480,
    crop=None,
    parameters=119_027_848,
    depth=557,
    size_mb=479,
    top1=0.857,
    top5=0.975,
    options={"stages": L, "stem_filters": 32, "imagenet_statistics": False, "default_size": 480},
    weight_files=published.EFFICIENTNET_V2["EfficientNetV2L"],
)

#: Of a network whose weights have tags.
EfficientNetV2XL = variant(
    name="EfficientNetV2XL",
    input_size=512,
    crop=None,
    parameters=208_896_832,
    depth=717,
    size_mb=836,
    preprocessing="tf",
    options={
        "stages": XL,
        "stem_filters": 32,
        "imagenet_statistics": False,
        "default_size": 512,
        "include_preprocessing": False,
        "preprocessing": "tf",
    },
    **UNTAGGED,
)

#: The preprocessing is the network's own, but for pixels in -1..1, which S, M and L bring to pixels / 128 - 1.
tag = partial(Tag, preprocessing="none")
tf_tag = partial(Tag, preprocessing="tf", options={"include_preprocessing": False})

TAGS = (
    *EfficientNetV2B0.with_tags(
        "tf_efficientnetv2_b0",
        {},
        7_200_312,
        tag("in1k", top1=0.78386, top5=0.94034),
    ),
    *EfficientNetV2B1.with_tags(
        "tf_efficientnetv2_b1",
        {},
        8_212_124,
        tag("in1k", top1=0.79518, top5=0.9471, crop=0.882),
    ),
    *EfficientNetV2B2.with_tags(
        "tf_efficientnetv2_b2",
        {},
        10_178_374,
        tag("in1k", top1=0.80226, top5=0.9501, crop=0.89),
    ),
    *EfficientNetV2B3.with_tags(
        "tf_efficientnetv2_b3",
        {},
        14_467_622,
        tf_tag("in21k_ft_in1k", top1=0.82634, top5=0.96628, crop=None),
        tag("in1k", top1=0.8196, top5=0.9578, crop=0.904),
    ),
    *EfficientNetV2S.with_tags(
        "tf_efficientnetv2_s",
        {},
        21_612_360,
        tf_tag("in21k_ft_in1k", top1=0.84332, top5=0.97274, crop=1.0),
        tf_tag("in1k", top1=0.839, top5=0.96702, crop=1.0),
    ),
    *EfficientNetV2M.with_tags(
        "tf_efficientnetv2_m",
        {},
        54_431_388,
        tf_tag("in21k_ft_in1k", top1=0.86014, top5=0.97956, crop=None),
        tf_tag("in1k", top1=0.85208, top5=0.97358, crop=None),
    ),
    *EfficientNetV2L.with_tags(
        "tf_efficientnetv2_l",
        {},
        119_027_848,
        tf_tag("in21k_ft_in1k", top1=0.86802, top5=0.98124, crop=None),
        tf_tag("in1k", top1=0.8566, top5=0.97472, crop=None),
    ),
    *EfficientNetV2XL.with_tags(
        "tf_efficientnetv2_xl",
        {},
        208_896_832,
        tf_tag("in21k_ft_in1k", top1=0.86754, top5=0.98014, crop=None),
    ),
)
