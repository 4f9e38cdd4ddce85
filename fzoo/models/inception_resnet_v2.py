"""InceptionResNetV2: Inception blocks around an identity.

Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
https://arxiv.org/abs/1602.07261, as in keras/applications/inception_resnet_v2.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import counts, option
from fzoo.models.inception_v3 import chain, conv_bn
from fzoo.models.spec import ModelSpec
from fzoo.weights import published

#: For each kind of block, the arguments of `conv_bn` along its branches.
BRANCHES = {
    "block35": (((32, 1),), ((32, 1), (32, 3)), ((32, 1), (48, 3), (64, 3))),
    "block17": (((192, 1),), ((128, 1), (160, (1, 7)), (192, (7, 1)))),
    "block8": (((192, 1),), ((192, 1), (224, (1, 3)), (256, (3, 1)))),
}


class InceptionResNetV2(Classifier):
    """InceptionResNetV2.

    Attributes:
        blocks: number of residual blocks of each of the three kinds.
    """

    blocks: tuple[int, ...] = option((10, 20, 10), counts(3))

    default_size = 299
    min_size = 75
    top_pool = "avg_pool"

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 1536"]:
        """Apply a stem, and residual blocks of three kinds with reductions between them."""
        *counts, last = self.blocks
        x = chain(k, x, (32, 3, 2, "valid"), (32, 3, 1, "valid"), (64, 3))
        x = chain(k, k.max_pool(x, 3, 2), (80, 1, 1, "valid"), (192, 3, 1, "valid"))
        x = k.max_pool(x, 3, 2)
        x = k.concat(
            [
                chain(k, x, (96, 1)),
                chain(k, x, (48, 1), (64, 5)),
                chain(k, x, (64, 1), (96, 3), (96, 3)),
                chain(k, k.avg_pool(x, 3, 1, "same"), (64, 1)),
            ],
            name="mixed_5b",
        )
        x = residuals(k, x, "block35", [0.17] * counts[0])
        x = k.concat(
            [
                chain(k, x, (384, 3, 2, "valid")),
                chain(k, x, (256, 1), (256, 3), (384, 3, 2, "valid")),
                k.max_pool(x, 3, 2),
            ],
            name="mixed_6a",
        )
        x = residuals(k, x, "block17", [0.1] * counts[1])
        x = k.concat(
            [
                chain(k, x, (256, 1), (384, 3, 2, "valid")),
                chain(k, x, (256, 1), (288, 3, 2, "valid")),
                chain(k, x, (256, 1), (288, 3), (320, 3, 2, "valid")),
                k.max_pool(x, 3, 2),
            ],
            name="mixed_7a",
        )
        x = residuals(k, x, "block8", [0.2] * (last - 1))
        x = residual(k, x, "block8", last, 1.0, activate=False)
        return conv_bn(k, x, 1536, 1, name="conv_7b")


def residuals(k: Layers, x: Float[Array, "n h w c"], kind: str, scales: Sequence[float]) -> Float[Array, "n h w c"]:
    """Apply residual blocks of one kind, numbered from 1."""
    for i, scale in enumerate(scales, 1):
        x = residual(k, x, kind, i, scale)
    return x


def residual(
    k: Layers, x: Float[Array, "n h w c"], kind: str, i: int, scale: float, activate: bool = True
) -> Float[Array, "n h w c"]:
    """Apply branches and a 1x1 convolution back to the input's width, and add it to the input, scaled."""
    y = k.concat([chain(k, x, *branch) for branch in BRANCHES[kind]], name=f"{kind}_{i}_mixed")
    y = k.conv2d(y, x.shape[-1], 1, padding="same", name=f"{kind}_{i}_conv")
    x = k.scaled_add(x, y, scale)
    return k.activation(x, "relu", name=f"{kind}_{i}_ac") if activate else x


InceptionResNetV2Spec = ModelSpec(
    name="InceptionResNetV2",
    family=InceptionResNetV2,
    input_size=299,
    preprocessing="tf",
    parameters=55_873_736,
    depth=449,
    size_mb=215,
    top1=0.803,
    top5=0.953,
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1602.07261",
    weight_files=published.INCEPTION_RESNET_V2["InceptionResNetV2"],
)
