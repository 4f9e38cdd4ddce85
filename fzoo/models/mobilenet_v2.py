"""MobileNetV2: inverted residuals with linear bottlenecks.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", https://arxiv.org/abs/1801.04381,
as in keras/applications/mobilenet_v2.py. Its options make the graph of timm's and torchvision's, too.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import make_divisible
from fzoo.layers.keras import Layers
from fzoo.layers.options import FLAG, POSITIVE, option
from fzoo.models.spec import ModelSpec, Tag, torchvision_tag, torchvision_tag2
from fzoo.weights import published
from fzoo.weights.published import torchvision_file

#: (expansion, filters, repeats, stride of the first), the paper's table 2.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(Classifier):
    """MobileNetV2.

    Attributes:
        alpha: width multiplier.
        symmetric_padding: whether zeros are on both sides of what has a stride, as PyTorch pads, or by TF's "same".
        epsilon: of the batch norms.
    """

    alpha: float = option(1.0, POSITIVE)
    symmetric_padding: bool = option(False, FLAG)
    epsilon: float = option(1e-3, POSITIVE)

    micro_batch = 2
    block_ends = r".*_(project_BN|add)"

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that both libraries have; torchvision pads symmetrically alone."""
        timm = {
            "Conv1": "conv_stem",
            "bn_Conv1": "bn1",
            "expanded_conv_depthwise": "blocks.0.0.conv_dw",
            "expanded_conv_depthwise_BN": "blocks.0.0.bn1",
            "expanded_conv_project": "blocks.0.0.conv_pw",
            "expanded_conv_project_BN": "blocks.0.0.bn2",
            "Conv_1": "conv_head",
            "Conv_1_bn": "bn2",
            "predictions": "classifier",
        }
        places = [(stage, i) for stage, (_, _, repeats, _) in enumerate(STAGES) for i in range(repeats)]
        for block, (stage, i) in enumerate(places[1:], 1):
            parts = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
            for part, (conv, bn) in parts.items():
                timm[f"block_{block}_{part}"] = f"blocks.{stage}.{i}.{conv}"
                timm[f"block_{block}_{part}_BN"] = f"blocks.{stage}.{i}.{bn}"
        torchvision = {
            "Conv1": "features.0.0",
            "bn_Conv1": "features.0.1",
            "expanded_conv_depthwise": "features.1.conv.0.0",
            "expanded_conv_depthwise_BN": "features.1.conv.0.1",
            "expanded_conv_project": "features.1.conv.1",
            "expanded_conv_project_BN": "features.1.conv.2",
            r"block_(\d+)_expand": "features.{1+1}.conv.0.0",
            r"block_(\d+)_expand_BN": "features.{1+1}.conv.0.1",
            r"block_(\d+)_depthwise": "features.{1+1}.conv.1.0",
            r"block_(\d+)_depthwise_BN": "features.{1+1}.conv.1.1",
            r"block_(\d+)_project": "features.{1+1}.conv.2",
            r"block_(\d+)_project_BN": "features.{1+1}.conv.3",
            "Conv_1": "features.18.0",
            "Conv_1_bn": "features.18.1",
            "predictions": "classifier.1",
        }
        return {"timm": timm, "torchvision": torchvision} if self.symmetric_padding else {"timm": timm}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, seventeen inverted residuals, and a last 1x1 convolution, which only grows with alpha."""
        bn = partial(k.batch_norm, momentum=0.999, epsilon=self.epsilon)

        padding = "same"
        if self.symmetric_padding:
            x, padding = k.zero_pad(x, 1, name="Conv1_pad"), "valid"
        x = k.conv2d(x, make_divisible(32 * self.alpha), 3, 2, padding, use_bias=False, name="Conv1")
        x = k.relu(bn(x, name="bn_Conv1"), 6, name="Conv1_relu")
        block = 0
        for expansion, filters, repeats, stride in STAGES:
            for i in range(repeats):
                prefix = f"block_{block}_" if block else "expanded_conv_"
                filters_out = make_divisible(int(filters * self.alpha))
                x = inverted_residual(self, k, x, expansion, filters_out, stride if i == 0 else 1, prefix)
                block += 1
        x = k.conv2d(x, make_divisible(1280 * max(1.0, self.alpha)), 1, use_bias=False, name="Conv_1")
        return k.relu(bn(x, name="Conv_1_bn"), 6, name="out_relu")


def inverted_residual(
    net: MobileNetV2, k: Layers, x: Float[Array, "n h w c"], expansion: int, filters: int, stride: int, prefix: str
) -> Float[Array, "n ho wo f"]:
    """Expand by a 1x1 convolution, filter depthwise, project to a narrow and linear output."""
    bn = partial(k.batch_norm, momentum=0.999, epsilon=net.epsilon)
    inputs, channels = x, x.shape[-1]
    if expansion > 1:
        x = k.conv2d(x, expansion * channels, 1, use_bias=False, name=f"{prefix}expand")
        x = k.relu(bn(x, name=f"{prefix}expand_BN"), 6, name=f"{prefix}expand_relu")
    if stride == 2:
        x = k.zero_pad(x, 1 if net.symmetric_padding else k.correct_pad(x, 3), name=f"{prefix}pad")
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

TAGS = MobileNetV2Spec.with_tags(
    "mobilenetv2_100",
    {"symmetric_padding": True, "epsilon": 1e-5},
    3_538_984,
    Tag("ra_in1k", top1=0.7291, top5=0.91),
    torchvision_tag("tv_in1k", top1=0.71878, top5=0.90286, file=torchvision_file("mobilenet_v2-b0353104")),
    torchvision_tag2(top1=0.72154, top5=0.90822, file=torchvision_file("mobilenet_v2-7ebf99e0")),
)
