"""DenseNet: every layer of a block sees all before it.

Huang et al., "Densely Connected Convolutional Networks", https://arxiv.org/abs/1608.06993, as in
keras/applications/densenet.py (DenseNet-BC, growth rate 32, compression 0.5). Torchvision and timm have the same graph
with another epsilon.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, POSITIVE, counts, option
from fzoo.models.spec import UNTAGGED, ModelSpec, Tag
from fzoo.weights import published


class DenseNet(Classifier):
    """DenseNet.

    Attributes:
        blocks: number of layers in each of the four dense blocks.
        growth_rate: channels that each layer adds; the stem has twice as many, the bottlenecks four times.
        epsilon: of the batch normalisation; torchvision and timm have 1e-5.
    """

    blocks: tuple[int, ...] = option((6, 12, 24, 16), counts(4))
    growth_rate: int = option(32, COUNT)
    epsilon: float = option(1.001e-5, POSITIVE)

    top_pool = "avg_pool"
    block_ends = r"conv1_relu|conv\d+_block\d+_concat|last_map"
    named_pools = True
    micro_batch = 2
    torch_renamed = ((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),)  # torchvision's files of 2017

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that both libraries have."""
        names = {
            "conv1_conv": "features.conv0",
            "conv1_bn": "features.norm0",
            r"conv(\d)_block(\d+)_0_bn": "features.denseblock{1-1}.denselayer{2}.norm1",
            r"conv(\d)_block(\d+)_1_bn": "features.denseblock{1-1}.denselayer{2}.norm2",
            r"conv(\d)_block(\d+)_([12])_conv": "features.denseblock{1-1}.denselayer{2}.conv{3}",
            r"pool(\d)_bn": "features.transition{1-1}.norm",
            r"pool(\d)_conv": "features.transition{1-1}.conv",
            "bn": "features.norm5",
            "predictions": "classifier",
        }
        return {"timm": names, "torchvision": names}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem, and dense blocks with a transition that halves width and size between them."""
        bn = partial(k.batch_norm, epsilon=self.epsilon)

        x = k.conv2d(k.zero_pad(x, 3), 2 * self.growth_rate, 7, 2, use_bias=False, name="conv1_conv")
        x = k.activation(bn(x, name="conv1_bn"), "relu", name="conv1_relu")
        x = k.max_pool(k.zero_pad(x, 1), 3, 2, name="pool1")
        for block, layers in enumerate(self.blocks, 2):
            room = x.shape[-1] + layers * self.growth_rate
            for i in range(1, layers + 1):
                y = dense_layer(self, k, x, f"conv{block}_block{i}")
                x = k.concat([x, y], room=room, name=f"conv{block}_block{i}_concat")
            if block - 1 < len(self.blocks):
                x = transition(self, k, x, f"pool{block}")
        return k.activation(bn(x, name="bn"), "relu", name="relu")


def dense_layer(
    net: DenseNet, k: Layers, x: Float[Array, "n h w c"], name: str
) -> Float[Array, "n h w {net.growth_rate}"]:
    """Compute a layer's new channels: a 1x1 and a 3x3 convolution, each after BN and ReLU."""
    bn = partial(k.batch_norm, epsilon=net.epsilon)
    y = k.activation(bn(x, name=f"{name}_0_bn"), "relu", name=f"{name}_0_relu")
    y = k.conv2d(y, 4 * net.growth_rate, 1, use_bias=False, name=f"{name}_1_conv")
    y = k.activation(bn(y, name=f"{name}_1_bn"), "relu", name=f"{name}_1_relu")
    return k.conv2d(y, net.growth_rate, 3, padding="same", use_bias=False, name=f"{name}_2_conv")


def transition(net: DenseNet, k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n ho wo c//2"]:
    """Halve the channels and the size."""
    x = k.activation(k.batch_norm(x, epsilon=net.epsilon, name=f"{name}_bn"), "relu", name=f"{name}_relu")
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

#: What makes torchvision's and timm's graphs.
TORCH = {"epsilon": 1e-5}

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

#: Its weights all have tags.
DenseNet161 = variant(
    name="DenseNet161",
    parameters=28_900_936,
    depth=322,
    size_mb=116,
    options={"blocks": (6, 12, 36, 24), "growth_rate": 48, **TORCH, "preprocessing": "torch"},
    **UNTAGGED,
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

TAGS = (
    *DenseNet121.with_tags(
        "densenet121",
        TORCH,
        8_062_504,
        Tag("ra_in1k", top1=0.75574, top5=0.92648),
        Tag("tv_in1k", top1=0.7475, top5=0.92158),
    ),
    *DenseNet161.with_tags("densenet161", {}, 28_900_936, Tag("tv_in1k", top1=0.77384, top5=0.93656)),
    *DenseNet169.with_tags("densenet169", TORCH, 14_307_880, Tag("tv_in1k", top1=0.75922, top5=0.92976)),
    *DenseNet201.with_tags("densenet201", TORCH, 20_242_984, Tag("tv_in1k", top1=0.77284, top5=0.9348)),
)
