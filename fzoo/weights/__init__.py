"""Keras's weights files, in and out."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np

from fzoo.files import replacing
from fzoo.layers.classifier import Classifier
from fzoo.layers.conventions import snake_case
from fzoo.layers.graph import trace
from fzoo.layers.record import Node
from fzoo.weights.description import Description, check_same, describe, parse
from fzoo.weights.ending import check_activation, read_ending
from fzoo.weights.files import WeightsMismatch, open_layers
from fzoo.weights.formats import (
    described_orbax,
    described_safetensors,
    load_orbax,
    load_safetensors,
    save_orbax,
    save_safetensors,
)
from fzoo.weights.graph import Plan
from fzoo.weights.mapping import Slot, below_top, check_variables, match, own_preprocessing, slots
from fzoo.weights.rewrite import keras3_configuration, plans_of, saved_layers
from fzoo.weights.whole import match_plan
from fzoo.weights.writers import WRITERS, SavedLayer

__all__ = [
    "WeightsMismatch",
    "check_fit",
    "load_keras_weights",
    "load_planned",
    "load_variables",
    "save_keras_weights",
    "save_variables",
]


def load_variables(module: Classifier, path: str | os.PathLike) -> dict[str, Any]:
    """Read a network's variables from a file of any kind that `save_variables` writes, strictly.

    Args:
        module: the network, from `fzoo.create`.
        path: `.safetensors`, the directory of an Orbax checkpoint, a Keras file (see `load_keras_weights`), or the
            folder of a fine-tuning.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a damaged file, or one of another network: by its arrays, or by what fzoo wrote of it.
    """
    path = weights_file(path)
    if kind(path) == "keras":
        return load_keras_weights(module, path)
    slots(module)  # before the file: what is no plain network of this package is not the file's fault
    description = read_description(path)
    check_same(description, module)
    load = {"safetensors": load_safetensors, "orbax": load_orbax}[kind(path)]
    if description is None or module.include_top or not description.options.get("include_top"):
        return load(module, path)
    whole = type(module)(**description.options_of(type(module)))
    return below_top(module, whole, load(whole, path))


def read_description(path: str | os.PathLike) -> Description | None:
    """What a file says of its network, if `save_variables` wrote it; None otherwise.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a damaged file.
    """
    path = weights_file(path)
    if kind(path) == "safetensors":
        return parse(described_safetensors(path), str(path))
    if kind(path) == "orbax":
        return parse(described_orbax(path), str(path))
    with open_layers(path) as contents:
        return parse(contents.description, str(path))


def weights_file(path: str | os.PathLike) -> Path:
    """The weights at a path: of the folder of a fine-tuning, its `model.h5`; otherwise the path itself.

    Raises:
        ValueError: the fine-tuning has not finished.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        return path
    if not (path / "model.h5").exists():
        raise ValueError(f"the run in {path} has not finished: `fzoo finetune ... --out {path} --resume` goes on")
    return path / "model.h5"


def kind(path: str | os.PathLike) -> str:
    """How what lies at a path is read: "safetensors" and "orbax" by its name or what it holds, otherwise "keras"."""
    if Path(path).suffix == ".safetensors":
        return "safetensors"
    return "orbax" if Path(path, "_CHECKPOINT_METADATA").exists() else "keras"


def save_variables(module: Classifier, variables: Any, path: str | os.PathLike) -> None:
    """Write a network's variables; the end of the name says how. The file appears under its name when it is whole.

    It carries the network's options, by which `fzoo.load` makes the network again; an activation that is a function of
    the user's own is left out, and asked for then.

    Args:
        module: the network.
        variables: {"params": ..., "batch_stats": ...}.
        path: `.h5`, `.weights.h5` and `.keras` are Keras's (see `save_keras_weights`); `.safetensors` names its arrays
            "params.conv1_conv.kernel"; a name that ends in `.orbax` or has no ending becomes the directory of an Orbax
            checkpoint.

    Raises:
        FileExistsError: a checkpoint is to be written over something.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: another ending, variables that are not this network's, or an option that no file can hold.
        OSError: the file can't be written.
    """
    suffix = Path(path).suffix
    if suffix not in ("", ".orbax", ".safetensors"):
        save_keras_weights(module, variables, path)
        return
    check_variables(module, variables)
    if suffix == ".safetensors":
        save_safetensors(variables, path, describe(module))
    else:
        save_orbax(variables, path, describe(module))


def load_keras_weights(module: Classifier, path: str | os.PathLike) -> dict[str, Any]:
    """Read a network's variables from a file that Keras wrote.

    Strict: every array of the network must be in the file, with its shape, and nothing may be left over, except the
    top of a file with a top when the network has none. Otherwise nothing is loaded. A warning says what else the file
    has and the network lacks: the rest of a larger model, layers that preprocess.

    Args:
        module: the network, from `fzoo.create`.
        path: legacy `.h5` (weights or whole model), `.weights.h5` or `.keras`, or the folder of a fine-tuning.

    Returns:
        {"params": ..., "batch_stats": ...} for `module.apply`, float32 arrays on the default device.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: not a Keras file, a damaged one, or one of another network (`WeightsMismatch`, which names the
            arrays that don't fit).
    """
    path = weights_file(path)
    slots(module)  # before the file: what is no plain network of this package is not the file's fault
    if module.keras_graph is not None:
        return load_planned(module, plans_of(module.keras_graph.source), path)
    with open_layers(path) as contents:
        description = parse(contents.description, str(path))
        check_same(description, module)
        ending = read_ending(path) if description is None and module.include_top else None
        if ending is not None and ending.classes == module.classes:
            check_activation(ending, module.classifier_activation, path)
        whole = module
        if description is not None and not module.include_top and description.options.get("head"):
            whole = type(module)(**description.options_of(type(module)))  # with a head that is not the family's
        found = match(whole, contents, str(path))
        variables = variables_of(found.pairs)
    if found.within:
        left_out = ", ".join(found.left_out) or "nothing"
        warnings.warn(f"{path}: its layer {found.within} was loaded; left out: {left_out}", stacklevel=2)
    if more := (found.preprocessing or Counter()) - own_preprocessing(module):
        layers = " and ".join(f"{number} {name} layer{'s'[: number > 1]}" for name, number in sorted(more.items()))
        warnings.warn(
            f"{path} has {layers} more than this {type(module).__name__}, left out: pixels are not preprocessed so",
            stacklevel=2,
        )
    return variables if whole is module else below_top(module, whole, variables)


