"""Small versions of the networks that have tags, in fzoo and in the libraries of PyTorch's: what is compared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.models.efficientnet_v2 import Stage
from fzoo.models.mobilenet_v3 import SMALL, Block

#: ImageNet's, of values from 0 to 1.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Case:
    """A small version of a network, in fzoo and in a library of PyTorch's.

    Attributes:
        model: fzoo's name, with a tag.
        library: "timm" or "torchvision".
        options: that make fzoo's small, but for seven classes.
        build: makes the library's, with seven classes, if PyTorch is there.
        taps: what is compared beside the output: PyTorch's module with this output, by the layer of fzoo's.
        side: of the images.
    """

    model: str
    library: str
    options: Mapping[str, Any]
    build: Callable[[], Any]
    taps: Mapping[str, str]
    side: int = 64

    @property
    def name(self) -> str:
        """By which it is stored."""
        return f"{self.model} {self.library}"

    def create(self, **options: Any) -> Classifier:
        """Make fzoo's network; without a softmax, as PyTorch's are."""
        size = {"input_shape": (self.side, self.side, 3)}
        ends = {} if options.get("include_top") is False else {"classes": 7, "classifier_activation": None}
        return fzoo.create(self.model, **{**size, **ends, **self.options, **options})


def timm(name: str, **options: Any) -> Callable[[], Any]:
    """Make what builds a network of timm's, with seven classes."""

    def build() -> Any:
        from timm import create_model

        return create_model(name, num_classes=7, **options)

    return build


def torchvision(name: str, **options: Any) -> Callable[[], Any]:
    """Make what builds a network of torchvision's, with seven classes."""

    def build() -> Any:
        from torchvision import models

        return models.get_model(name, num_classes=7, **options)

    return build


def resnet(*blocks: int, basic: bool = False, **options: Any) -> Callable[[], Any]:
    """Make what builds a ResNet of torchvision's."""

    def build() -> Any:
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        return ResNet(BasicBlock if basic else Bottleneck, blocks, 7, **options)

    return build


def vgg(library: str, convs: tuple[int, ...], batch_norm: bool = False) -> Callable[[], Any]:
    """Make what builds a VGG for images of 64 x 64, whose last feature map is 2 x 2."""

    def build() -> Any:
        from torch import nn

        blocks = zip(convs, (64, 128, 256, 512, 512), strict=True)
        layers = [layer for count, width in blocks for layer in [width] * count + ["M"]]
        if library == "timm":
            from timm.models.vgg import VGG, ConvMlp

            network: Any = VGG(layers, num_classes=7, norm_layer=nn.BatchNorm2d if batch_norm else None)
            network.pre_logits = ConvMlp(512, 4096, 2)
        else:
            from torchvision.models.vgg import VGG, make_layers

            network = VGG(make_layers(layers, batch_norm), num_classes=7, init_weights=False)
            network.avgpool, network.classifier[0] = nn.AdaptiveAvgPool2d(2), nn.Linear(512 * 2 * 2, 4096)
        return network

    return build


def densenet(*blocks: int, growth_rate: int = 32) -> Callable[[], Any]:
    """Make what builds a DenseNet of torchvision's."""

    def build() -> Any:
        from torchvision.models.densenet import DenseNet

        return DenseNet(growth_rate, blocks, 2 * growth_rate, num_classes=7)

    return build


def mobilenet(version: str, alpha: float, **options: Any) -> Callable[[], Any]:
    """Make what builds a MobileNet of timm's."""

    def build() -> Any:
        from timm.models import efficientnet, mobilenetv3

        make = getattr(efficientnet if version in ("v1", "v2") else mobilenetv3, f"_gen_mobilenet_{version}")
        return make("mobilenet", alpha, num_classes=7, **options)

    return build


def mobilenet_v3(last: int, *blocks: Block) -> Callable[[], Any]:
    """Make what builds a MobileNetV3 of torchvision's, of rows of fzoo's."""

    def build() -> Any:
        from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

        inputs = [16, *(block.filters for block in blocks)]
        rows = [
            InvertedResidualConfig(
                before,
                block.kernel,
                round(before * block.expansion),
                block.filters,
                block.squeeze,
                "HS" if block.hard_swish else "RE",
                block.stride,
                1,
                1.0,
            )
            for before, block in zip(inputs, blocks, strict=False)
        ]
        return MobileNetV3(rows, last, 7)

    return build


