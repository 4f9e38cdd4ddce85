"""Keras's weights files, in and out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fzoo.layers import Classifier, trace
from fzoo.weights.files import WeightsMismatch, open_layers, write_legacy
from fzoo.weights.mapping import check_variables, match, slots

__all__ = ["WeightsMismatch", "load_keras_weights", "save_keras_weights"]


def load_keras_weights(module: Classifier, path: str | os.PathLike) -> dict[str, Any]:
    """Read a network's variables from a file that Keras wrote.

    Strict: every array of the network must be in the file, with its shape, and nothing may be left over, except the
    top of a file with a top when the network has none. Otherwise nothing is loaded.

    Args:
        module: the network, from `fzoo.create`.
        path: legacy `.h5` (weights or whole model), `.weights.h5` or `.keras`.

    Returns:
        {"params": ..., "batch_stats": ...} for `module.apply`, float32 arrays on the default device.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: not a Keras file, a damaged one, or one of another network (`WeightsMismatch`, which names the
            arrays that don't fit).
    """
    variables: dict[str, Any] = {"params": {}}
    slots(module)  # before the file: what is no plain network of this package is not the file's fault
    with open_layers(path) as layers:
        for slot, array in match(module, layers, str(path)):
            at = variables
            for key in slot.path[:-1]:
                at = at.setdefault(key, {})
            value = np.asarray(array)
            if value.dtype == "V2":  # what HDF5 makes of Keras's bfloat16
                value = value.view(jnp.bfloat16)
            at[slot.path[-1]] = value.astype(slot.dtype, copy=False).reshape(slot.shape)
    return jax.device_put(variables)


def save_keras_weights(module: Classifier, variables: Any, path: str | os.PathLike) -> None:
    """Write a network's variables as a legacy h5, which Keras reads by `model.load_weights(path)`.

    The file appears under its name when it is whole; until then, what was there stays.

    Args:
        module: the network.
        variables: {"params": ..., "batch_stats": ...}.
        path: a name that ends in `.h5` (not `.weights.h5`, for which Keras expects its newer layout).

    Raises:
        ValueError: another ending, or variables that are not this network's.
        OSError: the file can't be written.
    """
    name = Path(path).name
    if not name.endswith((".h5", ".hdf5")) or name.endswith(".weights.h5"):
        raise ValueError(
            f"{path}: a name that ends in .h5 expected, and not in .weights.h5: the legacy layout is written"
        )
    layers: dict[str, dict[str, np.ndarray]] = {node.name: {} for node in trace(module).nodes}
    for slot, value in check_variables(module, variables):
        layers[slot.layer][slot.array] = np.asarray(value, np.float32).reshape(slot.keras_shape)
    write_legacy(path, layers)
