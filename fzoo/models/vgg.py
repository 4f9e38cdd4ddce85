"""VGG: stacks of 3x3 convolutions, a max-pool after each.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
https://arxiv.org/abs/1409.1556, as in keras/applications/vgg16.py and vgg19.py. Torchvision and timm have the same
graph, and one with batch normalisation.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import FLAG, counts, option
from fzoo.models.spec import UNTAGGED, ModelSpec, torchvision_tag
from fzoo.weights import published

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Classifier):
    """VGG.

    Attributes:
        convs: number of convolutions in each of the five blocks.
        batch_norm: whether each convolution has a BN after it, before its ReLU, as torchvision's networks "vgg16_bn".
    """

    convs: tuple[int, ...] = option((2, 2, 3, 3, 3), counts(5))
    batch_norm: bool = option(False, FLAG)

    fixed_size = True

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names: both libraries number what the blocks are made of, ReLUs and pools included."""
        blocks: dict[str, str] = {}
        place = 0
        for block, convs in enumerate(self.convs, 1):
            for i in range(1, convs + 1):
                blocks[f"block{block}_conv{i}"] = f"features.{place}"
                blocks[f"block{block}_conv{i}_bn"] = f"features.{place + 1}"
                place += 3 if self.batch_norm else 2
            place += 1
        return {
            "timm": {**blocks, "fc([12])": "pre_logits.fc{1} as conv", "predictions": "head.fc"},
            "torchvision": {
                **blocks,
                "fc1": "classifier.0",
                "fc2": "classifier.3",
                "predictions": "classifier.6",
            },
        }

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 512"]:
        """Apply five blocks."""
        for block, (convs, width) in enumerate(zip(self.convs, WIDTHS, strict=True), 1):
            for i in range(1, convs + 1):
                x = conv3x3(self, k, x, width, f"block{block}_conv{i}")
            x = k.max_pool(x, 2, name=f"block{block}_pool")
        return x

    def top(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Apply two hidden layers to the flattened feature map, and classify."""
        x = k.flatten(x, name="flatten")
        x = k.dense(x, 4096, activation="relu", name="fc1")
        x = k.dense(x, 4096, activation="relu", name="fc2")
        return k.dense(x, self.classes, activation=self.probabilities, name="predictions")


def conv3x3(
    net: VGG, k: Layers, x: Float[Array, "n h w c"], filters: int, name: str
) -> Float[Array, "n h w {filters}"]:
    """Apply a 3x3 convolution and a ReLU, with a BN between them where the network has it."""
    if not net.batch_norm:
        return k.conv2d(x, filters, 3, padding="same", activation="relu", name=name)
    x = k.conv2d(x, filters, 3, padding="same", name=name)
    return k.activation(k.batch_norm(x, epsilon=1e-5, name=f"{name}_bn"), "relu", name=f"{name}_relu")


variant = partial(
    ModelSpec,
    family=VGG,
    input_size=224,
    preprocessing="caffe",
    licence="CC BY 4.0 (Visual Geometry Group, Oxford)",
    paper="https://arxiv.org/abs/1409.1556",
)

#: Of networks whose weights all have tags.
untagged = partial(variant, preprocessing="torch", **UNTAGGED)

VGG11 = untagged(
    name="VGG11",
    parameters=132_863_336,
    depth=11,
    size_mb=531,
    options={"convs": (1, 1, 2, 2, 2), "preprocessing": "torch"},
)

VGG11_BN = untagged(
    name="VGG11_BN",
    parameters=132_874_344,
    depth=19,
    size_mb=531,
    options={"convs": (1, 1, 2, 2, 2), "batch_norm": True, "preprocessing": "torch"},
)

VGG13 = untagged(
    name="VGG13",
    parameters=133_047_848,
    depth=13,
    size_mb=532,
    options={"convs": (2, 2, 2, 2, 2), "preprocessing": "torch"},
)

VGG13_BN = untagged(
    name="VGG13_BN",
    parameters=133_059_624,
    depth=23,
    size_mb=532,
    options={"convs": (2, 2, 2, 2, 2), "batch_norm": True, "preprocessing": "torch"},
)

VGG16 = variant(
    name="VGG16",
    parameters=138_357_544,
    depth=16,
    size_mb=528,
    top1=0.713,
    top5=0.901,
    options={"convs": (2, 2, 3, 3, 3)},
    weight_files=published.VGG["VGG16"],
)

VGG16_BN = untagged(
    name="VGG16_BN",
    parameters=138_374_440,
    depth=29,
    size_mb=553,
    options={"convs": (2, 2, 3, 3, 3), "batch_norm": True, "preprocessing": "torch"},
)

VGG19 = variant(
    name="VGG19",
    parameters=143_667_240,
    depth=19,
    size_mb=549,
    top1=0.713,
    top5=0.9,
    options={"convs": (2, 2, 4, 4, 4)},
    weight_files=published.VGG["VGG19"],
)

VGG19_BN = untagged(
    name="VGG19_BN",
    parameters=143_689_256,
    depth=35,
    size_mb=575,
    options={"convs": (2, 2, 4, 4, 4), "batch_norm": True, "preprocessing": "torch"},
)

TAGS = (
    *VGG11.with_tags("vgg11", {}, 132_863_336, torchvision_tag("tv_in1k", top1=0.6905, top5=0.8863)),
    *VGG11_BN.with_tags("vgg11_bn", {}, 132_874_344, torchvision_tag("tv_in1k", top1=0.70374, top5=0.89802)),
    *VGG13.with_tags("vgg13", {}, 133_047_848, torchvision_tag("tv_in1k", top1=0.6995, top5=0.89262)),
    *VGG13_BN.with_tags("vgg13_bn", {}, 133_059_624, torchvision_tag("tv_in1k", top1=0.7156, top5=0.90372)),
    *VGG16.with_tags("vgg16", {}, 138_357_544, torchvision_tag("tv_in1k", top1=0.71594, top5=0.90398)),
    *VGG16_BN.with_tags("vgg16_bn", {}, 138_374_440, torchvision_tag("tv_in1k", top1=0.73354, top5=0.9149)),
    *VGG19.with_tags("vgg19", {}, 143_667_240, torchvision_tag("tv_in1k", top1=0.724, top5=0.90878)),
    *VGG19_BN.with_tags("vgg19_bn", {}, 143_689_256, torchvision_tag("tv_in1k", top1=0.7423, top5=0.91848)),
)
