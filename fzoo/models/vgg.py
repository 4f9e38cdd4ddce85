"""VGG: stacks of 3x3 convolutions, a max-pool after each.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
https://arxiv.org/abs/1409.1556, as in keras/applications/vgg16.py and vgg19.py.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Classifier):
    """VGG.

    Attributes:
        convs: number of convolutions in each of the five blocks.
    """

    convs: tuple[int, ...] = (2, 2, 3, 3, 3)

    fixed_size = True

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n h//32 w//32 512"]:
        """Five blocks."""
        for block, (convs, width) in enumerate(zip(self.convs, WIDTHS, strict=True), 1):
            for i in range(1, convs + 1):
                x = k.conv2d(x, width, 3, padding="same", activation="relu", name=f"block{block}_conv{i}")
            x = k.max_pool(x, 2, name=f"block{block}_pool")
        return x

    def top(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Two hidden layers and the classifier, on the flattened feature map."""
        x = k.flatten(x, name="flatten")
        x = k.dense(x, 4096, activation="relu", name="fc1")
        x = k.dense(x, 4096, activation="relu", name="fc2")
        return k.dense(x, self.classes, activation=self.probabilities, name="predictions")
