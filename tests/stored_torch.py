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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from networks import images_for, measured_statistics, random_variables
from stored import pack_statistics, summarise, unpack_statistics

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.weights.state_dict import COUNTER, state_dict

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


REGNET = {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 40), "group_width": 8}

RESNET_TAPS = {"pool1_pool": "maxpool", "conv3_block2_out": "layer2.1", "conv5_block1_out": "layer4.0"}

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
    **{f"wide_resnet{depth}_2": f"wide_resnet{depth}_2" for depth in (50, 101)},
    **{
        f"regnet{kind}_{size}": f"regnet_{kind}_{flops}"
        for kind, sizes in (
            ("x", {"004_tv": "400mf", "008": "800mf", "080": "8gf"}),
            ("y", {"004": "400mf", "008_tv": "800mf", "080_tv": "8gf"}),
        )
        for size, flops in {**sizes, "016": "1_6gf", "032": "3_2gf", "160": "16gf", "320": "32gf"}.items()
    },
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
    """Ask a library that is installed for the names and shapes of a network's arrays; few are made."""
    import torch

    with torch.device("cpu" if name.startswith("regnet_") else "meta"):  # torchvision computes its widths by tensors
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
        timm_name(model)
        for model in fzoo.list_models(tagged=True)
        if family_of(model) == family and fzoo.spec(model).is_torch
    ):
        arrays[f"timm {name}"] = arrays_of("timm", name)
        if name in TORCHVISION:
            arrays[f"torchvision {name}"] = arrays_of("torchvision", TORCHVISION[name])
    text = json.dumps(arrays, sort_keys=True).encode()
    (FOLDER / f"{family.lower()}.json.gz").write_bytes(gzip.compress(text, mtime=0))


if __name__ == "__main__":
    for family in sys.argv[1:] or sorted({family_of(case.model) for case in CASES.values()}):
        write(family)
