"""Keras's layouts of files, written: the three that `files.py` reads; which names they go by."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from fzoo.files import check_parent
from fzoo.weights.files import HEADER_LIMIT, KEY

#: Whose names and layout a file of safetensors has; "torch" is timm's, or torchvision's where timm has no such network.
Layout = Literal["keras", "torch", "timm", "torchvision"]

#: Whose layouts are written.
KERAS_VERSION = "3.15.0"


def write_names(group: h5py.Group, attribute: str, names: Iterable[str]) -> None:
    """Write names, the way back: one attribute, or as many as HDF5's limit needs."""
    encoded = np.array([n.encode() for n in names], dtype=np.bytes_)
    chunks = [encoded]
    while max(chunk.nbytes for chunk in chunks) > HEADER_LIMIT:
        chunks = np.array_split(encoded, len(chunks) + 1)
    if len(chunks) == 1:
        group.attrs[attribute] = encoded
    else:
        for i, chunk in enumerate(chunks):
            group.attrs[f"{attribute}{i}"] = chunk


@dataclasses.dataclass(frozen=True)
class SavedLayer:
    """A layer to write.

    Attributes:
        name: Keras's name.
        kind: its Keras class in snake case.
        arrays: its arrays by name, in Keras's order.
        parts: the layers inside, of a Sequential; `arrays` has theirs, too, as "part/array".
        random: whether Keras keeps the state of a random number generator with it.
    """

    name: str
    kind: str
    arrays: Mapping[str, np.ndarray]
    parts: tuple[SavedLayer, ...] = ()
    random: bool = False


def write_legacy(path: Path, layers: Sequence[SavedLayer], description: str, configuration: str = "") -> None:
    """Write a legacy h5: every layer in the network's order, those without weights, too.

    With the configuration of the model, it is that of a whole one.
    """
    with h5py.File(path, "w") as file:
        file.attrs[KEY] = np.bytes_(description)
        root = file
        if configuration:
            file.attrs["model_config"] = configuration.encode()
            root = file.create_group("model_weights")
        for group in {file, root}:
            group.attrs["backend"] = np.bytes_("jax")
            group.attrs["keras_version"] = np.bytes_(KERAS_VERSION)
        write_names(root, "layer_names", [layer.name for layer in layers])
        for layer in layers:
            group = root.create_group(layer.name)
            write_names(group, "weight_names", [f"{layer.name}/{array}" for array in layer.arrays])
            for array, value in layer.arrays.items():
                group[f"{layer.name}/{array}"] = value
        write_names(root.create_group("top_level_model_weights"), "weight_names", [])


def write_keras3(path: Path, layers: Sequence[SavedLayer], description: str, configuration: str = "") -> None:
    """Write a `.weights.h5`, which has no configuration: layers under the names of their classes, counted."""
    with h5py.File(path, "w") as file:
        file.attrs[KEY] = np.bytes_(description)
        file.create_group("vars").attrs["name"] = "functional"
        write_group(file, layers)


def write_group(root: h5py.Group, layers: Sequence[SavedLayer]) -> None:
    """Write the layers of a network, or of a Sequential in it."""
    counts: Counter[str] = Counter()
    for layer in layers:
        number = counts[layer.kind]
        counts[layer.kind] += 1
        group = root.create_group(f"layers/{layer.kind}_{number}" if number else f"layers/{layer.kind}")
        own = group.create_group("vars")
        own.attrs["name"] = layer.name
        if layer.parts:
            write_group(group, layer.parts)
            continue
        for i, value in enumerate(layer.arrays.values()):
            own[str(i)] = value
        if layer.random:
            group["seed_generator/vars/0"] = np.zeros(2, np.uint32)
            group["seed_generator/vars"].attrs["name"] = "seed_generator"


def write_archive(path: Path, layers: Sequence[SavedLayer], description: str, configuration: str = "") -> None:
    """Write a `.keras` archive; without a configuration, of weights alone."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        weights = Path(folder, "model.weights.h5")
        write_keras3(weights, layers, description)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", json.dumps({"keras_version": KERAS_VERSION}))
            if configuration:
                archive.writestr("config.json", configuration)
            archive.write(weights, "model.weights.h5")


#: (path, layers, description, configuration of the model).
Writer = Callable[[Path, Sequence[SavedLayer], str, str], None]

#: How a file is written, by the end of its name; the first that fits.
WRITERS: dict[str, Writer] = {
    ".weights.h5": write_keras3,
    ".h5": write_legacy,
    ".hdf5": write_legacy,
    ".keras": write_archive,
}


def check_destination(path: str | os.PathLike, layout: Layout = "keras") -> None:
    """Look at the name that `save_variables` is given, before what goes there is read or computed.

    Raises:
        ValueError: no file of this layout ends so.
        FileNotFoundError: there is no such directory.
    """
    suffix = Path(path).suffix
    if layout != "keras" and suffix != ".safetensors":
        raise ValueError(f"{path}: a name that ends in .safetensors expected for layout={layout!r}")
    if suffix not in ("", ".orbax", ".safetensors"):
        keras_writer(path)
    check_parent(Path(path))


def keras_writer(path: str | os.PathLike) -> Writer:
    """Return what writes the layout of Keras's that a file's name ends in; ValueError where it is none."""
    for ending, writer in WRITERS.items():
        if Path(path).name.endswith(ending):
            return writer
    raise ValueError(
        f"{path}: a name that ends in {', '.join(WRITERS)} expected (save_variables: .safetensors, .orbax)"
    )
