"""ResNet: bottleneck blocks around an identity.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, as in
keras/applications/resnet.py: strides are in the first 1x1 convolution of a block, and convolutions have biases.
"""

from __future__ import annotations

import re
from functools import partial

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import counts, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published


class ResNet(Classifier):
    """ResNet.

    Attributes:
        blocks: number of blocks in each of the four stages.
    """

    blocks: tuple[int, ...] = option((3, 4, 6, 3), counts(4))

    top_pool = "avg_pool"
    named_pools = True

    @staticmethod
    def current_name(old: str) -> str:
        """Translate the names of Keras 1 and 2.1: "res3b_branch2a" is "conv3_block2_1_conv" today."""
        part = re.fullmatch(r"(res|bn)([2-5])([a-z])_branch(1|2[abc])", old)
        if part is None:
            return {"conv1": "conv1_conv", "bn_conv1": "conv1_bn", "fc1000": "predictions"}.get(old, old)
        kind, stage, block, branch = part.groups()
        number = ("1", "2a", "2b", "2c").index(branch)
        return f"conv{stage}_block{ord(block) - ord('a') + 1}_{number}_{'conv' if kind == 'res' else 'bn'}"

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 2048"]:
        """Apply a stem and four stages."""
        x = k.zero_pad(x, 3, name="conv1_pad")
        x = k.conv2d(x, 64, 7, 2, name="conv1_conv")
        x = k.batch_norm(x, epsilon=1.001e-5, name="conv1_bn")
        x = k.activation(x, "relu", name="conv1_relu")
        x = k.zero_pad(x, 1, name="pool1_pad")
        x = k.max_pool(x, 3, 2, name="pool1_pool")
        for stage, blocks in enumerate(self.blocks, 2):
            for i in range(1, blocks + 1):
                stride = 2 if i == 1 and stage > 2 else 1
                x = bottleneck(k, x, 32 << (stage - 1), stride, project=i == 1, name=f"conv{stage}_block{i}")
        return x


def bottleneck(
    k: Layers, x: Float[Array, "n h w c"], filters: int, stride: int, project: bool, name: str
) -> Float[Array, "n ho wo {4*filters}"]:
    """Apply 1x1, 3x3, 1x1, and add the input, which a stage's first block projects to its width."""
    bn = partial(k.batch_norm, epsilon=1.001e-5)
    shortcut = x
    if project:
        shortcut = bn(k.conv2d(x, 4 * filters, 1, stride, name=f"{name}_0_conv"), name=f"{name}_0_bn")
    x = bn(k.conv2d(x, filters, 1, stride, name=f"{name}_1_conv"), name=f"{name}_1_bn")
    x = k.activation(x, "relu", name=f"{name}_1_relu")
    x = bn(k.conv2d(x, filters, 3, padding="same", name=f"{name}_2_conv"), name=f"{name}_2_bn")
    x = k.activation(x, "relu", name=f"{name}_2_relu")
    x = bn(k.conv2d(x, 4 * filters, 1, name=f"{name}_3_conv"), name=f"{name}_3_bn")
    return k.activation(k.add([shortcut, x], name=f"{name}_add"), "relu", name=f"{name}_out")


variant = partial(
    ModelSpec,
    family=ResNet,
    input_size=224,
    preprocessing="caffe",
    licence="MIT (Kaiming He)",
    paper="https://arxiv.org/abs/1512.03385",
)

ResNet50 = variant(
    name="ResNet50",
    parameters=25_636_712,
    depth=107,
    size_mb=98,
    top1=0.749,
    top5=0.921,
    options={"blocks": (3, 4, 6, 3)},
    weight_files=published.RESNET["ResNet50"],
)

ResNet101 = variant(
    name="ResNet101",
    parameters=44_707_176,
    depth=209,
    size_mb=171,
    top1=0.764,
    top5=0.928,
    options={"blocks": (3, 4, 23, 3)},
    weight_files=published.RESNET["ResNet101"],
)

ResNet152 = variant(
    name="ResNet152",
    parameters=60_419_944,
    depth=311,
    size_mb=232,
    top1=0.766,
    top5=0.931,
    options={"blocks": (3, 8, 36, 3)},
    weight_files=published.RESNET["ResNet152"],
)
