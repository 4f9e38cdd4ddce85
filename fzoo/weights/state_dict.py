"""State dicts of PyTorch, in and out: timm's and torchvision's names and layouts of the families' arrays.

A family says what a library calls its layers (`Classifier.torch_names`), in rules; everything else is said here: the
names of a layer's arrays, and that PyTorch keeps kernels as (out, in, height, width) and dense ones as (out, in).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from fzoo.errors import unknown
from fzoo.files import missing, one_line
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.record import Node
from fzoo.types import MutableVariables, Variables
from fzoo.weights.arrays import safetensors_arrays
from fzoo.weights.files import KEY, WeightsMismatch
from fzoo.weights.foreign import describe_foreign
from fzoo.weights.formats import open_safetensors
from fzoo.weights.mapping import Slot, below_top, check_variables, names_with_top, put, slots, with_top

#: PyTorch's names of a layer's arrays, by Keras's; a layer that is one array ("LayerScale") has its name.
ARRAYS = {
    "kernel": ".weight",
    "bias": ".bias",
    "gamma": ".weight",
    "beta": ".bias",
    "moving_mean": ".running_mean",
    "moving_variance": ".running_var",
}

#: Of each BatchNorm: how many batches it was trained with, which nothing depends on.
COUNTER = ".num_batches_tracked"

#: The endings of files that `torch.save` wrote.
TORCH_ENDINGS = (".pth", ".pt", ".bin")

#: Where training scripts keep the arrays among other things, the averaged ones first.
INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model")

#: Arrays by PyTorch's names: NumPy's, tensors of PyTorch's on the CPU, or what gives their numbers when it is read.
StateDict = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of a network is in a state dict.

    Attributes:
        slot: the array.
        shape: as PyTorch keeps it.
        form: how it is kept: "kernel" (out, in, height, width), "flat kernel" a dense one as if it were such,
            "linear" (out, in), "flattened" the same of a flattened (channels, height, width), or "vector".
        map: (height, width, channels) of the feature map that a dense kernel's rows are of.
    """

    slot: Slot
    shape: tuple[int, ...]
    form: str
    map: tuple[int, int, int]

    def to_variable(self, array: np.ndarray) -> np.ndarray:
        """Turn an array of the state dict into the variable's layout."""
        height, width, channels = self.map
        if self.form == "flattened":
            array = array.reshape(-1, channels, height, width)
        if self.form in ("kernel", "flat kernel", "flattened"):
            array = array.transpose(2, 3, 1, 0)
        elif self.form == "linear":
            array = array.T
        return np.ascontiguousarray(array.reshape(self.slot.shape), dtype=self.slot.dtype)

    def from_variable(self, value: ArrayLike) -> np.ndarray:
        """Turn a variable into the state dict's layout."""
        array = np.asarray(value)
        if self.form in ("kernel", "flat kernel", "flattened"):
            height, width, channels = self.map
            if self.form != "kernel":
                array = array.reshape(height, width, channels, -1)
            array = array.transpose(3, 2, 0, 1)
        elif self.form == "linear":
            array = array.reshape(array.shape[-2:]).T
        return np.ascontiguousarray(array.reshape(self.shape), dtype=np.float32)


@contextlib.contextmanager
def open_torch_arrays(path: Path) -> Iterator[StateDict]:
    """Open a state dict in a file, of safetensors or of `torch.save`.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ModuleNotFoundError: what reads it is not installed.
        ValueError: a damaged file, or one that holds no state dict.
    """
    with (safetensors_arrays if path.suffix == ".safetensors" else open_state_dict)(path) as arrays:
        yield arrays


def is_state_dict(path: Path) -> bool:
    """Tell whether a file is a state dict of PyTorch's, by its ending, and of safetensors by what is in it.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a damaged file of safetensors.
    """
    if path.suffix != ".safetensors":
        return path.suffix in TORCH_ENDINGS
    with open_safetensors(path) as file:
        is_described, names = KEY in (file.metadata() or {}), list(file.keys())
    return not is_described and not any(name.startswith(("params.", "batch_stats.")) for name in names)


