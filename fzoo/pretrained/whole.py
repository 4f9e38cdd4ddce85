"""The network that a Keras file describes, whatever a user built."""

from __future__ import annotations

import os
from typing import NamedTuple

import jax.numpy as jnp

from fzoo.files import one_line
from fzoo.models.keras_model import KerasModel, keras_model, of_a_family
from fzoo.types import DTypeLike
from fzoo.weights import kind, read_description, weights_file
from fzoo.weights.config import Configuration, read_configuration
from fzoo.weights.graph import CustomObjects, Plan, build_graph
from fzoo.zoo import VARIANTS


class WholeFile(NamedTuple):
    """What a Keras file describes beside its weights.

    Attributes:
        module: its network; None where that can't be made.
        plans: of its weights.
        problem: what keeps it from being made.
    """

    module: KerasModel | None
    plans: tuple[Plan, ...] = ()
    problem: str = ""


def own_configuration(path: str | os.PathLike) -> Configuration | None:
    """Read the configuration of a whole model; None where a file has weights alone, or is one that fzoo wrote."""
    path = weights_file(path)
    if kind(path) != "keras" or of_a_family(read_description(path)) is not None:
        return None
    return read_configuration(path)


def described_whole(path: str | os.PathLike) -> WholeFile | None:
    """Make the model that a file of weights describes; None where it has weights alone, or is one that fzoo wrote."""
    path = weights_file(path)
    configuration = own_configuration(path)
    if configuration is None:
        return None
    try:
        return WholeFile(*make_network(configuration, path))
    except ValueError as e:
        return WholeFile(None, problem=one_line(e).removeprefix(f"{path}: "))


def network_in(
    path: str | os.PathLike, dtype: DTypeLike = jnp.float32, custom_objects: CustomObjects | None = None
) -> tuple[KerasModel, tuple[Plan, ...]]:
    """Make the network that a Keras file holds, and the plan of its weights, of which none is read.

    Raises as `fzoo.load_model`.
    """
    configuration = read_configuration(path)
    if configuration is None:
        raise ValueError(f"{path} has weights alone, without the model they belong to: fzoo.load(NAME, weights=...)")
    return make_network(configuration, path, dtype, custom_objects)


def make_network(
    configuration: Configuration,
    path: str | os.PathLike,
    dtype: DTypeLike = jnp.float32,
    custom_objects: CustomObjects | None = None,
) -> tuple[KerasModel, tuple[Plan, ...]]:
    """Make the network of a file's configuration; the rest as `network_in`."""
    try:
        graph, plans = build_graph(configuration, custom_objects)
        return keras_model(graph, dtype), plans
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def is_whole_model(name: object) -> bool:
    """Tell whether this is the path of a file, and not the name of a model.

    Raises:
        FileNotFoundError: it is called as Keras's files are, and is not there.
    """
    if not isinstance(name, (str, os.PathLike)) or name in VARIANTS:
        return False
    if not os.path.exists(name) and os.fspath(name).endswith((".h5", ".hdf5", ".keras")):
        raise FileNotFoundError(f"no such file: {name}")
    return os.path.isfile(name)