def convnext(*depths: int, widths: tuple[int, ...]) -> Callable[[], Any]:
    """Make what builds a ConvNeXt of torchvision's."""

    def build() -> Any:
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        rows = zip(widths, (*widths[1:], None), depths, strict=True)
        return ConvNeXt([CNBlockConfig(*row) for row in rows], num_classes=7)

    return build


def timm_efficientnet(scale: float, **options: Any) -> Callable[[], Any]:
    """Make what builds an EfficientNet of timm's, scaled in width and depth, whose names have no such options."""

    def build() -> Any:
        from timm.models.efficientnet import _gen_efficientnet

        return _gen_efficientnet(
            "efficientnet_b0", channel_multiplier=scale, depth_multiplier=scale, num_classes=7, **options
        )

    return build


def torchvision_efficientnet(scale: float) -> Callable[[], Any]:
    """Make what builds an EfficientNet of torchvision's, scaled in width and depth."""

    def build() -> Any:
        from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf

        rows, last = _efficientnet_conf("efficientnet_b0", width_mult=scale, depth_mult=scale)
        return EfficientNet(rows, 0.2, num_classes=7, last_channel=last)

    return build


def timm_efficientnet_v2(stages: Sequence[Stage], stem_filters: int, **options: Any) -> Callable[[], Any]:
    """Make what builds an EfficientNetV2 of timm's, from the rows of fzoo's."""

    def build() -> Any:
        from timm.models._efficientnet_builder import decode_arch_def
        from timm.models.efficientnet import EfficientNet
        from torch import nn

        rows = []
        for fused, expansion, filters, repeats, stride in stages:
            kind = ("cn" if expansion == 1 else "er") if fused else "ir"
            end = {"cn": "_skip", "er": "", "ir": "_se0.25"}[kind]
            rows.append([f"{kind}_r{repeats}_k3_s{stride}_e{expansion}_c{filters}{end}"])
        arguments = {"num_classes": 7, "num_features": 1280, "stem_size": stem_filters, "act_layer": nn.SiLU}
        norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
        return EfficientNet(decode_arch_def(rows), norm_layer=norm, **arguments, **options)

    return build


def torchvision_efficientnet_v2(stages: Sequence[Stage], stem_filters: int) -> Callable[[], Any]:
    """Make what builds an EfficientNetV2 of torchvision's, from the rows of fzoo's."""

    def build() -> Any:
        from torch import nn
        from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

        rows, before = [], stem_filters
        for fused, expansion, filters, repeats, stride in stages:
            rows.append((FusedMBConvConfig if fused else MBConvConfig)(expansion, 3, stride, before, filters, repeats))
            before = filters
        norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
        return EfficientNet(rows, 0.2, num_classes=7, norm_layer=norm, last_channel=1280)

    return build


def of_pixels(
    build: Callable[[], Any], mean: tuple[float, ...] = IMAGENET[0], std: tuple[float, ...] = IMAGENET[1]
) -> Callable[[], Any]:
    """Have a network take pixels from 0 to 255, as fzoo's does that preprocesses by itself."""

    def built() -> Any:
        import torch

        network, (shift, scale) = build(), (torch.tensor(values)[:, None, None] for values in (mean, std))
        network.register_forward_pre_hook(lambda _, images: ((images[0] / 255 - shift) / scale,))
        return network

    return built


def torchvision_regnet(widths: tuple[int, ...], group_width: int, excite: bool) -> Callable[[], Any]:
    """Make what builds a RegNet of torchvision's, of five blocks."""

    def build() -> Any:
        from torchvision.models.regnet import BlockParams, RegNet

        groups = [min(width, group_width) for width in widths]
        blocks = BlockParams([1, 1, 2, 1], list(widths), groups, [1.0] * 4, [2] * 4, 0.25 if excite else None)
        return RegNet(blocks, 7)

    return build


