"""MobileNetV3: inverted residuals found by search, with squeeze-and-excitation and hard swish.

Howard et al., "Searching for MobileNetV3", https://arxiv.org/abs/1905.02244, as in keras/applications/mobilenet_v3.py.
The preprocessing is part of the network: it takes pixels from 0 to 255.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import make_divisible
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, POSITIVE, RATE, option, rows
from fzoo.models.spec import ModelSpec
from fzoo.weights import published


class Block(NamedTuple):
    """A row of the paper's tables 1 and 2.

    Attributes:
        expansion: channels inside, over those of the input.
        filters: channels of the output.
        kernel: of the depthwise convolution.
        stride: of it, too.
        squeeze: whether there is squeeze-and-excitation.
        hard_swish: the activation; ReLU otherwise.
    """

    expansion: float
    filters: int
    kernel: int
    stride: int
    squeeze: bool
    hard_swish: bool


LARGE = (
    Block(1, 16, 3, 1, False, False),
    Block(4, 24, 3, 2, False, False),
    Block(3, 24, 3, 1, False, False),
    Block(3, 40, 5, 2, True, False),
    Block(3, 40, 5, 1, True, False),
    Block(3, 40, 5, 1, True, False),
    Block(6, 80, 3, 2, False, True),
    Block(2.5, 80, 3, 1, False, True),
    Block(2.3, 80, 3, 1, False, True),
    Block(2.3, 80, 3, 1, False, True),
    Block(6, 112, 3, 1, True, True),
    Block(6, 112, 3, 1, True, True),
    Block(6, 160, 5, 2, True, True),
    Block(6, 160, 5, 1, True, True),
    Block(6, 160, 5, 1, True, True),
)
SMALL = (
    Block(1, 16, 3, 2, True, False),
    Block(72 / 16, 24, 3, 2, False, False),
    Block(88 / 24, 24, 3, 1, False, False),
    Block(4, 40, 5, 2, True, True),
    Block(6, 40, 5, 1, True, True),
    Block(6, 40, 5, 1, True, True),
    Block(3, 48, 5, 1, True, True),
    Block(3, 48, 5, 1, True, True),
    Block(6, 96, 5, 2, True, True),
    Block(6, 96, 5, 1, True, True),
    Block(6, 96, 5, 1, True, True),
)


class MobileNetV3(Classifier):
    """MobileNetV3.

    Attributes:
        blocks: of the network, `LARGE` or `SMALL`.
        last_filters: width of the layer before the classifier.
        alpha: width multiplier.
        minimalistic: without squeeze-and-excitation, hard swish and 5x5 kernels.
        dropout_rate: before the classifier.
        include_preprocessing: whether pixels from 0 to 255 are taken; otherwise values from -1 to 1.
    """

    blocks: tuple[Block, ...] = option(LARGE, rows(Block))
    last_filters: int = option(1280, COUNT)
    alpha: float = option(1.0, POSITIVE)
    minimalistic: bool = option(False, FLAG)
    dropout_rate: float = option(0.2, RATE)
    include_preprocessing: bool = option(True, FLAG)

    named_pools = True
    weightless = ("dropout_rate", "include_preprocessing")

    @property
    def known_size(self) -> bool:
        """Keras builds this family for any size unless one is given, with the top, too."""
        return self.input_shape is not None and None not in self.input_shape

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, the blocks, and a last 1x1 convolution."""
        bn = partial(k.batch_norm, momentum=0.999)

        if self.include_preprocessing:
            x = k.rescaling(x, 1 / 127.5, -1)
        x = k.conv2d(x, 16, 3, 2, "same", use_bias=False, name="conv")
        x = self.activation(k, bn(x, name="conv_bn"))
        for i, block in enumerate(self.blocks):
            x = self.inverted_residual(k, x, block, f"expanded_conv_{i}_" if i else "expanded_conv_")
        x = k.conv2d(x, make_divisible(x.shape[-1] * 6), 1, padding="same", use_bias=False, name="conv_1")
        return self.activation(k, bn(x, name="conv_1_bn"))

    def top(self, k: Layers, x: Float[Array, "n h w f"]) -> Float[Array, "n classes"]:
        """Apply a hidden layer and classify, by 1x1 convolutions."""
        x = k.global_avg_pool(x, keepdims=True)
        x = self.activation(k, k.conv2d(x, make_divisible(self.last_filters * max(1.0, self.alpha)), 1, name="conv_2"))
        if self.dropout_rate:
            x = k.dropout(x, self.dropout_rate)
        x = k.flatten(k.conv2d(x, self.classes, 1, name="logits"))
        return k.activation(x, self.probabilities, name="predictions")

    def activation(self, k: Layers, x: Array, hard_swish: bool = True) -> Array:
        """Apply hard swish, or ReLU."""
        return k.activation(x, "hard_swish") if hard_swish and not self.minimalistic else k.relu(x)

    def inverted_residual(
        self, k: Layers, x: Float[Array, "n h w c"], block: Block, prefix: str
    ) -> Float[Array, "n ho wo f"]:
        """Expand by a 1x1 convolution (the first block does not), filter depthwise, squeeze, project."""
        bn = partial(k.batch_norm, momentum=0.999)
        inputs, channels, filters = x, x.shape[-1], make_divisible(block.filters * self.alpha)
        kernel = 3 if self.minimalistic else block.kernel
        if prefix != "expanded_conv_":
            x = k.conv2d(x, make_divisible(channels * block.expansion), 1, use_bias=False, name=f"{prefix}expand")
            x = self.activation(k, bn(x, name=f"{prefix}expand_bn"), block.hard_swish)
        if block.stride == 2:
            x = k.zero_pad(x, k.correct_pad(x, kernel), name=f"{prefix}depthwise_pad")
        padding = "same" if block.stride == 1 else "valid"
        x = k.depthwise_conv2d(x, kernel, block.stride, padding, use_bias=False, name=f"{prefix}depthwise")
        x = self.activation(k, bn(x, name=f"{prefix}depthwise_bn"), block.hard_swish)
        if block.squeeze and not self.minimalistic:
            x = squeeze_and_excite(k, x, f"{prefix}squeeze_excite_")
        x = bn(k.conv2d(x, filters, 1, use_bias=False, name=f"{prefix}project"), name=f"{prefix}project_bn")
        return k.add([inputs, x], name=f"{prefix}add") if block.stride == 1 and channels == filters else x


