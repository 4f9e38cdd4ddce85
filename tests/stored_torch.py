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
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from networks import images_for, measured_statistics, random_variables
from stored import pack_statistics, summarise, unpack_statistics

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.weights.state_dict import COUNTER, state_dict, torch_name

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


INCEPTION_TAPS = {"mixed2": "Mixed_5d", "mixed4": "Mixed_6b", "mixed9": "Mixed_7b"}

RESNET_TAPS = {"pool1_pool": "maxpool", "conv3_block2_out": "layer2.1", "conv5_block1_out": "layer4.0"}

VGG_CONVS = (1, 1, 2, 1, 1)
VGG_TAPS = {"block2_pool": "features.5", "block3_conv2": "features.9", "block5_pool": "features.16"}

DENSENET_TAPS = {
    "pool1": "features.pool0",
    "conv3_block2_1_conv": "features.denseblock2.denselayer2.conv1",
    "pool4_pool": "features.transition3.pool",
}

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
    return module, random_variables(module, statistics=statistics)


def measure_torch(name: str, packed: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What PyTorch computes for a case, of the state dict that fzoo makes, loaded strictly."""
    import torch

    case = CASES[name]
    module = case.create()
    if packed is None:
        statistics = measured_statistics(module, random_variables(module, statistics={}))
    else:
        statistics = unpack_statistics(module, packed)
    variables = random_variables(module, statistics=statistics)
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
    for node in trace(module).nodes:
        if "epsilon" in node.config:  # no tolerance tells 1.001e-5 from 1e-5
            inside = torch_name(node.name, module.torch_names()[case.library])[0]
            assert np.isclose(node.config["epsilon"], modules[inside].eps, 1e-6, 0), node.name
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

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of Inception's initial weights, which are not made
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
