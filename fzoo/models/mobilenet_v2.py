"""MobileNetV2: inverted residuals with linear bottlenecks.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", https://arxiv.org/abs/1801.04381,
as in keras/applications/mobilenet_v2.py.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import make_divisible
from fzoo.layers.keras import Layers
from fzoo.layers.options import POSITIVE, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published

#: (expansion, filters, repeats, stride of the first), the paper's table 2.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(Classifier):
    """MobileNetV2.

    Attributes:
        alpha: width multiplier.
    """

    alpha: float = option(1.0, POSITIVE)

    micro_batch = 2

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, seventeen inverted residuals, and a last 1x1 convolution, which only grows with alpha."""
        bn = partial(k.batch_norm, momentum=0.999)

        x = k.conv2d(x, make_divisible(32 * self.alpha), 3, 2, "same", use_bias=False, name="Conv1")
        x = k.relu(bn(x, name="bn_Conv1"), 6, name="Conv1_relu")
        block = 0
        for expansion, filters, repeats, stride in STAGES:
            for i in range(repeats):
                prefix = f"block_{block}_" if block else "expanded_conv_"
                filters_out = make_divisible(int(filters * self.alpha))
                x = inverted_residual(k, x, expansion, filters_out, stride if i == 0 else 1, prefix)
                block += 1
        x = k.conv2d(x, make_divisible(1280 * max(1.0, self.alpha)), 1, use_bias=False, name="Conv_1")
        return k.relu(bn(x, name="Conv_1_bn"), 6, name="out_relu")


def inverted_residual(
    k: Layers, x: Float[Array, "n h w c"], expansion: int, filters: int, stride: int, prefix: str
) -> Float[Array, "n ho wo f"]:
    """Expand by a 1x1 convolution, filter depthwise, project to a narrow and linear output."""
    bn = partial(k.batch_norm, momentum=0.999)
    inputs, channels = x, x.shape[-1]
    if expansion > 1:
        x = k.conv2d(x, expansion * channels, 1, use_bias=False, name=f"{prefix}expand")
        x = k.relu(bn(x, name=f"{prefix}expand_BN"), 6, name=f"{prefix}expand_relu")
    if stride == 2:
        x = k.zero_pad(x, k.correct_pad(x, 3), name=f"{prefix}pad")
    padding = "same" if stride == 1 else "valid"
    x = k.depthwise_conv2d(x, 3, stride, padding, use_bias=False, name=f"{prefix}depthwise")
    x = k.relu(bn(x, name=f"{prefix}depthwise_BN"), 6, name=f"{prefix}depthwise_relu")
    x = k.conv2d(x, filters, 1, use_bias=False, name=f"{prefix}project")
    x = bn(x, name=f"{prefix}project_BN")
    return k.add([inputs, x], name=f"{prefix}add") if channels == filters and stride == 1 else x


MobileNetV2Spec = ModelSpec(
    name="MobileNetV2",
    family=MobileNetV2,
    input_size=224,
    preprocessing="tf",
    parameters=3_538_984,
    depth=105,
    size_mb=14,
    top1=0.713,
    top5=0.901,
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1801.04381",
    weight_files=published.MOBILENET_V2["MobileNetV2"],
)
