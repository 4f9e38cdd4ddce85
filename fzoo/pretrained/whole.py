"""The network that a Keras file describes, whatever a user built."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fzoo.models.keras_model import KerasModel, keras_model
from fzoo.weights.config import read_configuration
from fzoo.weights.graph import Plan, build_graph
from fzoo.zoo import VARIANTS


def network_in(
    path: str | os.PathLike, dtype: Any = jnp.float32, custom_objects: Mapping[str, Callable[..., Any]] | None = None
) -> tuple[KerasModel, tuple[Plan, ...]]:
    """Make the network that a Keras file holds, and the plan of its weights, of which none is read.

    Raises as `load_model`.
    """
    configuration = read_configuration(path)
    if configuration is None:
        raise ValueError(f"{path} has weights alone, without the model they belong to: fzoo.load(NAME, weights=...)")
    try:
        graph, plans = build_graph(configuration, custom_objects)
        return keras_model(graph, dtype), plans
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def is_whole_model(name: Any) -> bool:
    """Tell whether this is the path of a file, and not the name of a model."""
    return isinstance(name, (str, os.PathLike)) and name not in VARIANTS and os.path.isfile(name)