def places(module: Classifier, library: str) -> dict[str, Place]:
    """Return where each array of a network is in a library's state dict, by its name there.

    Arrays that are constants there are left out (`Classifier.torch_constants`).

    Raises:
        ValueError: the library has no such network.
    """
    names = module.torch_names()
    if library not in names:
        verb = "has" if len(names) == 1 else "have"
        have = f", {' and '.join(names)} {verb} it" if names else ": neither timm's nor torchvision's names are known"
        raise ValueError(f"{library} has no such {type(module).__name__}{have}")
    nodes = {node.name: node for node in trace(module).nodes}
    fixed = {slot.path for slot, _ in constants(module)}
    by_name: dict[str, Place] = {}
    for slot in itertools.chain.from_iterable(slots(module).values()):
        if slot.path in fixed:
            continue
        layer = f"{slot.layer}/{slot.part}" if slot.part else slot.layer
        prefix, kept_as = torch_name(layer, names[library])
        place = place_of(slot, kept_as, flattened_map(nodes, slot))
        name = prefix + ("" if nodes[slot.layer].kind == "LayerScale" else ARRAYS[slot.array])
        if name in by_name:
            raise ValueError(f"{by_name[name].slot.layer} and {layer} are both called {name} by {library}")
        by_name[name] = place
    return by_name


def flattened_map(nodes: Mapping[str, Node], slot: Slot) -> tuple[int, int, int]:
    """Return (height, width, channels) of what a dense kernel's rows are of; 1 x 1 where it was no feature map."""
    before = nodes[nodes[slot.layer].inputs[0]]
    if before.kind == "Flatten" and nodes[slot.layer].kind == "Dense":
        shape = nodes[before.inputs[0]].shape
        if len(shape) == 3:
            return shape[0], shape[1], shape[2]
    return 1, 1, slot.shape[-2] if slot.array == "kernel" else 1


def place_of(slot: Slot, kept_as: str, feature_map: tuple[int, int, int]) -> Place:
    """Return where an array is, by how a rule says that its layer is kept ("", "linear", "conv" or "map")."""
    if slot.array != "kernel":
        shape = (*slot.shape, 1, 1) if kept_as == "map" else slot.shape
        return Place(slot, shape, "vector", feature_map)
    *spatial, rows, out = slot.shape
    if kept_as == "conv":
        height, width, channels = feature_map
        return Place(slot, (out, channels, height, width), "flat kernel", feature_map)
    if spatial and kept_as != "linear":
        return Place(slot, (out, rows, *spatial), "kernel", feature_map)
    form = "linear" if feature_map[:2] == (1, 1) else "flattened"
    return Place(slot, (out, rows), form, feature_map)


def torch_name(layer: str, rules: Mapping[str, str]) -> tuple[str, str]:
    """Return PyTorch's name of a layer, and how it is kept, by the rule that fits it.

    Raises:
        ValueError: none does, or several.
    """
    matches = ((re.fullmatch(pattern, layer), rule) for pattern, rule in rules.items())
    fitting = [(fit, rule) for fit, rule in matches if fit]
    if len(fitting) != 1:
        raise ValueError(f"the layer {layer!r} has {len(fitting)} names in a state dict, one expected")
    ((fit, rule),) = fitting
    name, _, kept_as = rule.partition(" as ")

    def filled(place: re.Match[str]) -> str:
        group, less = fit[int(place[1])], place[2]
        if less == "-a":
            return str(functools.reduce(lambda number, letter: 26 * number + ord(letter) - 96, group, 0) - 1)
        return group if less is None else str(int(group) + int(less))

    return re.sub(r"\{(\d)([+-]\d+|-a)?\}", filled, name), kept_as


