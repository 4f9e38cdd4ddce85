"""MobileNet: depthwise separable convolutions.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
https://arxiv.org/abs/1704.04861, as in keras/applications/mobilenet.py. Its options make the graph of timm's, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, POSITIVE, RATE, option
from fzoo.models.spec import ModelSpec, Tag
from fzoo.weights import published

#: (filters, stride) of the thirteen blocks, the paper's table 1.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNet(Classifier):
    """MobileNet.

    Attributes:
        alpha: width multiplier.
        depth_multiplier: outputs of each depthwise convolution for one input channel.
        dropout: rate before the classifier; in training it draws from the "dropout" stream of `rngs`.
        symmetric_padding: whether zeros are on both sides of what has a stride, as PyTorch pads, or by TF's "same".
        epsilon: of the batch norms.
    """

    alpha: float = option(1.0, POSITIVE)
    depth_multiplier: int = option(1, COUNT)
    dropout: float = option(1e-3, RATE)
    symmetric_padding: bool = option(False, FLAG)
    epsilon: float = option(1e-3, POSITIVE)

    weightless = ("dropout",)
    micro_batch = 2

    @nn.nowrap
    def check_options(self) -> None:
        """Check that the narrowest layer has a channel, too."""
        super().check_options()
        if int(32 * self.alpha) < 1:
            raise ValueError(f"alpha={self.alpha} given, 1/32 or more expected")

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return timm's names: of a stage's blocks, the first has the stride."""
        names = {
            "conv1": "conv_stem",
            "conv1_bn": "bn1",
            "conv_preds": "classifier as linear",
            "predictions": "classifier",
        }
        for i, place in enumerate(timm_places(), 1):
            names |= {f"conv_(dw|pw)_{i}": f"{place}.conv_{{1}}", f"conv_dw_{i}_bn": f"{place}.bn1"}
            names[f"conv_pw_{i}_bn"] = f"{place}.bn2"
        return {"timm": names}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem and thirteen blocks of a depthwise and a pointwise convolution."""
        bn = partial(k.batch_norm, epsilon=self.epsilon)
        padding = "same"
        if self.symmetric_padding:
            x, padding = k.zero_pad(x, 1, name="conv1_pad"), "valid"
        x = k.conv2d(x, int(32 * self.alpha), 3, 2, padding, use_bias=False, name="conv1")
        x = k.relu(bn(x, name="conv1_bn"), 6, name="conv1_relu")
        for i, (filters, stride) in enumerate(BLOCKS, 1):
            if stride == 2:
                x = k.zero_pad(x, 1 if self.symmetric_padding else ((0, 1), (0, 1)), name=f"conv_pad_{i}")
            x = k.depthwise_conv2d(
                x,
                3,
                stride,
                "same" if stride == 1 else "valid",
                depth_multiplier=self.depth_multiplier,
                use_bias=False,
                name=f"conv_dw_{i}",
            )
            x = k.relu(bn(x, name=f"conv_dw_{i}_bn"), 6, name=f"conv_dw_{i}_relu")
            x = k.conv2d(x, int(filters * self.alpha), 1, use_bias=False, name=f"conv_pw_{i}")
            x = k.relu(bn(x, name=f"conv_pw_{i}_bn"), 6, name=f"conv_pw_{i}_relu")
        return x

    def top(self, k: Layers, x: Float[Array, "n h w f"]) -> Float[Array, "n classes"]:
        """Classify, by a 1x1 convolution."""
        x = k.global_avg_pool(x, keepdims=True)
        x = k.dropout(x, self.dropout, name="dropout")
        x = k.conv2d(x, self.classes, 1, name="conv_preds")
        x = k.reshape(x, (self.classes,), name="reshape_2")
        return k.activation(x, self.probabilities, name="predictions")


def timm_places() -> Iterator[str]:
    """Give timm's name of each block: its stages begin where there is a stride."""
    stage = block = 0
    for i, (_, stride) in enumerate(BLOCKS):
        stage, block = (stage + 1, 0) if stride == 2 else (stage, block + (i > 0))
        yield f"blocks.{stage}.{block}"


MobileNetSpec = ModelSpec(
    name="MobileNet",
    family=MobileNet,
    input_size=224,
    preprocessing="tf",
    parameters=4_253_864,
    depth=55,
    size_mb=16,
    top1=0.704,
    top5=0.895,
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1704.04861",
    weight_files=published.MOBILENET["MobileNet"],
)

TAGS = MobileNetSpec.with_tags(
    "mobilenetv1_100",
    {"symmetric_padding": True, "epsilon": 1e-5},
    4_253_864,
    Tag("ra4_e3600_r224_in1k", top1=0.75388, top5=0.9231, preprocessing="tf"),
)
