"""EfficientNetV2: EfficientNet with plain convolutions in its first stages, where depthwise ones are slow.

Tan and Le, "EfficientNetV2: Smaller Models and Faster Training", https://arxiv.org/abs/2104.00298, as in
keras/applications/efficientnet_v2.py. The preprocessing is part of the network: it takes pixels from 0 to 255.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from jaxtyping import Array, Float

from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, option, rows
from fzoo.models.efficientnet import CONV_INIT, Scaled, residual, squeeze_and_excite
from fzoo.models.spec import ModelSpec
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


class EfficientNetV2(Scaled):
    """EfficientNetV2.

    Attributes:
        stages: of the network: `B`, `S`, `M` or `L`.
        stem_filters: channels of the first convolution.
        imagenet_statistics: whether RGB is normalised with ImageNet's mean and deviation; otherwise pixels / 128 - 1.
        include_preprocessing: whether pixels from 0 to 255 are taken; otherwise preprocessed values.
    """

    stages: tuple[Stage, ...] = option(B, rows(Stage))
    stem_filters: int = option(32, COUNT)
    imagenet_statistics: bool = option(True, FLAG)
    include_preprocessing: bool = option(True, FLAG)

    weightless = (*Scaled.weightless, "include_preprocessing")

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, the stages, and a last 1x1 convolution."""
        conv = partial(k.conv2d, padding="same", use_bias=False, kernel_init=CONV_INIT)

        if self.include_preprocessing:
            x = self.preprocessed(k, x)
        x = batch_norm(k, conv(x, self.width(self.stem_filters), 3, 2, name="stem_conv"), "stem_bn")
        x = k.activation(x, "swish", name="stem_activation")
        block, blocks = 0, sum(stage.repeats for stage in self.stages)  # as Keras has it: before they are scaled
        for number, stage in enumerate(self.stages, 1):
            for i in range(self.repeats(stage.repeats)):
                prefix, stride = f"block{number}{chr(ord('a') + i)}_", stage.stride if i == 0 else 1
                inside = fused if stage.fused else separate
                y = inside(k, x, stage.expansion, self.width(stage.filters), stride, prefix)
                x = residual(k, y, x, self.drop_connect_rate * block / blocks, prefix) if x.shape == y.shape else y
                block += 1
        x = batch_norm(k, conv(x, self.width(1280), 1, name="top_conv"), "top_bn")
        return k.activation(x, "swish", name="top_activation")

    def preprocessed(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Bring pixels to values around zero."""
        if not self.imagenet_statistics or x.shape[-1] != 3:
            return k.rescaling(x, 1 / 128, -1)
        return k.normalization(k.rescaling(x, 1 / 255), (0.485, 0.456, 0.406), (0.229**2, 0.224**2, 0.225**2))

    def width(self, filters: int) -> int:
        """Scale a number of channels to a multiple of 8."""
        return max(8, int(filters * self.width_coefficient + 4) // 8 * 8)


def batch_norm(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h w c"]:
    """Normalise by a BN with the family's momentum."""
    return k.batch_norm(x, momentum=0.9, name=name)


def fused(
    k: Layers, x: Float[Array, "n h w c"], expansion: int, filters: int, stride: int, prefix: str
) -> Float[Array, "n ho wo f"]:
    """Expand by a 3x3 convolution and project by a 1x1; without expansion, apply a 3x3 alone."""
    conv = partial(k.conv2d, padding="same", use_bias=False, kernel_init=CONV_INIT)
    if expansion == 1:
        x = batch_norm(k, conv(x, filters, 3, stride, name=f"{prefix}project_conv"), f"{prefix}project_bn")
        return k.activation(x, "swish", name=f"{prefix}project_activation")
    x = conv(x, x.shape[-1] * expansion, 3, stride, name=f"{prefix}expand_conv")
    x = k.activation(batch_norm(k, x, f"{prefix}expand_bn"), "swish", name=f"{prefix}expand_activation")
    return batch_norm(k, conv(x, filters, 1, name=f"{prefix}project_conv"), f"{prefix}project_bn")


def separate(
    k: Layers, x: Float[Array, "n h w c"], expansion: int, filters: int, stride: int, prefix: str
) -> Float[Array, "n ho wo f"]:
    """Expand by a 1x1 convolution, filter depthwise, squeeze and excite, project."""
    conv = partial(k.conv2d, kernel=1, padding="same", use_bias=False, kernel_init=CONV_INIT)
    channels = x.shape[-1]
    if expansion > 1:
        x = batch_norm(k, conv(x, channels * expansion, name=f"{prefix}expand_conv"), f"{prefix}expand_bn")
        x = k.activation(x, "swish", name=f"{prefix}expand_activation")
    x = k.depthwise_conv2d(x, 3, stride, "same", use_bias=False, kernel_init=CONV_INIT, name=f"{prefix}dwconv2")
    x = k.activation(batch_norm(k, x, f"{prefix}bn"), "swish", name=f"{prefix}activation")
    x = squeeze_and_excite(k, x, max(1, channels // 4), prefix)
    return batch_norm(k, conv(x, filters, name=f"{prefix}project_conv"), f"{prefix}project_bn")


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
