"""MobileNet: depthwise separable convolutions.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
https://arxiv.org/abs/1704.04861, as in keras/applications/mobilenet.py.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, POSITIVE, RATE, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published

#: (filters, stride) of the thirteen blocks, the paper's table 1.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNet(Classifier):
    """MobileNet.

    Attributes:
        alpha: width multiplier.
        depth_multiplier: outputs of each depthwise convolution for one input channel.
        dropout: rate before the classifier; in training it draws from the "dropout" stream of `rngs`.
    """

    alpha: float = option(1.0, POSITIVE)
    depth_multiplier: int = option(1, COUNT)
    dropout: float = option(1e-3, RATE)

    weightless = ("dropout",)
    micro_batch = 2

    @nn.nowrap
    def check_options(self) -> None:
        """Check that the narrowest layer has a channel, too."""
        super().check_options()
        if int(32 * self.alpha) < 1:
            raise ValueError(f"alpha={self.alpha} given, 1/32 or more expected")

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem and thirteen blocks of a depthwise and a pointwise convolution."""
        x = k.conv2d(x, int(32 * self.alpha), 3, 2, "same", use_bias=False, name="conv1")
        x = k.relu(k.batch_norm(x, name="conv1_bn"), 6, name="conv1_relu")
        for i, (filters, stride) in enumerate(BLOCKS, 1):
            if stride == 2:
                x = k.zero_pad(x, ((0, 1), (0, 1)), name=f"conv_pad_{i}")
            x = k.depthwise_conv2d(
                x,
                3,
                stride,
                "same" if stride == 1 else "valid",
                depth_multiplier=self.depth_multiplier,
                use_bias=False,
                name=f"conv_dw_{i}",
            )
            x = k.relu(k.batch_norm(x, name=f"conv_dw_{i}_bn"), 6, name=f"conv_dw_{i}_relu")
            x = k.conv2d(x, int(filters * self.alpha), 1, use_bias=False, name=f"conv_pw_{i}")
            x = k.relu(k.batch_norm(x, name=f"conv_pw_{i}_bn"), 6, name=f"conv_pw_{i}_relu")
        return x

    def top(self, k: Layers, x: Float[Array, "n h w f"]) -> Float[Array, "n classes"]:
        """Classify, by a 1x1 convolution."""
        x = k.global_avg_pool(x, keepdims=True)
        x = k.dropout(x, self.dropout, name="dropout")
        x = k.conv2d(x, self.classes, 1, name="conv_preds")
        x = k.reshape(x, (self.classes,), name="reshape_2")
        return k.activation(x, self.probabilities, name="predictions")


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
