"""What timm's and torchvision's networks are and give, stored so that tests need no PyTorch: `tests/stored/torch/`.

`python tests/stored_torch.py` writes it anew, or what of it is of the families that are named after it (ResNet); it
wants torch, torchvision and timm. The slow tests compare it with those that are installed. For each family,
`resnet.json.gz`: names and shapes of the arrays of each network that has a tag, at full depth; `resnet.npz`: what the
small versions give.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from networks import images_for, measured_statistics, random_variables
from stored import pack_statistics, summarise, unpack_statistics

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.models.efficientnet_v2 import Stage
from fzoo.weights.state_dict import COUNTER, constants, put, state_dict

FOLDER = Path(__file__).parent / "stored" / "torch"


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


#: ImageNet's, of values from 0 to 1.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


RESNET_TAPS = {"pool1_pool": "maxpool", "conv3_block2_out": "layer2.1", "conv5_block1_out": "layer4.0"}

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
    )
}

#: Torchvision's names of the networks that have tags, by timm's, where both have them.
TORCHVISION = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"wide_resnet{depth}_2": f"wide_resnet{depth}_2" for depth in (50, 101)},
    **{f"efficientnet_b{number}": f"efficientnet_b{number}" for number in range(6)},
    **{f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base", "large")},
}


def timm_name(model: str) -> str:
    """Return what timm calls the network of a model with a tag."""
    return fzoo.spec(model).weight_files[0].name.partition(".")[0]


@functools.cache
def stored_arrays() -> dict[str, dict[str, list[int]]]:
    """{"timm resnet50": {name: shape}}, without the counters of batches."""
    files = [json.loads(gzip.decompress(path.read_bytes())) for path in sorted(FOLDER.glob("*.json.gz"))]
    return {network: arrays for file in files for network, arrays in file.items()}


@functools.cache
def stored_torch_values() -> dict[str, np.ndarray]:
    """{"NAME values": (taps, images, ...), "NAME output": (images, classes), "NAME statistics": int8} of each case."""
    values: dict[str, np.ndarray] = {}
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path) as arrays:
            values |= arrays
    return values


@functools.cache
def small_torch_network(name: str) -> tuple[Classifier, dict[str, Any]]:
    """The small version of a case, with the variables that the stored values are of."""
    module = CASES[name].create()
    statistics = unpack_statistics(module, stored_torch_values()[f"{name} statistics"])
    return module, torch_variables(module, statistics)


def torch_variables(module: Classifier, statistics: dict[str, np.ndarray]) -> dict[str, Any]:
    """Random variables that a state dict can hold: with the constants that PyTorch's networks do not have as arrays."""
    variables = random_variables(module, statistics=statistics)
    for slot, constant in constants(module):
        put(variables, slot, np.broadcast_to(np.asarray(constant, slot.dtype), slot.shape))
    return variables


def measure_torch(name: str, packed: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What PyTorch computes for a case, of the state dict that fzoo makes, loaded strictly."""
    import torch

    case = CASES[name]
    module = case.create()
    if packed is None:
        statistics = measured_statistics(module, torch_variables(module, {}))
    else:
        statistics = unpack_statistics(module, packed)
    variables = torch_variables(module, statistics)
    network = case.build().eval()
    arrays = {key: torch.from_numpy(value) for key, value in state_dict(module, variables, case.library).items()}
    left_out = network.load_state_dict(arrays, strict=not module.torch_unused)
    assert all(key.startswith(module.torch_unused) for key in left_out.missing_keys), left_out
    found: dict[str, np.ndarray] = {}

    def keep(layer: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            channels_last = output.permute(0, 2, 3, 1) if output.ndim == 4 else output
            found[layer] = channels_last.numpy().copy()

        return hook

    modules = dict(network.named_modules())
    for layer, inside in case.taps.items():
        modules[inside].register_forward_hook(keep(layer))
    with torch.no_grad():
        output = network(torch.from_numpy(images_for(module, 2).transpose(0, 3, 1, 2).copy())).numpy()
    return {
        f"{name} values": np.stack([summarise(layer, found[layer]) for layer in case.taps]).astype(np.float32),
        f"{name} output": output,
        f"{name} statistics": pack_statistics(module, statistics),
    }


def arrays_of(library: str, name: str) -> dict[str, list[int]]:
    """Ask a library that is installed for the names and shapes of a network's arrays; none is made."""
    import torch

    with torch.device("meta"):
        if library == "timm":
            from timm import create_model

            network = create_model(name)
        else:
            from torchvision import models

            network = models.get_model(name)
    return {key: list(value.shape) for key, value in network.state_dict().items() if not key.endswith(COUNTER)}


def family_of(model: str) -> str:
    """Return the name of a model's family."""
    return fzoo.spec(model).family.__name__


def write(family: str) -> None:
    """Ask the libraries for the networks of a family."""
    FOLDER.mkdir(exist_ok=True)
    values: dict[str, np.ndarray] = {}
    for name, case in CASES.items():
        if family_of(case.model) == family:
            values |= measure_torch(name)
    np.savez_compressed(FOLDER / f"{family.lower()}.npz", **values)
    arrays: dict[str, dict[str, list[int]]] = {}
    for name in dict.fromkeys(
        timm_name(model) for model in fzoo.list_models(tagged=True) if family_of(model) == family
    ):
        arrays[f"timm {name}"] = arrays_of("timm", name)
        if name in TORCHVISION:
            arrays[f"torchvision {name}"] = arrays_of("torchvision", TORCHVISION[name])
    text = json.dumps(arrays, sort_keys=True).encode()
    (FOLDER / f"{family.lower()}.json.gz").write_bytes(gzip.compress(text, mtime=0))


if __name__ == "__main__":
    for family in sys.argv[1:] or sorted({family_of(case.model) for case in CASES.values()}):
        write(family)
