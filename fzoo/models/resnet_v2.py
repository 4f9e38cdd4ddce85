"""ResNetV2: bottleneck blocks with BN and ReLU before each convolution.

He et al., "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027, as in
keras/applications/resnet_v2.py: the 3x3 convolution of a stage's last block strides.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import counts, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published


class ResNetV2(Classifier):
    """ResNetV2.

    Attributes:
        blocks: number of blocks in each of the four stages.
    """

    blocks: tuple[int, ...] = option((3, 4, 6, 3), counts(4))

    top_pool = "avg_pool"
    named_pools = True

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 2048"]:
        """Apply a stem and four stages, and normalise the sum of the last one."""
        x = k.conv2d(k.zero_pad(x, 3, name="conv1_pad"), 64, 7, 2, name="conv1_conv")
        x = k.max_pool(k.zero_pad(x, 1, name="pool1_pad"), 3, 2, name="pool1_pool")
        for stage, blocks in enumerate(self.blocks, 2):
            for i in range(1, blocks + 1):
                stride = 2 if i == blocks and stage - 1 < len(self.blocks) else 1
                x = bottleneck(k, x, 32 << (stage - 1), stride, project=i == 1, name=f"conv{stage}_block{i}")
        return k.activation(k.batch_norm(x, epsilon=1.001e-5, name="post_bn"), "relu", name="post_relu")


def bottleneck(
    k: Layers, x: Float[Array, "n h w c"], filters: int, stride: int, project: bool, name: str
) -> Float[Array, "n ho wo {4*filters}"]:
    """Apply 1x1, 3x3, 1x1, and add the input: projected in a stage's first block, thinned out where it strides."""

    def normed(x: Array, part: str) -> Array:
        return k.activation(
            k.batch_norm(x, epsilon=1.001e-5, name=f"{name}_{part}_bn"), "relu", name=f"{name}_{part}_relu"
        )

    conv = partial(k.conv2d, features=filters, use_bias=False)
    shortcut, x = x, normed(x, "preact")
    if project:
        shortcut = k.conv2d(x, 4 * filters, 1, stride, name=f"{name}_0_conv")
    elif stride > 1:
        shortcut = k.max_pool(shortcut, 1, stride)
    x = normed(conv(x, kernel=1, name=f"{name}_1_conv"), "1")
    x = k.zero_pad(x, 1, name=f"{name}_2_pad")
    x = normed(conv(x, kernel=3, strides=stride, name=f"{name}_2_conv"), "2")
    x = k.conv2d(x, 4 * filters, 1, name=f"{name}_3_conv")
    return k.add([shortcut, x], name=f"{name}_out")


variant = partial(
    ModelSpec,
    family=ResNetV2,
    input_size=224,
    preprocessing="tf",
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1603.05027",
)

ResNet50V2 = variant(
    name="ResNet50V2",
    parameters=25_613_800,
    depth=103,
    size_mb=98,
    top1=0.76,
    top5=0.93,
    options={"blocks": (3, 4, 6, 3)},
    weight_files=published.RESNET_V2["ResNet50V2"],
)

ResNet101V2 = variant(
    name="ResNet101V2",
    parameters=44_675_560,
    depth=205,
    size_mb=171,
    top1=0.772,
    top5=0.938,
    options={"blocks": (3, 4, 23, 3)},
    weight_files=published.RESNET_V2["ResNet101V2"],
)

ResNet152V2 = variant(
    name="ResNet152V2",
    parameters=60_380_648,
    depth=307,
    size_mb=232,
    top1=0.78,
    top5=0.942,
    options={"blocks": (3, 8, 36, 3)},
    weight_files=published.RESNET_V2["ResNet152V2"],
)
