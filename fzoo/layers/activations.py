"""Keras's names of activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from fzoo.errors import unknown

Activation = str | Callable[[Array], Array] | None


def hard_sigmoid_of_keras_2(x: Array) -> Array:
    """Compute what Keras called hard_sigmoid up to its version 2: clip(0.2 x + 0.5, 0, 1), where 3 has x / 6."""
    return jnp.clip(0.2 * x + 0.5, 0, 1)


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
    "hard_sigmoid_of_keras_2": hard_sigmoid_of_keras_2,
    "hard_tanh": nn.hard_tanh,
    "exponential": jnp.exp,
    "softsign": nn.soft_sign,
    "leaky_relu": functools.partial(nn.leaky_relu, negative_slope=0.2),
    "log_softmax": nn.log_softmax,
    "log_sigmoid": nn.log_sigmoid,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "celu": nn.celu,
    "glu": nn.glu,
    "tanh_shrink": lambda x: x - jnp.tanh(x),
    "hard_shrink": lambda x: jnp.where(jnp.abs(x) > 0.5, x, 0),
    "soft_shrink": lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0),
    "sparse_plus": jax.nn.sparse_plus,
    "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "squareplus": jax.nn.squareplus,
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
