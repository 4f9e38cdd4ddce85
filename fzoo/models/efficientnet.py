"""EfficientNet: inverted residuals, scaled in width, depth and size together.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", https://arxiv.org/abs/1905.11946,
as in keras/applications/efficientnet.py. The preprocessing is part of the network: it takes pixels from 0 to 255.
Timm has the authors' weights on Keras's graph ("tf_efficientnet"), and its own, as torchvision, on one that pads on
both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import make_divisible
from fzoo.layers.initializers import VarianceScaling
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, POSITIVE, RATE, option
from fzoo.models.spec import ModelSpec, Tag
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
        epsilon: of the batch normalisation.
        symmetric_padding: whether convolutions with a stride are padded on both sides alike, as PyTorch's are;
            otherwise as TensorFlow's.
    """

    width_coefficient: float = option(1.0, POSITIVE)
    depth_coefficient: float = option(1.0, POSITIVE)
    default_size: int = option(224, COUNT)
    dropout_rate: float = option(0.2, RATE)
    drop_connect_rate: float = option(0.2, RATE)
    epsilon: float = option(1e-3, POSITIVE)
    symmetric_padding: bool = option(False, FLAG)

    top_pool = "avg_pool"
    block_ends = r"block\w+_(project_bn|project_activation|add)"
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

    @nn.nowrap
    def names_of_stages(self, stages: Sequence[tuple[bool, int]]) -> dict[str, dict[str, str]]:
        """Return what PyTorch's libraries call the layers; torchvision, where the padding is as it has it.

        Args:
            stages: of each, whether it is fused (see `EfficientNetV2`), and its expansion.
        """
        timm = {"stem_conv": "conv_stem", "stem_bn": "bn1", "top_conv": "conv_head", "top_bn": "bn2"}
        timm["predictions"] = "classifier"
        end = f"features.{len(stages) + 1}"
        torchvision = {"stem_conv": "features.0.0", "stem_bn": "features.0.1", "top_conv": f"{end}.0"}
        torchvision |= {"top_bn": f"{end}.1", "predictions": "classifier.1"}
        for stage, (fused, expansion) in enumerate(stages, 1):
            block = f"block{stage}([a-z]+)_"
            expand = [("expand_conv", "expand_bn", "conv_exp" if fused else "conv_pw")] if expansion > 1 else []
            depthwise = [] if fused else [("dwconv2?", "bn", "conv_dw")]
            last = "conv_pwl" if expansion > 1 else "conv" if fused else "conv_pw"
            convolutions = [*expand, *depthwise, ("project_conv", "project_bn", last)]
            for i, (conv, bn, name) in enumerate(convolutions):
                place = i + 1 if conv == "project_conv" and not fused else i  # after squeeze-and-excitation
                timm |= {f"{block}{conv}": f"blocks.{stage - 1}.{{1-a}}.{name}"}
                timm |= {f"{block}{bn}": f"blocks.{stage - 1}.{{1-a}}.bn{i + 1}"}
                torchvision |= {f"{block}{conv}": f"features.{stage}.{{1-a}}.block.{place}.0"}
                torchvision |= {f"{block}{bn}": f"features.{stage}.{{1-a}}.block.{place}.1"}
            squeeze = f"features.{stage}.{{1-a}}.block.{len(convolutions) - 1}"
            for i, layer in enumerate(["reduce", "expand"], 1):
                timm |= {f"{block}se_{layer}": f"blocks.{stage - 1}.{{1-a}}.se.conv_{layer}"}
                torchvision |= {f"{block}se_{layer}": f"{squeeze}.fc{i}"}
        return {"timm": timm, "torchvision": torchvision} if self.symmetric_padding else {"timm": timm}


