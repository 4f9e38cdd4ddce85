"""InceptionV3: factorised convolutions in parallel branches.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", https://arxiv.org/abs/1512.00567,
as in keras/applications/inception_v3.py. Keras numbers its convolutions, `conv2d` to `conv2d_93`, in this order.

Torchvision's and timm's network has a gamma in each BN, and counts the zeros around an image in its average pools: timm
does so with TensorFlow's weights, too, which were trained without. Timm's pixels go from -1 to 1, and those of
gluon_in1k are normalised by ImageNet's mean and deviation. Torchvision's network takes the latter for tv_in1k, and
makes the former of them inside (`transform_input`).
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import FLAG, option
from fzoo.models.spec import ModelSpec, Tag
from fzoo.weights import published

#: PyTorch's names of the convolutions, of a stem and blocks, in the order in which Keras numbers them.
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
BLOCK_A = ("1x1", "5x5_1", "5x5_2", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3", "_pool")
REDUCTION_A = ("3x3", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3")
BLOCK_B = ("1x1", *(f"7x7_{i}" for i in (1, 2, 3)), *(f"7x7dbl_{i}" for i in (1, 2, 3, 4, 5)), "_pool")
REDUCTION_B = ("3x3_1", "3x3_2", *(f"7x7x3_{i}" for i in (1, 2, 3, 4)))
BLOCK_C = ("1x1", "3x3_1", "3x3_2a", "3x3_2b", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3a", "3x3dbl_3b", "_pool")
BLOCKS = {
    **dict.fromkeys(("5b", "5c", "5d"), BLOCK_A),
    "6a": REDUCTION_A,
    **dict.fromkeys(("6b", "6c", "6d", "6e"), BLOCK_B),
    "7a": REDUCTION_B,
    **dict.fromkeys(("7b", "7c"), BLOCK_C),
}


class InceptionV3(Classifier):
    """InceptionV3.

    Attributes:
        scale: whether the batch normalisation has a gamma (Keras's name).
        count_include_pad: whether the zeros around an image count in the average pools (PyTorch's name).
    """

    scale: bool = option(False, FLAG)
    count_include_pad: bool = option(False, FLAG)

    default_size = 299
    min_size = 75
    top_pool = "avg_pool"
    torch_unused = ("AuxLogits.",)

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that both libraries have, whose BNs have a gamma, and whose pools count the padding."""
        if not (self.scale and self.count_include_pad):
            return {}
        convs = [*STEM, *(f"Mixed_{block}.branch{conv}" for block, convs in BLOCKS.items() for conv in convs)]
        names = {"predictions": "fc"}
        for i, conv in enumerate(convs):
            number = f"_{i}" if i else ""
            names |= {f"conv2d{number}": f"{conv}.conv", f"batch_normalization{number}": f"{conv}.bn"}
        return {"timm": names, "torchvision": names}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 2048"]:
        """Apply a stem, and the blocks `mixed0` to `mixed10`."""
        conv = partial(conv_bn, k, scale=self.scale)

        x = conv(x, 32, 3, 2, "valid")
        x = conv(x, 32, 3, padding="valid")
        x = conv(x, 64, 3)
        x = k.max_pool(x, 3, 2)
        x = conv(x, 80, 1, padding="valid")
        x = conv(x, 192, 3, padding="valid")
        x = k.max_pool(x, 3, 2)

        for i, pool_width in enumerate((32, 64, 64)):
            x = block_a(self, k, x, pool_width, f"mixed{i}")
        x = reduction_a(self, k, x, "mixed3")
        for i, width in enumerate((128, 160, 160, 192), 4):
            x = block_b(self, k, x, width, f"mixed{i}")
        x = reduction_b(self, k, x, "mixed8")
        for i in (0, 1):
            x = block_c(self, k, x, i)
        return x


def conv_bn(
    k: Layers,
    x: Float[Array, "n h w c"],
    filters: int,
    kernel: int | tuple[int, int],
    strides: int = 1,
    padding: str = "same",
    name: str | None = None,
    scale: bool = False,
) -> Float[Array, "n ho wo filters"]:
    """Apply a convolution, BN, which has a gamma if `scale`, ReLU."""
    x = k.conv2d(x, filters, kernel, strides, padding, use_bias=False, name=name)
    x = k.batch_norm(x, scale=scale, name=name and f"{name}_bn")
    return k.activation(x, "relu", name=name and f"{name}_ac")


def chain(k: Layers, x: Float[Array, "n h w c"], *convs: tuple, scale: bool = False) -> Float[Array, "n ho wo f"]:
    """Apply convolutions in a row, each given by the arguments of `conv_bn`."""
    for conv in convs:
        x = conv_bn(k, x, *conv, scale=scale)
    return x


def average(net: InceptionV3, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Apply an average pool of 3x3."""
    return k.avg_pool(k.zero_pad(x, 1), 3, 1) if net.count_include_pad else k.avg_pool(x, 3, 1, "same")


def block_a(
    net: InceptionV3, k: Layers, x: Float[Array, "n h w c"], pool_width: int, name: str
) -> Float[Array, "n h w f"]:
    """Join 1x1, 5x5, two 3x3, and a pool (the paper's figure 5)."""
    branch = partial(chain, k, scale=net.scale)
    return k.concat(
        [
            branch(x, (64, 1)),
            branch(x, (48, 1), (64, 5)),
            branch(x, (64, 1), (96, 3), (96, 3)),
            branch(average(net, k, x), (pool_width, 1)),
        ],
        name=name,
    )


def reduction_a(net: InceptionV3, k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n ho wo f"]:
    """Halve the size."""
    branch = partial(chain, k, scale=net.scale)
    return k.concat(
        [
            branch(x, (384, 3, 2, "valid")),
            branch(x, (64, 1), (96, 3), (96, 3, 2, "valid")),
            k.max_pool(x, 3, 2),
        ],
        name=name,
    )


def block_b(net: InceptionV3, k: Layers, x: Float[Array, "n h w c"], n: int, name: str) -> Float[Array, "n h w 768"]:
    """Join 7x7 convolutions, as 1x7 and 7x1 (the paper's figure 6)."""
    branch = partial(chain, k, scale=net.scale)
    return k.concat(
        [
            branch(x, (192, 1)),
            branch(x, (n, 1), (n, (1, 7)), (192, (7, 1))),
            branch(x, (n, 1), (n, (7, 1)), (n, (1, 7)), (n, (7, 1)), (192, (1, 7))),
            branch(average(net, k, x), (192, 1)),
        ],
        name=name,
    )


def reduction_b(net: InceptionV3, k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n ho wo f"]:
    """Halve the size again."""
    branch = partial(chain, k, scale=net.scale)
    return k.concat(
        [
            branch(x, (192, 1), (320, 3, 2, "valid")),
            branch(x, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, "valid")),
            k.max_pool(x, 3, 2),
        ],
        name=name,
    )


def block_c(net: InceptionV3, k: Layers, x: Float[Array, "n h w c"], i: int) -> Float[Array, "n h w 2048"]:
    """Join 3x3 convolutions, as 1x3 beside 3x1 (the paper's figure 7)."""
    branch = partial(chain, k, scale=net.scale)
    one = branch(x, (320, 1))
    stem = branch(x, (384, 1))
    three = k.concat([branch(stem, (384, (1, 3))), branch(stem, (384, (3, 1)))], name=f"mixed9_{i}")
    stem = branch(x, (448, 1), (384, 3))
    five = k.concat([branch(stem, (384, (1, 3))), branch(stem, (384, (3, 1)))])
    pool = branch(average(net, k, x), (192, 1))
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

#: What makes torchvision's and timm's graph.
TORCH = {"scale": True, "count_include_pad": True}

TAGS = InceptionV3Spec.with_tags(
    "inception_v3",
    TORCH,
    23_869_000,
    Tag("gluon_in1k", top1=0.78806, top5=0.94372),
    Tag("tf_adv_in1k", top1=0.77598, top5=0.93726, preprocessing="tf"),
    Tag("tf_in1k", top1=0.77866, top5=0.93644, preprocessing="tf"),
    Tag("tv_in1k", top1=0.77472, top5=0.93468, preprocessing="tf"),
)
