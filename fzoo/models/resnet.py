"""ResNet: bottleneck blocks around an identity.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, as in
keras/applications/resnet.py: strides are in the first 1x1 convolution of a block, and convolutions have biases.
"""

from __future__ import annotations

import re
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.layers.options import COUNT, FLAG, POSITIVE, counts, one_of, option
from fzoo.models.spec import UNTAGGED, ModelSpec, Tag, torchvision_tag, torchvision_tag2
from fzoo.weights import published


class ResNet(Classifier):
    """ResNet.

    The defaults are Keras's. Torchvision and timm have `stride_in_3x3` (known as v1.5: https://arxiv.org/abs/1512.03385
    has it in the first 1x1), no biases, an epsilon of 1e-5, and the other blocks and widths.

    Attributes:
        blocks: number of blocks in each of the four stages.
        block: "bottleneck" (1x1, 3x3, 1x1), or "basic" (3x3, 3x3) of the paper's small networks.
        stride_in_3x3: whether the 3x3 convolution of a bottleneck has the stride, padded on both sides, and not its
            first 1x1.
        use_bias: of the convolutions.
        epsilon: of the batch normalisation.
        groups: of the 3x3 convolutions of bottlenecks: ResNeXt's cardinality (https://arxiv.org/abs/1611.05431).
        width: of the bottlenecks of the first stage, for all groups together; the others' is 2, 4 and 8 times as much.
            64 in the paper, 128 in Wide ResNet-50-2 (https://arxiv.org/abs/1605.07146) and ResNeXt-50 32x4d.
    """

    blocks: tuple[int, ...] = option((3, 4, 6, 3), counts(4))
    block: str = option("bottleneck", one_of("bottleneck", "basic"))
    stride_in_3x3: bool = option(False, FLAG)
    use_bias: bool = option(True, FLAG)
    epsilon: float = option(1.001e-5, POSITIVE)
    groups: int = option(1, COUNT)
    width: int = option(64, COUNT)

    narrow_micro_batch = 2
    top_pool = "avg_pool"
    named_pools = True
    groups_as_depthwise = True  # by the number of channels in a group, as Keras Applications 1.0.8 wrote ResNeXt's

    @nn.nowrap
    def check_options(self) -> None:
        """Check what goes together, too."""
        super().check_options()
        if self.block == "basic" and (self.groups, self.width, self.stride_in_3x3) != (1, 64, False):
            raise ValueError("block='basic' given, groups, width and stride_in_3x3 go with block='bottleneck'")
        if self.width % self.groups:
            raise ValueError(f"width={self.width} given, a multiple of groups={self.groups} expected")

    @staticmethod
    def current_name(old: str) -> str:
        """Translate the names of Keras 1 and 2.1: "res3b_branch2a" is "conv3_block2_1_conv" today."""
        part = re.fullmatch(r"(res|bn)([2-5])([a-z])_branch(1|2[abc])", old)
        if part is None:
            return {"conv1": "conv1_conv", "bn_conv1": "conv1_bn", "fc1000": "predictions"}.get(old, old)
        kind, stage, block, branch = part.groups()
        number = ("1", "2a", "2b", "2c").index(branch)
        return f"conv{stage}_block{ord(block) - ord('a') + 1}_{number}_{'conv' if kind == 'res' else 'bn'}"

    @nn.nowrap
    def torch_names(self) -> dict[str, dict[str, str]]:
        """Return the names that both libraries have, whose convolutions have no biases, and strides in the 3x3."""
        if self.use_bias or (self.block == "bottleneck" and not self.stride_in_3x3):
            return {}
        names = {
            "conv1_conv": "conv1",
            "conv1_bn": "bn1",
            r"conv(\d)_block(\d+)_0_conv": "layer{1-1}.{2-1}.downsample.0",
            r"conv(\d)_block(\d+)_0_bn": "layer{1-1}.{2-1}.downsample.1",
            r"conv(\d)_block(\d+)_([123])_(conv|bn)": "layer{1-1}.{2-1}.{4}{3}",
            "predictions": "fc",
        }
        return {"timm": names, "torchvision": names}

    def backbone(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        """Apply a stem and four stages."""
        x = k.zero_pad(x, 3, name="conv1_pad")
        x = k.conv2d(x, 64, 7, 2, use_bias=self.use_bias, name="conv1_conv")
        x = k.batch_norm(x, epsilon=self.epsilon, name="conv1_bn")
        x = k.activation(x, "relu", name="conv1_relu")
        x = k.zero_pad(x, 1, name="pool1_pad")
        x = k.max_pool(x, 3, 2, name="pool1_pool")
        block = bottleneck if self.block == "bottleneck" else basic_block
        for stage, blocks in enumerate(self.blocks, 2):
            for i in range(1, blocks + 1):
                stride = 2 if i == 1 and stage > 2 else 1
                x = block(self, k, x, 32 << (stage - 1), stride, first=i == 1, name=f"conv{stage}_block{i}")
        return x


def bottleneck(
    net: ResNet, k: Layers, x: Float[Array, "n h w c"], filters: int, stride: int, first: bool, name: str
) -> Float[Array, "n ho wo {4*filters}"]:
    """Apply 1x1, 3x3, 1x1, and add the input, which a stage's first block projects to its width."""
    bn = partial(k.batch_norm, epsilon=net.epsilon)
    conv = partial(k.conv2d, use_bias=net.use_bias)
    inner = filters * net.width // 64
    shortcut = x
    if first:
        shortcut = bn(conv(x, 4 * filters, 1, stride, name=f"{name}_0_conv"), name=f"{name}_0_bn")
    before, within = (1, stride) if net.stride_in_3x3 else (stride, 1)
    x = bn(conv(x, inner, 1, before, name=f"{name}_1_conv"), name=f"{name}_1_bn")
    x = k.activation(x, "relu", name=f"{name}_1_relu")
    x = bn(conv3x3(net, k, x, inner, within, name=f"{name}_2", groups=net.groups), name=f"{name}_2_bn")
    x = k.activation(x, "relu", name=f"{name}_2_relu")
    x = bn(conv(x, 4 * filters, 1, name=f"{name}_3_conv"), name=f"{name}_3_bn")
    return k.activation(k.add([shortcut, x], name=f"{name}_add"), "relu", name=f"{name}_out")


def basic_block(
    net: ResNet, k: Layers, x: Float[Array, "n h w c"], filters: int, stride: int, first: bool, name: str
) -> Float[Array, "n ho wo {filters}"]:
    """Apply 3x3 twice, and add the input, which is projected where its shape is another."""
    bn = partial(k.batch_norm, epsilon=net.epsilon)
    shortcut = x
    if first and (stride, x.shape[-1]) != (1, filters):
        shortcut = bn(
            k.conv2d(x, filters, 1, stride, use_bias=net.use_bias, name=f"{name}_0_conv"), name=f"{name}_0_bn"
        )
    x = bn(conv3x3(net, k, x, filters, stride, name=f"{name}_1"), name=f"{name}_1_bn")
    x = k.activation(x, "relu", name=f"{name}_1_relu")
    x = bn(conv3x3(net, k, x, filters, 1, name=f"{name}_2"), name=f"{name}_2_bn")
    return k.activation(k.add([shortcut, x], name=f"{name}_add"), "relu", name=f"{name}_out")


def conv3x3(
    net: ResNet, k: Layers, x: Float[Array, "n h w c"], filters: int, stride: int, name: str, groups: int = 1
) -> Float[Array, "n ho wo {filters}"]:
    """Apply a 3x3 convolution; with a stride, the padding is on both sides, where "same" would have it on one."""
    padding = "same"
    if stride > 1:
        x, padding = k.zero_pad(x, 1, name=f"{name}_pad"), "valid"
    return k.conv2d(x, filters, 3, stride, padding, use_bias=net.use_bias, groups=groups, name=f"{name}_conv")


variant = partial(
    ModelSpec,
    family=ResNet,
    input_size=224,
    preprocessing="caffe",
    licence="MIT (Kaiming He)",
    paper="https://arxiv.org/abs/1512.03385",
)

#: What makes torchvision's and timm's graphs.
TORCH = {"stride_in_3x3": True, "use_bias": False, "epsilon": 1e-5}

#: The same of their basic blocks, whose strides are where the paper has them.
TORCH_BASIC = {"block": "basic", "use_bias": False, "epsilon": 1e-5}

#: Of networks whose weights all have tags.
untagged = partial(variant, preprocessing="torch", **UNTAGGED)

ResNet18 = untagged(
    name="ResNet18",
    parameters=11_699_112,
    depth=41,
    size_mb=47,
    options={"blocks": (2, 2, 2, 2), **TORCH_BASIC, "preprocessing": "torch"},
)

ResNet34 = untagged(
    name="ResNet34",
    parameters=21_814_696,
    depth=73,
    size_mb=87,
    options={"blocks": (3, 4, 6, 3), **TORCH_BASIC, "preprocessing": "torch"},
)

ResNet50 = variant(
    name="ResNet50",
    parameters=25_636_712,
    depth=107,
    size_mb=98,
    top1=0.749,
    top5=0.921,
    options={"blocks": (3, 4, 6, 3)},
    weight_files=published.RESNET["ResNet50"],
)

ResNet101 = variant(
    name="ResNet101",
    parameters=44_707_176,
    depth=209,
    size_mb=171,
    top1=0.764,
    top5=0.928,
    options={"blocks": (3, 4, 23, 3)},
    weight_files=published.RESNET["ResNet101"],
)

ResNet152 = variant(
    name="ResNet152",
    parameters=60_419_944,
    depth=311,
    size_mb=232,
    top1=0.766,
    top5=0.931,
    options={"blocks": (3, 8, 36, 3)},
    weight_files=published.RESNET["ResNet152"],
)

#: As Keras Applications 1.0.8 had them, the paper's 32x4d; no later Keras has such constructors. Accuracies are those
#: that the README of qubvel/classification_models has for the same weights.
resnext = partial(
    variant,
    preprocessing="torch",
    licence="not stated",
    paper="https://arxiv.org/abs/1611.05431",
)

#: What makes ResNeXt's graph, whose epsilon is Keras's.
RESNEXT = {"stride_in_3x3": True, "use_bias": False, "preprocessing": "torch"}

ResNeXt50 = resnext(
    name="ResNeXt50",
    parameters=25_097_128,
    depth=107,
    size_mb=96,
    top1=0.7736,
    top5=0.9348,
    options={"blocks": (3, 4, 6, 3), "groups": 32, "width": 128, **RESNEXT},
    weight_files=published.RESNET["ResNeXt50"],
)

ResNeXt101 = resnext(
    name="ResNeXt101",
    parameters=44_315_560,
    depth=209,
    size_mb=170,
    top1=0.7848,
    top5=0.94,
    options={"blocks": (3, 4, 23, 3), "groups": 32, "width": 128, **RESNEXT},
    weight_files=published.RESNET["ResNeXt101"],
)

ResNeXt101_32x8d = untagged(
    name="ResNeXt101_32x8d",
    parameters=88_994_216,
    depth=209,
    size_mb=356,
    paper="https://arxiv.org/abs/1611.05431",
    options={"blocks": (3, 4, 23, 3), "groups": 32, "width": 256, **TORCH, "preprocessing": "torch"},
)

ResNeXt101_64x4d = untagged(
    name="ResNeXt101_64x4d",
    parameters=83_658_152,
    depth=209,
    size_mb=335,
    paper="https://arxiv.org/abs/1611.05431",
    options={"blocks": (3, 4, 23, 3), "groups": 64, "width": 256, **TORCH, "preprocessing": "torch"},
)

WideResNet50_2 = untagged(
    name="WideResNet50_2",
    parameters=68_951_464,
    depth=107,
    size_mb=276,
    paper="https://arxiv.org/abs/1605.07146",
    options={"blocks": (3, 4, 6, 3), "width": 128, **TORCH, "preprocessing": "torch"},
)

WideResNet101_2 = untagged(
    name="WideResNet101_2",
    parameters=127_024_552,
    depth=209,
    size_mb=508,
    paper="https://arxiv.org/abs/1605.07146",
    options={"blocks": (3, 4, 23, 3), "width": 128, **TORCH, "preprocessing": "torch"},
)

TAGS = (
    *ResNet18.with_tags(
        "resnet18",
        {},
        11_699_112,
        Tag("a1_in1k", top1=0.71504, top5=0.90086, crop=0.95),
        torchvision_tag("tv_in1k", top1=0.69752, top5=0.89082),
    ),
    *ResNet34.with_tags(
        "resnet34",
        {},
        21_814_696,
        Tag("a1_in1k", top1=0.7642, top5=0.92896, crop=0.95),
        Tag("ra4_e3600_r224_in1k", top1=0.77492, top5=0.93498, crop=0.9, preprocessing="tf"),
        torchvision_tag("tv_in1k", top1=0.73298, top5=0.91422),
    ),
    *ResNet50.with_tags(
        "resnet50",
        TORCH,
        25_610_152,
        Tag("a1_in1k", top1=0.80382, top5=0.94598, crop=0.95),
        Tag("a1h_in1k", top1=0.80654, top5=0.95312, crop=1.0),
        torchvision_tag("tv_in1k", top1=0.76156, top5=0.92866),
        torchvision_tag2(top1=0.80846, top5=0.9543),
    ),
    *ResNet101.with_tags(
        "resnet101",
        TORCH,
        44_654_504,
        Tag("a1_in1k", top1=0.81494, top5=0.95164, crop=0.95),
        Tag("a1h_in1k", top1=0.8195, top5=0.9576, crop=0.95),
        torchvision_tag("tv_in1k", top1=0.77404, top5=0.93552),
        torchvision_tag2(top1=0.81906, top5=0.95768),
    ),
    *ResNet152.with_tags(
        "resnet152",
        TORCH,
        60_344_232,
        Tag("a1_in1k", top1=0.81998, top5=0.95294, crop=0.95),
        Tag("a1h_in1k", top1=0.82818, top5=0.96124, crop=0.95),
        torchvision_tag("tv_in1k", top1=0.7833, top5=0.94046),
        torchvision_tag2(top1=0.82294, top5=0.96),
    ),
    *ResNeXt50.with_tags(
        "resnext50_32x4d",
        TORCH,
        25_097_128,
        Tag("a1_in1k", top1=0.80526, top5=0.94458, crop=0.95),
        Tag("a1h_in1k", top1=0.8114, top5=0.9532, crop=0.95),
        torchvision_tag("fb_swsl_ig1b_ft_in1k", top1=0.82162, top5=0.96224, licence="CC BY-NC 4.0"),
        torchvision_tag("tv_in1k", top1=0.77632, top5=0.93674),
        torchvision_tag2(top1=0.8119, top5=0.95344),
    ),
    *ResNeXt101.with_tags(
        "resnext101_32x4d",
        TORCH,
        44_315_560,
        torchvision_tag("fb_swsl_ig1b_ft_in1k", top1=0.83268, top5=0.9676, licence="CC BY-NC 4.0"),
        Tag("gluon_in1k", top1=0.80336, top5=0.94908),
    ),
    *ResNeXt101_32x8d.with_tags(
        "resnext101_32x8d",
        {},
        88_994_216,
        torchvision_tag("tv_in1k", top1=0.79308, top5=0.9453),
        torchvision_tag2(top1=0.82832, top5=0.96234),
    ),
    *ResNeXt101_64x4d.with_tags(
        "resnext101_64x4d",
        {},
        83_658_152,
        torchvision_tag("tv_in1k", top1=0.82978, top5=0.96252),
    ),
    *WideResNet50_2.with_tags(
        "wide_resnet50_2",
        {},
        68_951_464,
        Tag("racm_in1k", top1=0.81466, top5=0.95544),
        torchvision_tag("tv_in1k", top1=0.78486, top5=0.94084),
        torchvision_tag2(top1=0.81612, top5=0.95766),
    ),
    *WideResNet101_2.with_tags(
        "wide_resnet101_2",
        {},
        127_024_552,
        torchvision_tag("tv_in1k", top1=0.78862, top5=0.94312),
        torchvision_tag2(top1=0.82514, top5=0.96012),
    ),
)
