"""InceptionV3: factorised convolutions in parallel branches.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", https://arxiv.org/abs/1512.00567,
as in keras/applications/inception_v3.py. Keras numbers its convolutions, `conv2d` to `conv2d_93`, in this order.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.models.spec import ModelSpec
from fzoo.weights import published


class InceptionV3(Classifier):
    """InceptionV3."""

    default_size = 299
    min_size = 75
    top_pool = "avg_pool"

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 2048"]:
        """Apply a stem, and the blocks `mixed0` to `mixed10`."""
        conv = partial(conv_bn, k)

        x = conv(x, 32, 3, 2, "valid")
        x = conv(x, 32, 3, padding="valid")
        x = conv(x, 64, 3)
        x = k.max_pool(x, 3, 2)
        x = conv(x, 80, 1, padding="valid")
        x = conv(x, 192, 3, padding="valid")
        x = k.max_pool(x, 3, 2)

        for i, pool_width in enumerate((32, 64, 64)):
            x = block_a(k, x, pool_width, f"mixed{i}")
        x = reduction_a(k, x, "mixed3")
        for i, width in enumerate((128, 160, 160, 192), 4):
            x = block_b(k, x, width, f"mixed{i}")
        x = reduction_b(k, x, "mixed8")
        for i in (0, 1):
            x = block_c(k, x, i)
        return x


def conv_bn(
    k: Layers,
    x: Float[Array, "n h w c"],
    filters: int,
    kernel: int | tuple[int, int],
    strides: int = 1,
    padding: str = "same",
    name: str | None = None,
) -> Float[Array, "n ho wo filters"]:
    """Apply a convolution, BN without a scale, ReLU."""
    x = k.conv2d(x, filters, kernel, strides, padding, use_bias=False, name=name)
    x = k.batch_norm(x, scale=False, name=name and f"{name}_bn")
    return k.activation(x, "relu", name=name and f"{name}_ac")


def chain(k: Layers, x: Float[Array, "n h w c"], *convs: tuple) -> Float[Array, "n ho wo f"]:
    """Apply convolutions in a row, each given by the arguments of `conv_bn`."""
    for conv in convs:
        x = conv_bn(k, x, *conv)
    return x


def block_a(k: Layers, x: Float[Array, "n h w c"], pool_width: int, name: str) -> Float[Array, "n h w f"]:
    """Join 1x1, 5x5, two 3x3, and a pool (the paper's figure 5)."""
    return k.concat(
        [
            chain(k, x, (64, 1)),
            chain(k, x, (48, 1), (64, 5)),
            chain(k, x, (64, 1), (96, 3), (96, 3)),
            chain(k, k.avg_pool(x, 3, 1, "same"), (pool_width, 1)),
        ],
        name=name,
    )


def reduction_a(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n ho wo f"]:
    """Halve the size."""
    return k.concat(
        [
            chain(k, x, (384, 3, 2, "valid")),
            chain(k, x, (64, 1), (96, 3), (96, 3, 2, "valid")),
            k.max_pool(x, 3, 2),
        ],
        name=name,
    )


def block_b(k: Layers, x: Float[Array, "n h w c"], n: int, name: str) -> Float[Array, "n h w 768"]:
    """Join 7x7 convolutions, as 1x7 and 7x1 (the paper's figure 6)."""
    return k.concat(
        [
            chain(k, x, (192, 1)),
            chain(k, x, (n, 1), (n, (1, 7)), (192, (7, 1))),
            chain(k, x, (n, 1), (n, (7, 1)), (n, (1, 7)), (n, (7, 1)), (192, (1, 7))),
            chain(k, k.avg_pool(x, 3, 1, "same"), (192, 1)),
        ],
        name=name,
    )


def reduction_b(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n ho wo f"]:
    """Halve the size again."""
    return k.concat(
        [
            chain(k, x, (192, 1), (320, 3, 2, "valid")),
            chain(k, x, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, "valid")),
            k.max_pool(x, 3, 2),
        ],
        name=name,
    )


def block_c(k: Layers, x: Float[Array, "n h w c"], i: int) -> Float[Array, "n h w 2048"]:
    """Join 3x3 convolutions, as 1x3 beside 3x1 (the paper's figure 7)."""
    one = chain(k, x, (320, 1))
    split = chain(k, x, (384, 1))
    three = k.concat([chain(k, split, (384, (1, 3))), chain(k, split, (384, (3, 1)))], name=f"mixed9_{i}")
    split = chain(k, x, (448, 1), (384, 3))
    five = k.concat([chain(k, split, (384, (1, 3))), chain(k, split, (384, (3, 1)))])
    pool = chain(k, k.avg_pool(x, 3, 1, "same"), (192, 1))
    return k.concat([one, three, five, pool], name=f"mixed{9 + i}")


InceptionV3Spec = ModelSpec(
    name="InceptionV3",
    family=InceptionV3,
    input_size=299,
    preprocessing="tf",
    parameters=23_851_784,
    depth=189,
    size_mb=92,
    top1=0.779,
    top5=0.937,
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1512.00567",
    weight_files=published.INCEPTION_V3["InceptionV3"],
)