def variables_of_state_dict(module: Classifier, arrays: StateDict, source: str) -> MutableVariables:
    """Make a network's variables of a state dict, strictly: each array is used once, or named in the error.

    Left out are the top, where the network has none, and how many batches each BatchNorm was trained with.

    Args:
        module: the network.
        arrays: by PyTorch's names: NumPy arrays, tensors of PyTorch on the CPU, or what gives them when it is read.
        source: what the arrays are of, for errors.

    Returns:
        {"params": ..., "batch_stats": ...}, float32 arrays on the default device.

    Raises:
        WeightsMismatch: it is of another network; the message names the arrays.
        ValueError: no library that is known has such a network, or an array that is none of numbers.
    """
    fit = fit_state_dict(module, arrays, source)
    tree: MutableVariables = {"params": {}}
    for slot, constant in constants(fit.network):
        put(tree, slot, np.broadcast_to(np.asarray(constant, slot.dtype), slot.shape))
    for name, place in fit.places.items():
        put(tree, place.slot, place.to_variable(read_numbers(arrays[fit.given[name]], name, source)))
    return jax.device_put(tree if fit.network is module else below_top(module, fit.network, tree))


class Fit(NamedTuple):
    """A network found in a state dict.

    Attributes:
        network: the one that was asked for, or the same with its top, which is left out.
        places: of the arrays that are taken.
        given: by the names of those, which are the library's of today: what they are called there.
    """

    network: Classifier
    places: dict[str, Place]
    given: dict[str, str]


def fit_state_dict(module: Classifier, arrays: StateDict, source: str) -> Fit:
    """Find a network's arrays in a state dict; none is read. Raises as `variables_of_state_dict`."""
    if not module.torch_names():
        raise ValueError(f"{source} is a state dict of PyTorch's, and neither library has this {type(module).__name__}")
    used = [name for name in arrays if not name.endswith(COUNTER) and not name.startswith(module.torch_unused)]
    given: dict[str, str] = {}
    for name in used:
        if (before := given.setdefault(todays_name(module, name), name)) != name:
            raise WeightsMismatch(f"{source} has an array twice", [f"{before} and {name}"])
    network, library, expected = nearest_network(module, set(given))
    kept = set(slots(module) if network is module else names_with_top(module, network).values())
    problems = [f"{name} is left over" for today, name in sorted(given.items()) if today not in expected]
    for name, place in expected.items():
        if name not in given:
            problems.append(f"{name} {place.shape} is missing")
        elif place.slot.layer in kept and tuple(np.shape(arrays[given[name]])) != place.shape:
            problems.append(f"{given[name]} is {tuple(np.shape(arrays[given[name]]))}, {place.shape} wanted")
    if problems:
        hint = classes_hint(module, expected, arrays, problems)
        summary = f"{source} does not fit this {type(module).__name__}{hint}, by {library}'s names"
        raise WeightsMismatch(summary, problems)
    return Fit(network, {name: place for name, place in expected.items() if place.slot.layer in kept}, given)


def todays_name(module: Classifier, name: str) -> str:
    """Return what the library calls an array today, of a file that may be older."""
    for before, now in module.torch_renamed:
        name = re.sub(before, now, name)
    return name


def classes_hint(module: Classifier, expected: dict[str, Place], arrays: StateDict, problems: list[str]) -> str:
    """Return what would do, where all but the classifier fits."""
    *_, last = slots(module)
    of_last = [name for name, place in expected.items() if place.slot.layer == last and name in arrays]
    if (
        not module.include_top
        or not of_last
        or not all(p.startswith(tuple(f"{n} is (" for n in of_last)) for p in problems)
    ):
        return ""
    return f": it has {np.shape(arrays[of_last[0]])[0]} classes, {module.classes} wanted"


def nearest_network(module: Classifier, names: set[str]) -> tuple[Classifier, str, dict[str, Place]]:
    """Return the network that arrays of these names are nearest to: a module that a library has, or that with its top.

    Returns:
        (network, library, places in the library's state dict).
    """
    networks = [module] if module.include_top else [module, with_top(module)]
    candidates = [(net, library, places(net, library)) for net in networks for library in module.torch_names()]
    return max(candidates, key=lambda candidate: (len(candidate[2].keys() & names), -len(candidate[2].keys() - names)))