class EfficientNet(Scaled):
    """EfficientNet.

    Attributes:
        divide_by_std: divide by the square root of ImageNet's standard deviation, as Keras does for the weights that it
            publishes, which were trained so; `load` sets it for those files.
        imagenet_statistics: what comes into the network's normalisation with the arrays of a PyTorch network, which
            has none: ImageNet's mean and deviation; otherwise what brings pixels to -1..1.
    """

    divide_by_std: bool = option(False, FLAG)
    imagenet_statistics: bool = option(True, FLAG)

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that the libraries have, none of which divides by the deviation's root."""
        return {} if self.divide_by_std else self.names_of_stages([(False, stage[0]) for stage in STAGES])

    @property
    def torch_constants(self) -> dict[str, float | tuple[float, ...]]:
        """The mean and the variance of pixels over 255, which PyTorch's users take care of themselves."""
        mean, variance = 0.5, 0.5**2
        if self.imagenet_statistics:
            mean, variance = (0.485, 0.456, 0.406), (0.229**2, 0.224**2, 0.225**2)
        return {"normalization/mean": mean, "normalization/variance": variance, "normalization/count": 0}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, seven stages, and a last 1x1 convolution."""
        conv = partial(k.conv2d, use_bias=False, kernel_init=CONV_INIT)
        bn = partial(k.batch_norm, epsilon=self.epsilon)

        x = k.normalization(k.rescaling(x, 1 / 255))
        if self.divide_by_std:
            x = k.rescaling(x, [1 / math.sqrt(std) for std in (0.229, 0.224, 0.225)])
        x = conv(self.padded(k, x, 3, "stem_conv_pad"), self.width(32), 3, 2, name="stem_conv")
        x = k.activation(bn(x, name="stem_bn"), "swish", name="stem_activation")
        block, blocks = 0, sum(self.repeats(stage[2]) for stage in STAGES)
        for stage, (expansion, filters, repeats, stride, kernel) in enumerate(STAGES, 1):
            for i in range(self.repeats(repeats)):
                x = inverted_residual(
                    self,
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
        return k.activation(bn(x, name="top_bn"), "swish", name="top_activation")

    def width(self, filters: int) -> int:
        """Scale a number of channels."""
        return make_divisible(filters * self.width_coefficient)

    def padded(self, k: Layers, x: Float[Array, "n h w c"], kernel: int, name: str) -> Float[Array, "n hp wp c"]:
        """Pad with zeros before a convolution of stride 2."""
        return k.zero_pad(x, kernel // 2 if self.symmetric_padding else k.correct_pad(x, kernel), name=name)


def inverted_residual(
    net: EfficientNet,
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
    bn = partial(k.batch_norm, epsilon=net.epsilon)
    inputs, channels = x, x.shape[-1]
    if expansion > 1:
        x = bn(conv(x, channels * expansion, name=f"{prefix}expand_conv"), name=f"{prefix}expand_bn")
        x = k.activation(x, "swish", name=f"{prefix}expand_activation")
    padding = "same"
    if stride == 2:
        x, padding = net.padded(k, x, kernel, f"{prefix}dwconv_pad"), "valid"
    x = k.depthwise_conv2d(x, kernel, stride, padding, use_bias=False, kernel_init=CONV_INIT, name=f"{prefix}dwconv")
    x = k.activation(bn(x, name=f"{prefix}bn"), "swish", name=f"{prefix}activation")
    x = squeeze_and_excite(k, x, max(1, channels // 4), prefix)
    x = bn(conv(x, filters, name=f"{prefix}project_conv"), name=f"{prefix}project_bn")
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

#: The preprocessing is the network's own; of a few weights, it is to -1..1.
tag = partial(Tag, preprocessing="none")
tf_tag = partial(tag, options={"imagenet_statistics": False})

#: What makes timm's own graphs, which are torchvision's, too (of B5 to B7 but for the epsilon, which is 1e-3 there).
TORCH = {"symmetric_padding": True, "epsilon": 1e-5}

TAGS = (
    *EfficientNetB0.with_tags(
        "tf_efficientnet_b0",
        {},
        5_330_571,
        tag("ns_jft_in1k", top1=0.7868, top5=0.94372),
        tf_tag("ap_in1k", top1=0.771, top5=0.93258),
        tag("aa_in1k", top1=0.76882, top5=0.9327),
    ),
    *EfficientNetB0.with_tags(
        "efficientnet_b0",
        TORCH,
        5_330_571,
        tag("ra_in1k", top1=0.77698, top5=0.93538),
        tf_tag("ra4_e3600_r224_in1k", top1=0.78568, top5=0.9434, crop=0.9),
    ),
    *EfficientNetB1.with_tags(
        "tf_efficientnet_b1",
        {},
        7_856_239,
        tag("ns_jft_in1k", top1=0.81388, top5=0.95756, crop=0.882),
        tf_tag("ap_in1k", top1=0.79288, top5=0.94316, crop=0.882),
        tag("aa_in1k", top1=0.7884, top5=0.94202, crop=0.882),
    ),
    *EfficientNetB1.with_tags(
        "efficientnet_b1",
        TORCH,
        7_856_239,
        tag("ft_in1k", top1=0.78806, top5=0.94346, size=256, crop=1.0, options={"default_size": 256}),
        tf_tag("ra4_e3600_r240_in1k", top1=0.80404, top5=0.95152, crop=0.9),
    ),
    *EfficientNetB2.with_tags(
        "tf_efficientnet_b2",
        {},
        9_177_569,
        tag("ns_jft_in1k", top1=0.82412, top5=0.96238, crop=0.89),
        tf_tag("ap_in1k", top1=0.803, top5=0.95032, crop=0.89),
        tag("aa_in1k", top1=0.80074, top5=0.94906, crop=0.89),
    ),
    *EfficientNetB2.with_tags(
        "efficientnet_b2",
        TORCH,
        9_177_569,
        tag("ra_in1k", top1=0.80612, top5=0.9532, size=288, crop=1.0, options={"default_size": 288}),
    ),
    *EfficientNetB3.with_tags(
        "tf_efficientnet_b3",
        {},
        12_320_535,
        tag("ns_jft_in1k", top1=0.84054, top5=0.96926, crop=0.904),
        tf_tag("ap_in1k", top1=0.81842, top5=0.95614, crop=0.904),
        tag("aa_in1k", top1=0.81648, top5=0.95724, crop=0.904),
    ),
    *EfficientNetB3.with_tags(
        "efficientnet_b3",
        TORCH,
        12_320_535,
        tag("ra2_in1k", top1=0.82296, top5=0.96124, size=320, crop=1.0, options={"default_size": 320}),
    ),
    *EfficientNetB4.with_tags(
        "tf_efficientnet_b4",
        {},
        19_466_823,
        tag("ns_jft_in1k", top1=0.85156, top5=0.97482, crop=0.922),
        tf_tag("ap_in1k", top1=0.83246, top5=0.96392, crop=0.922),
        tag("aa_in1k", top1=0.8304, top5=0.96298, crop=0.922),
    ),
    *EfficientNetB4.with_tags(
        "efficientnet_b4",
        TORCH,
        19_466_823,
        tag("ra2_in1k", top1=0.83468, top5=0.96574, size=384, crop=1.0, options={"default_size": 384}),
    ),
    *EfficientNetB5.with_tags(
        "tf_efficientnet_b5",
        {},
        30_562_527,
        tag("ns_jft_in1k", top1=0.86096, top5=0.97744, crop=0.934),
        tf_tag("ap_in1k", top1=0.84258, top5=0.96984, crop=0.934),
        tag("aa_in1k", top1=0.83696, top5=0.96712, crop=0.934),
        tag("ra_in1k", top1=0.83834, top5=0.96764, crop=0.934),
    ),
    *EfficientNetB5.with_tags(
        "efficientnet_b5",
        TORCH,
        30_562_527,
        tag("sw_in12k_ft_in1k", top1=0.85894, top5=0.97742, size=448, crop=None, options={"default_size": 448}),
    ),
    *EfficientNetB6.with_tags(
        "tf_efficientnet_b6",
        {},
        43_265_143,
        tag("ns_jft_in1k", top1=0.86476, top5=0.97864, crop=0.942),
        tf_tag("ap_in1k", top1=0.84794, top5=0.97138, crop=0.942),
        tag("aa_in1k", top1=0.84124, top5=0.9689, crop=0.942),
    ),
    *EfficientNetB7.with_tags(
        "tf_efficientnet_b7",
        {},
        66_658_687,
        tag("ns_jft_in1k", top1=0.8685, top5=0.9808, crop=0.949),
        tf_tag("ap_in1k", top1=0.85132, top5=0.97256, crop=0.949),
        tag("aa_in1k", top1=0.84424, top5=0.96908, crop=0.949),
        tag("ra_in1k", top1=0.84926, top5=0.9722, crop=0.949),
    ),
)