def timm_regnet(group_width: int, excite: bool) -> Callable[[], Any]:
    """Make what builds a RegNet of timm's, of five blocks: 16, 24, 32, 32 and 40 wide."""

    def build() -> Any:
        from timm.models.regnet import RegNet, RegNetCfg

        sizes = {"depth": 5, "w0": 16, "wa": 6.0, "wm": 1.4}
        return RegNet(RegNetCfg(**sizes, group_size=group_width, se_ratio=0.25 * excite), num_classes=7)

    return build


def regnet_taps(kind: str, library: str) -> dict[str, str]:
    """The outputs of the stem and of two blocks."""
    prefix, block = f"regnet{kind.lower()}_", f"{kind[0]}Block"
    inside = "trunk_output.block{0}.block{0}-{1}"
    places = {"timm": ("stem", "s3.b2", "s4.b1"), "torchvision": ("stem", inside.format(3, 1), inside.format(4, 0))}
    layers = ("stem_relu", f"Stage_2_{block}_1_exit_relu", f"Stage_3_{block}_0_exit_relu")
    return {prefix + layer: place for layer, place in zip(layers, places[library], strict=True)}


INCEPTION_TAPS = {"mixed2": "Mixed_5d", "mixed4": "Mixed_6b", "mixed9": "Mixed_7b"}

RESNET_TAPS = {"pool1_pool": "maxpool", "conv3_block2_out": "layer2.1", "conv5_block1_out": "layer4.0"}

VGG_CONVS = (1, 1, 2, 1, 1)

VGG_TAPS = {"block2_pool": "features.5", "block3_conv2": "features.9", "block5_pool": "features.16"}

DENSENET_TAPS = {
    "pool1": "features.pool0",
    "conv3_block2_1_conv": "features.denseblock2.denselayer2.conv1",
    "pool4_pool": "features.transition3.pool",
}

MOBILENET_TAPS = {"conv1_relu": "bn1", "conv_pw_4_relu": "blocks.2.0.bn2", "conv_pw_13_relu": "blocks.4.1"}

MOBILENET_V2_TAPS = {
    "timm": {"Conv1_relu": "bn1", "block_5_add": "blocks.2.2", "block_14_depthwise_relu": "blocks.5.1.bn2"},
    "torchvision": {
        "Conv1_relu": "features.0",
        "block_5_add": "features.6",
        "block_14_depthwise_relu": "features.15.conv.1",
    },
}

MOBILENET_V3_TAPS = {
    "expanded_conv_project_bn": "blocks.0.0.bn2",
    "expanded_conv_5_add": "blocks.2.2",
    "conv_2": "conv_head",
}

EFFICIENTNET = {"width_coefficient": 0.3, "depth_coefficient": 0.3}

EFFICIENTNET_TAPS = {
    "stem_activation": ("bn1", "features.0"),
    "block3a_expand_activation": ("blocks.2.0.bn1", "features.3.0.block.0"),
    "block6b_add": ("blocks.5.1", "features.6.1"),
}

EFFICIENTNET_V2: dict[str, Any] = {
    "stages": (
        Stage(True, 1, 8, 2, 1),
        Stage(True, 4, 16, 1, 2),
        Stage(True, 4, 24, 2, 2),
        Stage(False, 4, 32, 2, 2),
        Stage(False, 6, 40, 1, 1),
    ),
    "stem_filters": 8,
}

EFFICIENTNET_V2_TAPS = {
    "stem_activation": ("bn1", "features.0"),
    "block3b_add": ("blocks.2.1", "features.3.1"),
    "block4b_add": ("blocks.3.1", "features.4.1"),
}

CONVNEXT: dict[str, Any] = {"depths": (1, 2, 1, 1), "projection_dims": (8, 16, 24, 32)}

