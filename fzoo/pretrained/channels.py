"""Weights of a network for another number of input channels than they were trained with."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fzoo.errors import unknown
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.types import MutableVariables, Params, Variables
from fzoo.weights.mapping import arrays_of, lookup

#: By name: (kernel (h, w, c, f), channels n) to the kernel (h, w, n, f). Channels that are all equal give what they
#: gave before for "sum", and for "repeat" where n is a multiple of c.
WAYS = {
    "sum": lambda kernel, n: np.repeat(kernel.sum(2, keepdims=True), n, 2) / n,
    "repeat": lambda kernel, n: kernel[:, :, np.arange(n) % kernel.shape[2]] * (kernel.shape[2] / n),
}


def check_adaptation(way: str, input_shape: object) -> None:
    """Raise ValueError unless this is a way to adapt weights, and a shape that says for how many channels."""
    if way not in WAYS:
        raise ValueError(unknown("adapt_channels", way, WAYS))
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3:
        raise ValueError(f"adapt_channels={way!r} goes with input_shape=(height, width, channels)")


def with_channels(
    module: Classifier, variables: Variables, input_shape: tuple[int | None, int | None, int], way: str
) -> tuple[Classifier, MutableVariables]:
    """Change the kernel that reads the images, so that a network takes another number of channels.

    Args:
        module: the network that the variables are of.
        variables: its variables.
        input_shape: (height, width, channels) of the network that is wanted.
        way: "sum" or "repeat"; see `WAYS`.

    Returns:
        (module, variables) of that network.

    Raises:
        ValueError: it has as many channels already, or more than one kernel depends on their number.
    """
    channels, given = input_shape[-1], module.example_shape[-1]
    if channels == given:
        raise ValueError(f"adapt_channels={way!r} given, but the weights are for {given} channels: leave it out")
    adapted = module.clone(input_shape=tuple(input_shape))
    refused = f"adapt_channels={way!r} given, but more than a kernel of {type(module).__name__} depends on the channels"
    try:
        expected = arrays_of(adapted)
    except (TypeError, ValueError) as e:  # JAX's, of constants for each channel
        raise ValueError(f"{refused}: include_preprocessing=False may do") from e
    there = arrays_of(module)
    changed = [keys for keys, leaf in expected.items() if keys not in there or there[keys].shape != leaf.shape]
    kinds = [[node.kind for node in trace(network).nodes] for network in (module, adapted)]
    is_kernel = len(changed) == 1 and changed[0][-1] == "kernel" and len(there) == len(expected)
    if module.prepared or not is_kernel or kinds[0] != kinds[1]:
        raise ValueError(f"{refused}: include_preprocessing=False may do")
    (path,) = changed
    array = lookup(variables, path)
    kernel = WAYS[way](np.asarray(array, np.float32), channels).astype(array.dtype)
    if kernel.shape != expected[path].shape:
        raise ValueError(f"{refused}: {'/'.join(path)} is no convolution of all channels")
    return adapted, with_array(variables, path, jnp.asarray(kernel))


def with_array(tree: Params, path: tuple[str, ...], value: Array) -> MutableVariables:
    """Return a tree of mappings with another array at a path."""
    key, *rest = path
    return {**tree, key: with_array(tree[key], tuple(rest), value) if rest else value}
