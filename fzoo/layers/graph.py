"""What follows from a network's layers, as one abstract call shows them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import KeyPath
from jaxtyping import Array

from fzoo.layers.abstract import Trace, trace_call
from fzoo.layers.classifier import Classifier
from fzoo.layers.record import narrow_nodes
from fzoo.types import MutableVariables


def trace(module: Classifier, shape: tuple[int, int, int] | None = None) -> Trace:
    """Call the network abstractly (no arithmetic is done) and read the record.

    Args:
        module: the network.
        shape: (height, width, channels) of the image; by default that of `module.example_inputs`.

    Raises:
        ValueError: this is no network of this package, or it does not take such an image.
    """
    if not isinstance(module, Classifier):
        raise ValueError(f"a module from fzoo.create expected, {type(module).__name__} given")
    return trace_call(module, shape)


def check_classifier(module: Classifier) -> None:
    """Raise ValueError unless a network takes images alone and gives one vector for each."""
    traced = trace(module)
    by_name = {node.name: node for node in traced.nodes}
    takes = [node.shape for node in traced.nodes if node.kind == "InputLayer"]
    gives = [by_name[name].shape for name in traced.outputs]
    if len(takes) != 1 or len(gives) != 1 or len(gives[0]) != 1:
        shapes = (", ".join(map(str, shapes)) for shapes in (takes, gives))
        raise ValueError(
            "a network from {} to {} given, one from images to a vector of classes expected".format(*shapes)
        )


#: Classes that leave one number of each channel's map, and what may stand between a pooling that does and the top.
REDUCTIONS, PASSING = ("GlobalAveragePooling2D", "GlobalMaxPooling2D"), ("AveragePooling2D", "Dropout", "Model")


def last_map(traced: Trace) -> str | None:
    """Name the layer with the last feature map: all that comes after it is the top.

    It is the last of the layers through which everything passes whose output is a map over the image, or, where the
    image is so small that it has become a single place, the last before the pooling. None where there is no such layer.
    """
    if len(traced.outputs) != 1:
        return None
    narrow = narrow_nodes(traced.nodes)
    wide = [i for i, node in enumerate(narrow) if len(node.shape) == 3 and max(node.shape[:2]) > 1]
    if not wide:
        return None
    last = wide[-1]
    for node in narrow[last + 1 :]:
        if node.kind in REDUCTIONS or len(node.shape) != 3:
            break
        last += 1
    while max(narrow[last].shape[:2]) == 1 and narrow[last].kind in PASSING:
        last -= 1
    return narrow[last].name


def random_variables(module: Classifier, rng: Array) -> MutableVariables:
    """Make variables as Keras initialises them, drawn on the host, so that nothing has to be compiled.

    Of the same distributions as `module.init(rng, images)`, but not the same numbers. For a key that a transformation
    traces (`jax.vmap` over seeds), the program calls the host: the numbers are those that the key gives outside.
    """
    if not isinstance(rng, (jax.Array, np.ndarray)):
        raise ValueError(f"rng={rng!r} given, a key expected: jax.random.key(0)")
    is_key = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(rng) if is_key else rng
    if rng.ndim != 1 - is_key:
        raise ValueError(f"rng of shape {rng.shape} given, one key expected: jax.vmap takes several")
    traced = trace(module)
    draw = functools.partial(draw_variables, traced)
    if isinstance(data, Tracer):
        return jax.pure_callback(draw, traced.variables, data, vmap_method="sequential")
    return jax.device_put(draw(data))


def draw_variables(traced: Trace, data: Array | np.ndarray) -> MutableVariables:
    """Draw the variables of a network by the numbers of a key, as NumPy arrays."""
    known = {node.name: node for top in traced.nodes for node in (top, *top.parts)}
    generator = np.random.default_rng(np.asarray(data).ravel().tolist())

    def draw(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [step.key for step in path]
        node = next(known[key] for key in reversed(keys) if key in known)
        if keys[-1] == "kernel":
            return node.kernel_init.draw(generator, leaf.shape).astype(leaf.dtype, copy=False)
        value = node.config["init"] if keys[-1] == "gamma" else keys[-1] in ("scale", "var")
        return np.full(leaf.shape, value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, traced.variables)


def layer_names(module: Classifier) -> list[str]:
    """List every Keras layer of the network, the input and those without weights too, in Keras's order.

    `layer_names(module)[249]` is the name of Keras's `model.layers[249]`.
    """
    gone = dict(module.prepared.gone) if isinstance(module, Classifier) and module.prepared else {}
    return [node.name for node in trace(module).layers if node.name not in gone]


def layer_shapes(module: Classifier, size: int | tuple[int, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Find the shape of every layer's output without computing it, in Keras's order of layers.

    Args:
        module: from `fzoo.create`, `fzoo.load`, `fzoo.load_model`, ...
        size: (height, width) of the images in pixels, or one number for both; by default the network's own.

    Returns:
        {layer: shape of its output for one image, (h, w, c) of a feature map}.

    Raises:
        ValueError: the network does not take images of this size, or has several inputs.
    """
    shape = None
    if size is not None:
        if isinstance(module.example_inputs, tuple):
            raise ValueError(f"size={size!r} given, which goes with one input: this network has several")
        height, width = size if isinstance(size, tuple) else (size, size)
        shape = int(height), int(width), module.example_shape[2]
        module.check_images((1, *shape))
    gone = dict(module.prepared.gone) if module.prepared else {}
    return {node.name: node.shape for node in trace(module, shape).layers if node.name not in gone}
