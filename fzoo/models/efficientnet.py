"""EfficientNet: inverted residuals, scaled in width, depth and size together.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", https://arxiv.org/abs/1905.11946,
as in keras/applications/efficientnet.py. The preprocessing is part of the network: it takes pixels from 0 to 255.
"""

from __future__ import annotations

import math
from functools import partial

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import make_divisible
from fzoo.layers.initializers import VarianceScaling
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, POSITIVE, RATE, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published

CONV_INIT = VarianceScaling(2.0, "fan_out", "truncated_normal")
DENSE_INIT = VarianceScaling(1 / 3, "fan_out", "uniform")

#: (expansion, filters, repeats, stride of the first, kernel) of B0, the paper's table 1.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class Scaled(Classifier):
    """What both versions share: the coefficients, and the top.

    Attributes:
        width_coefficient: on the number of channels.
        depth_coefficient: on the number of blocks.
        default_size: height and width when `input_shape` does not say.
        dropout_rate: before the classifier.
        drop_connect_rate: stochastic depth: how often the last block is dropped in training, those before it less.
    """

    width_coefficient: float = option(1.0, POSITIVE)
    depth_coefficient: float = option(1.0, POSITIVE)
    default_size: int = option(224, COUNT)
    dropout_rate: float = option(0.2, RATE)
    drop_connect_rate: float = option(0.2, RATE)

    top_pool = "avg_pool"
    micro_batch = 2
    named_pools = True
    weightless = ("default_size", "dropout_rate", "drop_connect_rate")

    def top(self, k: Layers, x: Float[Array, "n ho wo f"]) -> Float[Array, "n classes"]:
        """Classify."""
        x = k.global_avg_pool(x, name=self.top_pool)
        if self.dropout_rate:
            x = k.dropout(x, self.dropout_rate, name="top_dropout")
        return k.dense(x, self.classes, activation=self.probabilities, kernel_init=DENSE_INIT, name="predictions")

    def repeats(self, blocks: int) -> int:
        """Scale a number of blocks."""
        return math.ceil(self.depth_coefficient * blocks)


