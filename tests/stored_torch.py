"""What timm's and torchvision's networks are and give, stored so that tests need no PyTorch: `tests/stored/torch/`.

`python tests/stored_torch.py` writes it anew, or what of it is of the families that are named after it (ResNet); it
wants torch, torchvision and timm. The slow tests compare it with those that are installed. For each family,
`resnet.json.gz`: names and shapes of the arrays of each network that has a tag, at full depth; `resnet.npz`: what the
small versions give.
"""

from __future__ import annotations

import functools
import gzip
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from networks import images_for, measured_statistics, random_variables
from stored import pack_statistics, summarise, unpack_statistics
from torch_cases import CASES, TORCHVISION

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.weights.state_dict import COUNTER, constants, put, state_dict, torch_name

FOLDER = Path(__file__).parent / "stored" / "torch"


def timm_name(model: str) -> str:
    """Return what timm calls the network of a model with a tag, by the name of its file."""
    name, _, ending = fzoo.spec(model).weight_files[0].name.partition(".")
    if ending != "pth":
        return name
    (timms,) = (timms for timms, theirs in TORCHVISION.items() if theirs == name.partition("-")[0])
    return timms


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
    """Ask a library that is installed for the names and shapes of a network's arrays; few are made."""
    import torch

    with torch.device("cpu" if name.startswith("regnet_") else "meta"):  # torchvision computes its widths by tensors
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