def load_planned(module: Classifier, plans: Sequence[Plan], path: str | os.PathLike) -> dict[str, Any]:
    """Read the variables of a network from the file whose configuration describes it."""
    slots(module)
    with open_layers(path) as contents:
        return variables_of(match_plan(module, plans, contents.layers, str(path)))


def variables_of(pairs: Iterable[tuple[Slot, h5py.Dataset]]) -> dict[str, Any]:
    """Read the arrays of a file into a tree of variables, on the default device."""
    variables: dict[str, Any] = {"params": {}}
    for slot, array in pairs:
        at = variables
        for key in slot.path[:-1]:
            at = at.setdefault(key, {})
        at[slot.path[-1]] = read(array, slot)
    return jax.device_put(variables)


def check_fit(module: Classifier, path: str | os.PathLike) -> None:
    """Look whether a Keras file holds a network's arrays, by their number and shapes; none is read.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `load_keras_weights`.
    """
    slots(module)
    with open_layers(path) as contents:
        match(module, contents, str(path))


def preprocessing_in(module: Classifier, path: str | os.PathLike) -> Counter[str] | None:
    """How many layers that preprocess ("rescaling", "normalization") a Keras file lists of a network that fits it.

    None if it doesn't list layers without arrays, as for a model in a model in a legacy h5.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `load_keras_weights`.
    """
    with open_layers(path) as contents:
        return match(module, contents, str(path)).preprocessing


def read(array: h5py.Dataset, slot: Slot) -> np.ndarray | np.generic:
    """An array of a file as its variable."""
    value = np.asarray(array)
    if value.dtype == "V2":  # what HDF5 makes of Keras's bfloat16
        value = value.view(jnp.bfloat16)
    with np.errstate(all="ignore"):  # any bits may be in a file
        if np.issubdtype(slot.dtype, np.integer):  # a count of images, which no result depends on
            value = np.clip(np.nan_to_num(value.astype(np.float64)), 0, np.iinfo(slot.dtype).max)
        return value.astype(slot.dtype, copy=False).reshape(slot.shape)


def save_keras_weights(module: Classifier, variables: Any, path: str | os.PathLike) -> None:
    """Write a network's variables as a file that Keras reads by `model.load_weights(path)`.

    A network from `load_model`, or one that `transfer` made of it, is written with its configuration, where the layout
    has one: `keras.models.load_model` opens it, whatever wrote the file that it came from. Regularizers, constraints
    and initialisers are kept only if that was Keras 3.

    The file appears under its name when it is whole: a kill or a full disk leaves what was there before.

    Args:
        module: the network.
        variables: {"params": ..., "batch_stats": ...}.
        path: its end says the layout: `.weights.h5` for Keras 3's, `.h5` for the legacy one that Keras 2 reads, too,
            `.keras` for an archive, which holds weights alone if the network is from `create` or `load`
            (`load_weights` takes it, `keras.models.load_model` does not).

    Raises:
        ValueError: another ending, variables that are not this network's, or a layer that Keras 3 does not have.
        OSError: the file can't be written.
    """
    name = Path(path).name
    write = next((writer for ending, writer in WRITERS.items() if name.endswith(ending)), None)
    if write is None:
        raise ValueError(
            f"{path}: a name that ends in {', '.join(WRITERS)} expected (save_variables: .safetensors, .orbax)"
        )
    description = describe(module) if isinstance(module, Classifier) else ""  # `check_variables` refuses others
    arrays: dict[str, dict[Slot, np.ndarray]] = {}
    for slot, value in check_variables(module, variables):
        arrays.setdefault(slot.layer, {})[slot] = to_keras(value, slot)
    configuration = ""
    if module.keras_graph is None:
        layers = [saved(node, arrays.get(node.name, {})) for node in trace(module).layers]
    else:
        model = keras3_configuration(module, module.keras_graph)
        layers, configuration = saved_layers(plans_of(module.keras_graph.source), arrays), json.dumps(model)
    with replacing(path) as temporary:
        write(temporary, layers, description, configuration)


def saved(node: Node, arrays: dict[Slot, np.ndarray]) -> SavedLayer:
    """A layer as it is written."""
    parts = tuple(
        SavedLayer(part.name, snake_case(part.kind), {s.array: a for s, a in arrays.items() if s.part == part.name})
        for part in node.parts
    )
    named = {slot.name: array for slot, array in arrays.items()}
    random = node.kind == "Dropout" and node.config["rate"] > 0
    return SavedLayer(node.name, snake_case(node.kind), named, parts, random)


def to_keras(value: Any, slot: Slot) -> np.ndarray:
    """A variable as Keras keeps it."""
    dtype = np.int32 if np.issubdtype(slot.dtype, np.integer) else np.float32
    return np.asarray(value, dtype).reshape(slot.keras_shape)
