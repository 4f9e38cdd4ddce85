"""DenseNet: every layer of a block sees all before it.

Huang et al., "Densely Connected Convolutional Networks", https://arxiv.org/abs/1608.06993, as in
keras/applications/densenet.py (DenseNet-BC, growth rate 32, compression 0.5).
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import counts, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published

GROWTH_RATE = 32


class DenseNet(Classifier):
    """DenseNet.

    Attributes:
        blocks: number of layers in each of the four dense blocks.
    """

    blocks: tuple[int, ...] = option((6, 12, 24, 16), counts(4))

    top_pool = "avg_pool"
    named_pools = True
    micro_batch = 2

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, and dense blocks with a transition that halves width and size between them."""
        bn = partial(k.batch_norm, epsilon=1.001e-5)

        x = k.conv2d(k.zero_pad(x, 3), 64, 7, 2, use_bias=False, name="conv1_conv")
        x = k.activation(bn(x, name="conv1_bn"), "relu", name="conv1_relu")
        x = k.max_pool(k.zero_pad(x, 1), 3, 2, name="pool1")
        for block, layers in enumerate(self.blocks, 2):
            room = x.shape[-1] + layers * GROWTH_RATE
            for i in range(1, layers + 1):
                y = dense_layer(k, x, f"conv{block}_block{i}")
                x = k.concat([x, y], room=room, name=f"conv{block}_block{i}_concat")
            if block - 1 < len(self.blocks):
                x = transition(k, x, f"pool{block}")
        return k.activation(bn(x, name="bn"), "relu", name="relu")


def dense_layer(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h w 32"]:
    """Compute a layer's new channels: a 1x1 and a 3x3 convolution, each after BN and ReLU."""
    bn = partial(k.batch_norm, epsilon=1.001e-5)
    y = k.activation(bn(x, name=f"{name}_0_bn"), "relu", name=f"{name}_0_relu")
    y = k.conv2d(y, 4 * GROWTH_RATE, 1, use_bias=False, name=f"{name}_1_conv")
    y = k.activation(bn(y, name=f"{name}_1_bn"), "relu", name=f"{name}_1_relu")
    return k.conv2d(y, GROWTH_RATE, 3, padding="same", use_bias=False, name=f"{name}_2_conv")


def transition(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h//2 w//2 c//2"]:
    """Halve the channels and the size."""
    x = k.activation(k.batch_norm(x, epsilon=1.001e-5, name=f"{name}_bn"), "relu", name=f"{name}_relu")
    x = k.conv2d(x, x.shape[-1] // 2, 1, use_bias=False, name=f"{name}_conv")
    return k.avg_pool(x, 2, name=f"{name}_pool")


variant = partial(
    ModelSpec,
    family=DenseNet,
    input_size=224,
    preprocessing="torch",
    licence="BSD 3-clause (Facebook)",
    paper="https://arxiv.org/abs/1608.06993",
)

DenseNet121 = variant(
    name="DenseNet121",
    parameters=8_062_504,
    depth=242,
    size_mb=33,
    top1=0.75,
    top5=0.923,
    options={"blocks": (6, 12, 24, 16)},
    weight_files=published.DENSENET["DenseNet121"],
)

DenseNet169 = variant(
    name="DenseNet169",
    parameters=14_307_880,
    depth=338,
    size_mb=57,
    top1=0.762,
    top5=0.932,
    options={"blocks": (6, 12, 32, 32)},
    weight_files=published.DENSENET["DenseNet169"],
)

DenseNet201 = variant(
    name="DenseNet201",
    parameters=20_242_984,
    depth=402,
    size_mb=80,
    top1=0.773,
    top5=0.936,
    options={"blocks": (6, 12, 48, 32)},
    weight_files=published.DENSENET["DenseNet201"],
)
