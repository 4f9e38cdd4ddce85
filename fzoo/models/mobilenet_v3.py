"""MobileNetV3: inverted residuals found by search, with squeeze-and-excitation and hard swish.

Howard et al., "Searching for MobileNetV3", https://arxiv.org/abs/1905.02244, as in keras/applications/mobilenet_v3.py.
The preprocessing is part of the network: it takes pixels from 0 to 255. Its options make the graphs of timm's and
torchvision's, too, without it.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import make_divisible
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, POSITIVE, RATE, option, rows
from fzoo.models.spec import ModelSpec, Tag, torchvision_tag, torchvision_tag2
from fzoo.weights import published
from fzoo.weights.published import torchvision_file


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
        symmetric_padding: whether zeros are on both sides of what has a stride, as PyTorch pads, or by TF's "same".
        epsilon: of the batch norms.
    """

    blocks: tuple[Block, ...] = option(LARGE, rows(Block))
    last_filters: int = option(1280, COUNT)
    alpha: float = option(1.0, POSITIVE)
    minimalistic: bool = option(False, FLAG)
    dropout_rate: float = option(0.2, RATE)
    include_preprocessing: bool = option(True, FLAG)
    symmetric_padding: bool = option(False, FLAG)
    epsilon: float = option(1e-3, POSITIVE)

    named_pools = True
    block_ends = r"expanded_conv.*(project_bn|add)|last_map"
    weightless = ("dropout_rate", "include_preprocessing")

    @property
    def known_size(self) -> bool:
        """Keras builds this family for any size unless one is given, with the top, too."""
        return self.input_shape is not None and None not in self.input_shape

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that both libraries have; torchvision pads symmetrically alone."""
        if self.head is not None:  # theirs have a layer between the pooling and the classifier
            return {}
        timm = {"conv": "conv_stem", "conv_bn": "bn1", "conv_2": "conv_head", "logits": "classifier as linear"}
        torchvision = {
            "conv": "features.0.0",
            "conv_bn": "features.0.1",
            "conv_1": f"features.{len(self.blocks) + 1}.0",
            "conv_1_bn": f"features.{len(self.blocks) + 1}.1",
            "conv_2": "classifier.0 as linear",
            "logits": "classifier.3 as linear",
        }
        stages = [list(stage) for _, stage in itertools.groupby(self.blocks, lambda block: block.filters)]
        timm |= {"conv_1": f"blocks.{len(stages)}.0.conv", "conv_1_bn": f"blocks.{len(stages)}.0.bn1"}
        places = [f"blocks.{stage}.{i}" for stage, blocks in enumerate(stages) for i in range(len(blocks))]
        for number, (place, block) in enumerate(zip(places, self.blocks, strict=True)):
            prefix = f"expanded_conv_{number}_" if number else "expanded_conv_"
            convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
            if not number:
                convs = {"depthwise": "conv_dw", "project": "conv_pw"}
            for i, (part, conv) in enumerate(convs.items(), 1):
                timm |= {prefix + part: f"{place}.{conv}", f"{prefix}{part}_bn": f"{place}.bn{i}"}
            squeeze = f"{prefix}squeeze_excite_conv"
            timm |= {squeeze: f"{place}.se.conv_reduce", f"{squeeze}_1": f"{place}.se.conv_expand"}
            parts = list(convs)
            if block.squeeze:
                parts.insert(-1, "squeeze")
            for i, part in enumerate(parts):
                inside = f"features.{number + 1}.block.{i}"
                if part == "squeeze":
                    torchvision |= {squeeze: f"{inside}.fc1", f"{squeeze}_1": f"{inside}.fc2"}
                else:
                    torchvision |= {prefix + part: f"{inside}.0", f"{prefix}{part}_bn": f"{inside}.1"}
        both = self.symmetric_padding and not self.minimalistic
        return {"timm": timm, "torchvision": torchvision} if both else {"timm": timm}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, the blocks, and a last 1x1 convolution."""
        bn = partial(k.batch_norm, momentum=0.999, epsilon=self.epsilon)

        if self.include_preprocessing:
            x = k.rescaling(x, 1 / 127.5, -1)
        padding = "same"
        if self.symmetric_padding:
            x, padding = k.zero_pad(x, 1, name="conv_pad"), "valid"
        x = k.conv2d(x, 16, 3, 2, padding, use_bias=False, name="conv")
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
        bn = partial(k.batch_norm, momentum=0.999, epsilon=self.epsilon)
        inputs, channels, filters = x, x.shape[-1], make_divisible(block.filters * self.alpha)
        kernel = 3 if self.minimalistic else block.kernel
        if prefix != "expanded_conv_":
            x = k.conv2d(x, make_divisible(channels * block.expansion), 1, use_bias=False, name=f"{prefix}expand")
            x = self.activation(k, bn(x, name=f"{prefix}expand_bn"), block.hard_swish)
        if block.stride == 2:
            around = kernel // 2 if self.symmetric_padding else k.correct_pad(x, kernel)
            x = k.zero_pad(x, around, name=f"{prefix}depthwise_pad")
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

#: The graphs of TF's weights in timm, of torchvision's networks, and of timm's: images are preprocessed before them.
TF = {"include_preprocessing": False}
TORCHVISION = {**TF, "symmetric_padding": True}
TIMM = {**TORCHVISION, "epsilon": 1e-5}

TAGS = (
    *MobileNetV3Small.with_tags(
        "mobilenetv3_small_100",
        TIMM,
        2_554_968,
        Tag("lamb_in1k", top1=0.67636, top5=0.87638),
    ),
    *MobileNetV3Small.with_tags(
        "tf_mobilenetv3_small_100",
        TF,
        2_554_968,
        Tag("in1k", top1=0.67922, top5=0.87686, interpolation="bilinear", preprocessing="tf"),
    ),
    *MobileNetV3Small.with_tags(
        "mobilenetv3_small_100",
        TORCHVISION,
        2_554_968,
        torchvision_tag("tv_in1k", top1=0.67668, top5=0.87402, file=torchvision_file("mobilenet_v3_small-047dcff4")),
    ),
    *MobileNetV3Large.with_tags(
        "mobilenetv3_large_100",
        TIMM,
        5_507_432,
        Tag("ra_in1k", top1=0.75784, top5=0.92528),
        Tag("ra4_e3600_r224_in1k", top1=0.7631, top5=0.92842, crop=0.95, preprocessing="tf"),
        Tag("miil_in21k_ft_in1k", top1=0.7792, top5=0.92894, interpolation="bilinear", preprocessing="unit"),
    ),
    *MobileNetV3Large.with_tags(
        "tf_mobilenetv3_large_100",
        TF,
        5_507_432,
        Tag("in1k", top1=0.7551, top5=0.926, interpolation="bilinear", preprocessing="tf"),
    ),
    *MobileNetV3Large.with_tags(
        "mobilenetv3_large_100",
        TORCHVISION,
        5_507_432,
        torchvision_tag("tv_in1k", top1=0.74042, top5=0.9134, file=torchvision_file("mobilenet_v3_large-8738ca79")),
        torchvision_tag2(top1=0.75274, top5=0.92566, file=torchvision_file("mobilenet_v3_large-5c1a4163")),
    ),
)
