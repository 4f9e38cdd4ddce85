"""NASNet-A: cells found by search.

Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition", https://arxiv.org/abs/1707.07012,
as in keras/applications/nasnet.py. A cell sees the outputs of the two cells before it: `x`, and `p` from further back.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.initializers import he_normal
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, option
from fzoo.models.spec import ModelSpec
from fzoo.weights import published


class NASNet(Classifier):
    """NASNet-A (`num_blocks` @ `penultimate_filters`).

    Attributes:
        penultimate_filters: channels of the last feature map, a multiple of 24 * filter_multiplier ** 2.
        num_blocks: normal cells in each of the three stages.
        stem_block_filters: channels of the first convolution.
        skip_reduction: whether the cell after a reduction sees the one before it instead of its input.
        filter_multiplier: growth of the width from stage to stage.
        default_size: height and width when `input_shape` does not say.
    """

    penultimate_filters: int = option(4032, COUNT)
    num_blocks: int = option(6, COUNT)
    stem_block_filters: int = option(96, COUNT)
    skip_reduction: bool = option(True, FLAG)
    filter_multiplier: int = option(2, COUNT)
    default_size: int = option(331, COUNT)

    weightless = ("default_size",)
    open_step = 32
    block_ends = r"stem_bn1|(normal|reduction)_concat_.*|last_map"

    @nn.nowrap
    def check_options(self) -> None:
        """Check that the width divides into cells, too."""
        super().check_options()
        unit = 24 * self.filter_multiplier**2
        if self.penultimate_filters < unit or self.penultimate_filters % unit:
            raise ValueError(f"penultimate_filters={self.penultimate_filters} given, a multiple of {unit} expected")

    @property
    def known_size(self) -> bool:
        """Keras always builds NASNet for a size."""
        return True

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem with two reduction cells, and three stages of normal cells with reductions between them."""
        filters, growth, n = self.penultimate_filters // 24, self.filter_multiplier, self.num_blocks

        x = k.conv2d(x, self.stem_block_filters, 3, 2, use_bias=False, kernel_init=he_normal, name="stem_conv1")
        x = batch_norm(k, x, name="stem_bn1")
        p = None
        x, p = reduction_cell(k, x, p, filters // growth**2, "stem_1")
        x, p = reduction_cell(k, x, p, filters // growth, "stem_2")
        for stage in range(3):
            width = filters * growth**stage
            if stage:
                x, before = reduction_cell(k, x, p, width, f"reduce_{stage * n}")
                p = p if self.skip_reduction else before
            for i in range(n):
                x, p = normal_cell(k, x, p, width, f"{stage * n + i + min(stage, 1)}")
        return k.activation(x, "relu")


def batch_norm(k: Layers, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h w c"]:
    """Normalise by a BN with NASNet's momentum."""
    return k.batch_norm(x, momentum=0.9997, name=name)


def squeeze(k: Layers, x: Float[Array, "n h w c"], filters: int, conv: str, bn: str) -> Float[Array, "n h w f"]:
    """Apply ReLU, a 1x1 convolution, BN."""
    x = k.activation(x, "relu")
    x = k.conv2d(x, filters, 1, padding="same", use_bias=False, kernel_init=he_normal, name=conv)
    return batch_norm(k, x, bn)


def separable(
    k: Layers, x: Float[Array, "n h w c"], filters: int, kernel: int, block: str, stride: int = 1
) -> Float[Array, "n ho wo filters"]:
    """Apply ReLU, a separable convolution and BN, twice; the first may stride."""
    x, padding = k.activation(x, "relu"), "same"
    if stride == 2:
        x, padding = k.zero_pad(x, k.correct_pad(x, kernel), name=f"separable_conv_1_pad_{block}"), "valid"
    x = k.separable_conv2d(x, filters, kernel, stride, padding, name=f"separable_conv_1_{block}")
    x = k.activation(batch_norm(k, x, f"separable_conv_1_bn_{block}"), "relu")
    x = k.separable_conv2d(x, filters, kernel, padding="same", name=f"separable_conv_2_{block}")
    return batch_norm(k, x, f"separable_conv_2_bn_{block}")


def adjust(
    k: Layers, p: Float[Array, "n hp wp cp"] | None, x: Float[Array, "n h w c"], filters: int, block: str
) -> Float[Array, "n h w f"]:
    """Bring `p` to the size of `x` and to `filters` channels; the first cell of all has no `p`, and sees `x` twice."""
    if p is None:
        return x
    if k.plain_size(p)[1] != k.plain_size(x)[1]:
        conv = partial(k.conv2d, features=filters // 2, kernel=1, padding="same", use_bias=False, kernel_init=he_normal)
        p = k.activation(p, "relu", name=f"adjust_relu_1_{block}")
        even = conv(k.avg_pool(p, 1, 2, name=f"adjust_avg_pool_1_{block}"), name=f"adjust_conv_1_{block}")
        odd = k.crop(k.zero_pad(p, ((0, 1), (0, 1))), ((1, 0), (1, 0)))
        odd = conv(k.avg_pool(odd, 1, 2, name=f"adjust_avg_pool_2_{block}"), name=f"adjust_conv_2_{block}")
        return batch_norm(k, k.concat([even, odd]), f"adjust_bn_{block}")
    if p.shape[-1] != filters:
        return squeeze(k, p, filters, f"adjust_conv_projection_{block}", f"adjust_bn_{block}")
    return p


Cell = tuple[Float[Array, "n ho wo f"], Float[Array, "n h w c"]]


def normal_cell(k: Layers, x: Float[Array, "n h w c"], p: Float[Array, "n hp wp cp"], filters: int, block: str) -> Cell:
    """Compute the paper's figure 4, left. Returns the cell's output and its input, the next cell's `p`."""
    sep = partial(separable, k, filters=filters)
    pool = partial(k.avg_pool, window=3, strides=1, padding="same")

    p = adjust(k, p, x, filters, block)
    h = squeeze(k, x, filters, f"normal_conv_1_{block}", f"normal_bn_1_{block}")
    left, right = sep(h, kernel=5, block=f"normal_left1_{block}"), sep(p, kernel=3, block=f"normal_right1_{block}")
    one = k.add([left, right], name=f"normal_add_1_{block}")
    left, right = sep(p, kernel=5, block=f"normal_left2_{block}"), sep(p, kernel=3, block=f"normal_right2_{block}")
    two = k.add([left, right], name=f"normal_add_2_{block}")
    three = k.add([pool(h, name=f"normal_left3_{block}"), p], name=f"normal_add_3_{block}")
    left, right = pool(p, name=f"normal_left4_{block}"), pool(p, name=f"normal_right4_{block}")
    four = k.add([left, right], name=f"normal_add_4_{block}")
    five = k.add([sep(h, kernel=3, block=f"normal_left5_{block}"), h], name=f"normal_add_5_{block}")
    return k.concat([p, one, two, three, four, five], name=f"normal_concat_{block}"), x


def reduction_cell(
    k: Layers, x: Float[Array, "n h w c"], p: Float[Array, "n hp wp cp"] | None, filters: int, block: str
) -> Cell:
    """Compute the paper's figure 4, right: half the size. Returns the cell's output and its input."""
    sep = partial(separable, k, filters=filters)

    p = adjust(k, p, x, filters, block)
    h = squeeze(k, x, filters, f"reduction_conv_1_{block}", f"reduction_bn_1_{block}")
    padded = k.zero_pad(h, k.correct_pad(h, 3), name=f"reduction_pad_1_{block}")  # zeros, which may win: h is no ReLU's
    left = sep(h, kernel=5, stride=2, block=f"reduction_left1_{block}")
    right = sep(p, kernel=7, stride=2, block=f"reduction_right1_{block}")
    one = k.add([left, right], name=f"reduction_add_1_{block}")
    left = k.max_pool(padded, 3, 2, name=f"reduction_left2_{block}")
    right = sep(p, kernel=7, stride=2, block=f"reduction_right2_{block}")
    two = k.add([left, right], name=f"reduction_add_2_{block}")
    left = k.avg_pool(padded, 3, 2, name=f"reduction_left3_{block}")
    right = sep(p, kernel=5, stride=2, block=f"reduction_right3_{block}")
    three = k.add([left, right], name=f"reduction_add3_{block}")
    four = k.add([two, k.avg_pool(one, 3, 1, "same", name=f"reduction_left4_{block}")])
    left = sep(one, kernel=3, block=f"reduction_left4_{block}")
    right = k.max_pool(padded, 3, 2, name=f"reduction_right5_{block}")
    five = k.add([left, right], name=f"reduction_add4_{block}")
    return k.concat([two, three, four, five], name=f"reduction_concat_{block}"), x


variant = partial(
    ModelSpec,
    family=NASNet,
    preprocessing="tf",
    licence="Apache 2.0",
    paper="https://arxiv.org/abs/1707.07012",
)

NASNetMobile = variant(
    name="NASNetMobile",
    input_size=224,
    parameters=5_326_716,
    depth=389,
    size_mb=23,
    top1=0.744,
    top5=0.919,
    options={
        "penultimate_filters": 1056,
        "num_blocks": 4,
        "stem_block_filters": 32,
        "skip_reduction": False,
        "default_size": 224,
    },
    weight_files=published.NASNET["NASNetMobile"],
)

NASNetLarge = variant(
    name="NASNetLarge",
    input_size=331,
    parameters=88_949_818,
    depth=533,
    size_mb=343,
    top1=0.825,
    top5=0.96,
    options={
        "penultimate_filters": 4032,
        "num_blocks": 6,
        "stem_block_filters": 96,
        "skip_reduction": True,
        "default_size": 331,
    },
    weight_files=published.NASNET["NASNetLarge"],
)
