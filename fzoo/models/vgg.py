"""VGG: stacks of 3x3 convolutions, a max-pool after each.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
https://arxiv.org/abs/1409.1556, as in keras/applications/vgg16.py and vgg19.py.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import counts, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Classifier):
    """VGG.

    Attributes:
        convs: number of convolutions in each of the five blocks.
    """

    convs: tuple[int, ...] = option((2, 2, 3, 3, 3), counts(5))

    fixed_size = True

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n h//32 w//32 512"]:
        """Apply five blocks."""
        for block, (convs, width) in enumerate(zip(self.convs, WIDTHS, strict=True), 1):
            for i in range(1, convs + 1):
                x = k.conv2d(x, width, 3, padding="same", activation="relu", name=f"block{block}_conv{i}")
            x = k.max_pool(x, 2, name=f"block{block}_pool")
        return x

    def top(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Apply two hidden layers to the flattened feature map, and classify."""
        x = k.flatten(x, name="flatten")
        x = k.dense(x, 4096, activation="relu", name="fc1")
        x = k.dense(x, 4096, activation="relu", name="fc2")
        return k.dense(x, self.classes, activation=self.probabilities, name="predictions")


variant = partial(
    ModelSpec,
    family=VGG,
    input_size=224,
    preprocessing="caffe",
    licence="CC BY 4.0 (Visual Geometry Group, Oxford)",
    paper="https://arxiv.org/abs/1409.1556",
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
