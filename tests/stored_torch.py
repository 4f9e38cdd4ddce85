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
    )
}

#: Torchvision's names of the networks that have tags, by timm's, where both have them.
TORCHVISION = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"wide_resnet{depth}_2": f"wide_resnet{depth}_2" for depth in (50, 101)},
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