def constants(module: Classifier) -> list[tuple[Slot, float | tuple[float, ...]]]:
    """Return the arrays of a network that PyTorch's libraries do not have, with their values."""
    all_slots = itertools.chain.from_iterable(slots(module).values())
    names = [(slot, f"{slot.layer}/{slot.name}") for slot in all_slots]
    return [(slot, module.torch_constants[name]) for slot, name in names if name in module.torch_constants]


def read_numbers(array: Any, name: str, source: str) -> np.ndarray:
    """Return an array's values.

    Raises:
        ValueError: they can't be had, or are no real numbers.
    """
    try:
        values = np.asarray(array)
    except (TypeError, RuntimeError) as e:  # a tensor on another device, or one that is traced for gradients
        raise ValueError(f"{source}: {name} is no array: {one_line(e)}") from e
    if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
        raise ValueError(f"{source}: {name} is of {values.dtype}, numbers expected")
    return values


def state_dict(module: Classifier, variables: Variables, library: str = "torch") -> dict[str, np.ndarray]:
    """Return a network's variables as a state dict, float32, which the library loads strictly.

    Args:
        module: the network.
        variables: {"params": ..., "batch_stats": ...}.
        library: "timm", "torchvision", or "torch" for the one that has the network, timm where both have it.

    Raises:
        ValueError: the library has no such network, or the variables are not this network's.
    """
    check_library(library)
    if library == "torch":
        library = next(iter(module.torch_names()), "timm")
    values = {slot.path: value for slot, value in check_variables(module, variables)}
    for slot, constant in constants(module):
        if slot.array != "count" and not np.allclose(values[slot.path], constant, 1e-5):
            raise ValueError(f"{slot.layer}/{slot.name} is {np.asarray(values[slot.path])}, {constant} in {library}")
    return {name: place.from_variable(values[place.slot.path]) for name, place in places(module, library).items()}


def import_torch() -> ModuleType:
    """Return PyTorch.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError("PyTorch is not installed: pip install 'fzoo[torch]'") from None
    return torch


@contextlib.contextmanager
def open_state_dict(path: Path) -> Iterator[StateDict]:
    """Open a file that `torch.save` wrote: its arrays by their names. No code of it is run.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ModuleNotFoundError: PyTorch is not installed.
        ValueError: it is no such file, a damaged one, or one that holds more than arrays.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, a file expected")
    if not path.exists():
        raise missing("weights file", path)
    torch = import_torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle, zipfile, and PyTorch's own reader raise many classes
        if "weights_only" in str(e) or "Weights only" in str(e):
            raise ValueError(
                f"{path} holds more than arrays (objects, or code, which is not run): save its state_dict() alone"
            ) from e
        kind = describe_foreign(path)
        known = kind is not None and not kind.startswith(("a Python pickle", "a PyTorch file"))
        reason = f"it is {kind}" if known else one_line(e)
        raise ValueError(f"{path} is not a readable file of torch.save: {reason}") from e
    yield arrays_inside(loaded, path)


def arrays_inside(loaded: Any, path: Path) -> StateDict:
    """Find the state dict in what a file of PyTorch holds, as training scripts write it.

    Raises:
        ValueError: it has none, or several.
    """
    if isinstance(loaded, Mapping):
        inside = [key for key in INSIDE if isinstance(loaded.get(key), Mapping)]
        if len(inside) > 1:
            raise ValueError(f"{path} holds {' and '.join(inside)}: load one of them by torch, and pass it as weights=")
        if inside:
            loaded = loaded[inside[0]]
    if not isinstance(loaded, Mapping) or not loaded or not all(hasattr(value, "shape") for value in loaded.values()):
        raise ValueError(f"{path} holds no state dict: a mapping from names to arrays expected")
    if all(name.startswith("module.") for name in loaded):  # of DataParallel
        return {name.removeprefix("module."): value for name, value in loaded.items()}
    return dict(loaded)


def check_library(library: str) -> None:
    """Raise ValueError unless this is a layout of a state dict."""
    if library not in ("torch", "timm", "torchvision"):
        raise ValueError(unknown("layout", library, ("torch", "timm", "torchvision")))