class EfficientNet(Scaled):
    """EfficientNet.

    Attributes:
        divide_by_std: divide by the square root of ImageNet's standard deviation, as Keras does for the weights that it
            publishes, which were trained so; `load` sets it for those files.
    """

    divide_by_std: bool = option(False, FLAG)

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, seven stages, and a last 1x1 convolution."""
        conv = partial(k.conv2d, use_bias=False, kernel_init=CONV_INIT)

        x = k.normalization(k.rescaling(x, 1 / 255))
        if self.divide_by_std:
            x = k.rescaling(x, [1 / math.sqrt(std) for std in (0.229, 0.224, 0.225)])
        x = conv(k.zero_pad(x, k.correct_pad(x, 3), name="stem_conv_pad"), self.width(32), 3, 2, name="stem_conv")
        x = k.activation(k.batch_norm(x, name="stem_bn"), "swish", name="stem_activation")
        block, blocks = 0, sum(self.repeats(stage[2]) for stage in STAGES)
        for stage, (expansion, filters, repeats, stride, kernel) in enumerate(STAGES, 1):
            for i in range(self.repeats(repeats)):
                x = inverted_residual(
                    k,
                    x,
                    expansion,
                    self.width(filters),
                    kernel,
                    stride if i == 0 else 1,
                    self.drop_connect_rate * block / blocks,
                    f"block{stage}{chr(ord('a') + i)}_",
                )
                block += 1
        x = conv(x, self.width(1280), 1, padding="same", name="top_conv")
        return k.activation(k.batch_norm(x, name="top_bn"), "swish", name="top_activation")

    def width(self, filters: int) -> int:
        """Scale a number of channels."""
        return make_divisible(filters * self.width_coefficient)


def inverted_residual(
    k: Layers,
    x: Float[Array, "n h w c"],
    expansion: int,
    filters: int,
    kernel: int,
    stride: int,
    drop_rate: float,
    prefix: str,
) -> Float[Array, "n ho wo f"]:
    """Expand by a 1x1 convolution, filter depthwise, squeeze and excite, project."""
    conv = partial(k.conv2d, kernel=1, padding="same", use_bias=False, kernel_init=CONV_INIT)
    inputs, channels = x, x.shape[-1]
    if expansion > 1:
        x = k.batch_norm(conv(x, channels * expansion, name=f"{prefix}expand_conv"), name=f"{prefix}expand_bn")
        x = k.activation(x, "swish", name=f"{prefix}expand_activation")
    padding = "same"
    if stride == 2:
        x, padding = k.zero_pad(x, k.correct_pad(x, kernel), name=f"{prefix}dwconv_pad"), "valid"
    x = k.depthwise_conv2d(x, kernel, stride, padding, use_bias=False, kernel_init=CONV_INIT, name=f"{prefix}dwconv")
    x = k.activation(k.batch_norm(x, name=f"{prefix}bn"), "swish", name=f"{prefix}activation")
    x = squeeze_and_excite(k, x, max(1, channels // 4), prefix)
    x = k.batch_norm(conv(x, filters, name=f"{prefix}project_conv"), name=f"{prefix}project_bn")
    return residual(k, x, inputs, drop_rate, prefix) if stride == 1 and channels == filters else x


def squeeze_and_excite(k: Layers, x: Float[Array, "n h w c"], squeezed: int, prefix: str) -> Float[Array, "n h w c"]:
    """Weigh each channel, from 0 to 1, by what all of the image holds."""
    conv = partial(k.conv2d, kernel=1, padding="same", kernel_init=CONV_INIT)
    y = k.reshape(k.global_avg_pool(x, name=f"{prefix}se_squeeze"), (1, 1, x.shape[-1]), name=f"{prefix}se_reshape")
    y = conv(y, squeezed, activation="swish", name=f"{prefix}se_reduce")
    y = conv(y, x.shape[-1], activation="sigmoid", name=f"{prefix}se_expand")
    return k.multiply([x, y], name=f"{prefix}se_excite")


def residual(
    k: Layers, x: Float[Array, "n h w c"], inputs: Float[Array, "n h w c"], drop_rate: float, prefix: str
) -> Float[Array, "n h w c"]:
    """Add a block to its input, the block being dropped for some images in training."""
    if drop_rate:
        x = k.dropout(x, drop_rate, images=True, name=f"{prefix}drop")
    return k.add([x, inputs], name=f"{prefix}add")


# The authors resize an image so that 16 pixels are cut off at each side: crop = size / (size + 32).
variant = partial(
    ModelSpec,
    family=EfficientNet,
    preprocessing="none",
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1905.11946",
)

EfficientNetB0 = variant(
    name="EfficientNetB0",
    input_size=224,
    parameters=5_330_571,
    depth=132,
    size_mb=29,
    top1=0.771,
    top5=0.933,
    options={"width_coefficient": 1.0, "depth_coefficient": 1.0, "default_size": 224, "dropout_rate": 0.2},
    weight_files=published.EFFICIENTNET["EfficientNetB0"],
)

EfficientNetB1 = variant(
    name="EfficientNetB1",
    input_size=240,
    crop=0.882,
    parameters=7_856_239,
    depth=186,
    size_mb=31,
    top1=0.791,
    top5=0.944,
    options={"width_coefficient": 1.0, "depth_coefficient": 1.1, "default_size": 240, "dropout_rate": 0.2},
    weight_files=published.EFFICIENTNET["EfficientNetB1"],
)

EfficientNetB2 = variant(
    name="EfficientNetB2",
    input_size=260,
    crop=0.89,
    parameters=9_177_569,
    depth=186,
    size_mb=36,
    top1=0.801,
    top5=0.949,
    options={"width_coefficient": 1.1, "depth_coefficient": 1.2, "default_size": 260, "dropout_rate": 0.3},
    weight_files=published.EFFICIENTNET["EfficientNetB2"],
)

EfficientNetB3 = variant(
    name="EfficientNetB3",
    input_size=300,
    crop=0.904,
    parameters=12_320_535,
    depth=210,
    size_mb=48,
    top1=0.816,
    top5=0.957,
    options={"width_coefficient": 1.2, "depth_coefficient": 1.4, "default_size": 300, "dropout_rate": 0.3},
    weight_files=published.EFFICIENTNET["EfficientNetB3"],
)

EfficientNetB4 = variant(
    name="EfficientNetB4",
    input_size=380,
    crop=0.922,
    parameters=19_466_823,
    depth=258,
    size_mb=75,
    top1=0.829,
    top5=0.964,
    options={"width_coefficient": 1.4, "depth_coefficient": 1.8, "default_size": 380, "dropout_rate": 0.4},
    weight_files=published.EFFICIENTNET["EfficientNetB4"],
)

EfficientNetB5 = variant(
    name="EfficientNetB5",
    input_size=456,
    crop=0.934,
    parameters=30_562_527,
    depth=312,
    size_mb=118,
    top1=0.836,
    top5=0.967,
    options={"width_coefficient": 1.6, "depth_coefficient": 2.2, "default_size": 456, "dropout_rate": 0.4},
    weight_files=published.EFFICIENTNET["EfficientNetB5"],
)

EfficientNetB6 = variant(
    name="EfficientNetB6",
    input_size=528,
    crop=0.943,
    parameters=43_265_143,
    depth=360,
    size_mb=166,
    top1=0.84,
    top5=0.968,
    options={"width_coefficient": 1.8, "depth_coefficient": 2.6, "default_size": 528, "dropout_rate": 0.5},
    weight_files=published.EFFICIENTNET["EfficientNetB6"],
)

EfficientNetB7 = variant(
    name="EfficientNetB7",
    input_size=600,
    crop=0.949,
    parameters=66_658_687,
    depth=438,
    size_mb=256,
    top1=0.843,
    top5=0.97,
    options={"width_coefficient": 2.0, "depth_coefficient": 3.1, "default_size": 600, "dropout_rate": 0.5},
    weight_files=published.EFFICIENTNET["EfficientNetB7"],
)
