"""Xception: depthwise separable convolutions with shortcuts.

Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", https://arxiv.org/abs/1610.02357,
as in keras/applications/xception.py.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from fzoo.layers.activations import Activation
from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.models.spec import ModelSpec
from fzoo.weights import published


class Xception(Classifier):
    """Xception."""

    default_size = 299
    min_size = 71
    top_pool = "avg_pool"

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 2048"]:
        """Apply the entry flow (blocks 1 to 4), the middle flow (5 to 12) and the exit flow (13 and 14)."""
        x = k.conv2d(x, 32, 3, 2, use_bias=False, name="block1_conv1")
        x = k.activation(k.batch_norm(x, name="block1_conv1_bn"), "relu", name="block1_conv1_act")
        x = k.conv2d(x, 64, 3, use_bias=False, name="block1_conv2")
        x = k.activation(k.batch_norm(x, name="block1_conv2_bn"), "relu", name="block1_conv2_act")

        x = reduction(k, x, (128, 128), "block2", activate_first=False)
        x = reduction(k, x, (256, 256), "block3")
        x = reduction(k, x, (728, 728), "block4")
        for block in range(5, 13):
            y = x
            for i in (1, 2, 3):
                y = separable(k, y, 728, f"block{block}_sepconv{i}", before="relu")
            x = k.add([y, x])
        x = reduction(k, x, (728, 1024), "block13")
        for i, filters in enumerate((1536, 2048), 1):
            x = separable(k, x, filters, f"block14_sepconv{i}")
            x = k.activation(x, "relu", name=f"block14_sepconv{i}_act")
        return x


def separable(
    k: Layers, x: Float[Array, "n h w c"], filters: int, name: str, before: Activation = None
) -> Float[Array, "n h w filters"]:
    """Apply a separable convolution and BN, with an activation before it where one is given."""
    if before:
        x = k.activation(x, before, name=f"{name}_act")
    x = k.separable_conv2d(x, filters, 3, padding="same", name=name)
    return k.batch_norm(x, name=f"{name}_bn")


def reduction(
    k: Layers, x: Float[Array, "n h w c"], filters: tuple[int, int], block: str, activate_first: bool = True
) -> Float[Array, "n ho wo f"]:
    """Apply two separable convolutions and a max-pool, beside a strided 1x1 shortcut."""
    shortcut = k.batch_norm(k.conv2d(x, filters[1], 1, 2, "same", use_bias=False))
    x = separable(k, x, filters[0], f"{block}_sepconv1", before="relu" if activate_first else None)
    x = separable(k, x, filters[1], f"{block}_sepconv2", before="relu")
    return k.add([k.max_pool(x, 3, 2, "same", name=f"{block}_pool"), shortcut])


XceptionSpec = ModelSpec(
    name="Xception",
    family=Xception,
    input_size=299,
    preprocessing="tf",
    parameters=22_910_480,
    depth=81,
    size_mb=88,
    top1=0.79,
    top5=0.945,
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1610.02357",
    weight_files=published.XCEPTION["Xception"],
)
