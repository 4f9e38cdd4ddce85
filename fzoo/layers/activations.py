"""Keras's names of activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array

from fzoo.errors import unknown

Activation = str | Callable[[Array], Array] | None


#: Keras's names of activations. `None` and "linear" are the identity.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": jax.jit(nn.relu),  # Flax's is traced anew at each call
    "relu6": nn.relu6,
    "sigmoid": nn.sigmoid,
    "softmax": nn.softmax,
    "softplus": nn.softplus,
    "tanh": nn.tanh,
    "silu": nn.silu,
    "swish": nn.silu,
    "elu": nn.elu,
    "selu": nn.selu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "hard_sigmoid": nn.hard_sigmoid,
    "hard_silu": nn.hard_silu,
    "hard_swish": nn.hard_silu,
}


def activation_function(activation: Activation) -> Callable[[Array], Array]:
    """Return the function for a Keras activation: a name, a callable, or None for the identity.

    Raises:
        ValueError: the name is not one of Keras's.
    """
    if activation is None:
        return ACTIVATIONS["linear"]
    if callable(activation):
        return activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(unknown("activation", activation, ACTIVATIONS))
    return ACTIVATIONS[activation]


def name_of(activation: Activation) -> str:
    """Return Keras's name of an activation, "custom" for a callable: a record that held one would keep a module alive.

    The classifier's own is a method of a module in the middle of a trace, with all of the trace's arrays.
    """
    return activation if isinstance(activation, str) else "linear" if activation is None else "custom"