REGNET = {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 40), "group_width": 8}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("ResNet50.tv2_in1k", "torchvision", {"blocks": (1, 2, 1, 1)}, resnet(1, 2, 1, 1), RESNET_TAPS),
        Case("ResNet50.a1_in1k", "timm", {"blocks": (1, 2, 1, 1)}, timm("resnet50", layers=(1, 2, 1, 1)), RESNET_TAPS),
        Case("ResNet18.tv_in1k", "torchvision", {"blocks": (1, 2, 1, 1)}, resnet(1, 2, 1, 1, basic=True), RESNET_TAPS),
        Case("ResNet34.a1_in1k", "timm", {"blocks": (1, 2, 1, 1)}, timm("resnet34", layers=(1, 2, 1, 1)), RESNET_TAPS),
        Case(
            "WideResNet50_2.tv2_in1k",
            "torchvision",
            {"blocks": (1, 2, 1, 1)},
            resnet(1, 2, 1, 1, width_per_group=128),
            RESNET_TAPS,
        ),
        Case(
            "ResNeXt50.tv2_in1k",
            "torchvision",
            {"blocks": (1, 2, 1, 1)},
            resnet(1, 2, 1, 1, groups=32, width_per_group=4),
            RESNET_TAPS,
        ),
        Case("VGG11.tv_in1k", "timm", {"convs": VGG_CONVS}, vgg("timm", VGG_CONVS), VGG_TAPS),
        Case(
            "VGG11_BN.tv_in1k",
            "torchvision",
            {"convs": VGG_CONVS},
            vgg("torchvision", VGG_CONVS, batch_norm=True),
            {"block2_pool": "features.7", "block3_conv2_relu": "features.13", "block5_pool": "features.22"},
        ),
        Case(
            "DenseNet121.ra_in1k",
            "timm",
            {"blocks": (2, 2, 2, 1)},
            timm("densenet121", block_config=(2, 2, 2, 1)),
            DENSENET_TAPS,
        ),
        Case(
            "DenseNet161.tv_in1k",
            "torchvision",
            {"blocks": (2, 2, 2, 1)},
            densenet(2, 2, 2, 1, growth_rate=48),
            DENSENET_TAPS,
        ),
        Case("InceptionV3.gluon_in1k", "timm", {}, timm("inception_v3"), INCEPTION_TAPS, 75),
        Case(
            "InceptionV3.tv_in1k",
            "torchvision",
            {},
            torchvision("inception_v3", init_weights=False),
            INCEPTION_TAPS,
            75,
        ),
        Case("MobileNetV2.ra_in1k", "timm", {"alpha": 0.35}, mobilenet("v2", 0.35), MOBILENET_V2_TAPS["timm"]),
        Case(
            "MobileNetV2.tv_in1k",
            "torchvision",
            {"alpha": 0.35},
            torchvision("mobilenet_v2", width_mult=0.35),
            MOBILENET_V2_TAPS["torchvision"],
        ),
        Case("MobileNetV3Small.lamb_in1k", "timm", {"alpha": 0.5}, timm("mobilenetv3_small_050"), MOBILENET_V3_TAPS),
        Case("MobileNetV3Small.in1k", "timm", {"alpha": 0.75}, timm("tf_mobilenetv3_small_075"), MOBILENET_V3_TAPS),
        Case(
            "MobileNetV3Large.in1k",
            "timm",
            {"minimalistic": True},
            timm("tf_mobilenetv3_large_minimal_100"),
            MOBILENET_V3_TAPS,
        ),
        Case(
            "MobileNetV3Large.tv2_in1k",
            "torchvision",
            {"blocks": SMALL[:6], "last_filters": 64},
            mobilenet_v3(64, *SMALL[:6]),
            {"expanded_conv_project_bn": "features.1", "expanded_conv_5_add": "features.6", "conv_1": "features.7.0"},
        ),
        Case("MobileNet.ra4_e3600_r224_in1k", "timm", {"alpha": 0.25}, mobilenet("v1", 0.25), MOBILENET_TAPS),
        Case(
            "ConvNeXtTiny.in12k_ft_in1k",
            "timm",
            CONVNEXT,
            of_pixels(timm("convnext_tiny", depths=CONVNEXT["depths"], dims=CONVNEXT["projection_dims"])),
            {
                "convnext_tiny_stem": "stem",
                "convnext_tiny_stage_1_block_1_depthwise_conv": "stages.1.blocks.1.conv_dw",
                "convnext_tiny_downsampling_block_2": "stages.3.downsample",
            },
        ),
        Case(
            "ConvNeXtBase.fb_in1k",
            "torchvision",
            CONVNEXT,
            of_pixels(convnext(*CONVNEXT["depths"], widths=CONVNEXT["projection_dims"])),
            {
                "convnext_base_stem": "features.0",
                "convnext_base_stage_1_block_1_depthwise_conv": "features.3.1.block.0",
                "convnext_base_downsampling_block_2": "features.6",
            },
        ),
        Case(
            "EfficientNetB0.ns_jft_in1k",
            "timm",
            EFFICIENTNET,
            of_pixels(timm_efficientnet(0.3, bn_eps=1e-3, pad_type="same")),
            {layer: inside for layer, (inside, _) in EFFICIENTNET_TAPS.items()},
            side=75,
        ),
        Case(
            "EfficientNetB0.ra4_e3600_r224_in1k",
            "timm",
            EFFICIENTNET,
            of_pixels(timm_efficientnet(0.3), (0.5,), (0.5,)),
            {layer: inside for layer, (inside, _) in EFFICIENTNET_TAPS.items()},
            side=75,
        ),
        Case(
            "EfficientNetB0.ra_in1k",
            "torchvision",
            EFFICIENTNET,
            of_pixels(torchvision_efficientnet(0.3)),
            {layer: inside for layer, (_, inside) in EFFICIENTNET_TAPS.items()},
        ),
        Case(
            "EfficientNetV2B0.in1k",
            "timm",
            EFFICIENTNET_V2,
            of_pixels(timm_efficientnet_v2(**EFFICIENTNET_V2, pad_type="same")),
            {layer: inside for layer, (inside, _) in EFFICIENTNET_V2_TAPS.items()},
            side=75,
        ),
        Case(
            "EfficientNetV2S.in21k_ft_in1k",
            "torchvision",
            {**EFFICIENTNET_V2, "symmetric_padding": True},
            torchvision_efficientnet_v2(**EFFICIENTNET_V2),
            {layer: inside for layer, (_, inside) in EFFICIENTNET_V2_TAPS.items()},
        ),
        Case("RegNetX002.pycls_in1k", "timm", REGNET, timm_regnet(8, False), regnet_taps("X002", "timm")),
        Case("RegNetY160.swag_ft_in1k", "timm", REGNET, timm_regnet(8, True), regnet_taps("Y160", "timm")),
        Case(
            "RegNetX080.tv2_in1k",
            "torchvision",
            {**REGNET, "widths": (16, 24, 48, 72), "group_width": 24},
            torchvision_regnet((16, 24, 48, 72), 24, False),
            regnet_taps("X080", "torchvision"),
            65,
        ),
        Case(
            "RegNetY080.tv2_in1k",
            "torchvision",
            REGNET,
            torchvision_regnet((16, 24, 32, 40), 8, True),
            regnet_taps("Y080", "torchvision"),
        ),
        Case(
            "ResNetRS200.tf_in1k",
            "timm",
            {"blocks": (1, 2, 1, 1), "include_preprocessing": False},
            timm("resnetrs200", layers=(1, 2, 1, 1)),
            {
                "stem_1_stem_act_4": "maxpool",
                "BlockGroup3__block_1__output_act": "layer2.1",
                "BlockGroup5__block_0__output_act": "layer4.0",
            },
            65,
        ),
    )
}