def squeeze_and_excite(k: Layers, x: Float[Array, "n h w c"], prefix: str) -> Float[Array, "n h w c"]:
    """Weigh each channel by what all of the image holds: a hard sigmoid, in steps as Keras's file has it."""
    y = k.global_avg_pool(x, keepdims=True, name=f"{prefix}avg_pool")
    y = k.relu(k.conv2d(y, make_divisible(x.shape[-1] * 0.25), 1, name=f"{prefix}conv"), name=f"{prefix}relu")
    y = k.conv2d(y, x.shape[-1], 1, name=f"{prefix}conv_1")
    y = k.relu(k.operation(lambda y: y + 3, y), 6)
    return k.multiply([x, k.operation(lambda y: y * (1 / 6), y)], name=f"{prefix}mul")


variant = partial(
    ModelSpec,
    family=MobileNetV3,
    input_size=224,
    preprocessing="none",
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1905.02244",
)

MobileNetV3Small = variant(
    name="MobileNetV3Small",
    parameters=2_554_968,
    depth=88,
    size_mb=10,
    top1=0.681,
    top5=None,
    options={"blocks": SMALL, "last_filters": 1024},
    weight_files=published.MOBILENET_V3["MobileNetV3Small"],
)

MobileNetV3Large = variant(
    name="MobileNetV3Large",
    parameters=5_507_432,
    depth=110,
    size_mb=22,
    top1=0.756,
    top5=None,
    options={"blocks": LARGE, "last_filters": 1280},
    weight_files=published.MOBILENET_V3["MobileNetV3Large"],
)