#: Torchvision's names of the networks that have tags, by timm's, where both have them.
TORCHVISION = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{name: name for name in ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")},
    **{f"wide_resnet{depth}_2": f"wide_resnet{depth}_2" for depth in (50, 101)},
    **{f"vgg{depth}{bn}": f"vgg{depth}{bn}" for depth in (11, 13, 16, 19) for bn in ("", "_bn")},
    **{f"densenet{depth}": f"densenet{depth}" for depth in (121, 161, 169, 201)},
    "inception_v3": "inception_v3",
    "mobilenetv2_100": "mobilenet_v2",
    **{f"mobilenetv3_{size}_100": f"mobilenet_v3_{size}" for size in ("small", "large")},
    **{f"efficientnet_b{number}": f"efficientnet_b{number}" for number in range(6)},
    **{f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base", "large")},
    **{
        f"regnet{kind}_{size}": f"regnet_{kind}_{flops}"
        for kind, sizes in (
            ("x", {"004_tv": "400mf", "008": "800mf", "080": "8gf"}),
            ("y", {"004": "400mf", "008_tv": "800mf", "080_tv": "8gf"}),
        )
        for size, flops in {**sizes, "016": "1_6gf", "032": "3_2gf", "160": "16gf", "320": "32gf"}.items()
    },
}
