"""A network's layers, their order and variables, read from one abstract call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fzoo.layers.classifier import Classifier
from fzoo.layers.record import OPERATION, Node


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one abstract call of a network shows.

    Attributes:
        nodes: the calls of its Keras layers, and the operations between them, each after those that feed it; where each
            layer is called once, they are in Keras's order of `model.layers`.
        variables: its variables as `jax.ShapeDtypeStruct`s.
        outputs: the names of the nodes whose outputs are the network's.
        order: the names of its layers in Keras's order, where that is not the order of the nodes.
    """

    nodes: tuple[Node, ...]
    variables: dict[str, Any]
    outputs: tuple[str, ...]
    order: tuple[str, ...] = ()

    @functools.cached_property
    def layers(self) -> list[Node]:
        """The Keras layers alone, each once, in the order of `model.layers`."""
        first: dict[str, Node] = {}
        for node in self.nodes:
            if node.kind != OPERATION and (node.variables not in first or node.name == node.variables):
                first[node.variables] = node
        return [first[name] for name in self.order or first if name in first]

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """How many each node has, by its name; BN statistics count, as in Keras."""
        trees = self.variables.values()
        return {
            node.name: sum(leaf.size for tree in trees for leaf in jax.tree.leaves(tree.get(node.name)))
            for node in self.nodes
        }


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
    unbound: Any = module.clone(parent=None, name=None)  # a bound module can't be hashed
    return _trace(unbound, shape, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=128)
def _trace(module: Classifier, shape: tuple[int, int, int] | None, x64: bool) -> Trace:
    """Do what `trace` does, by all that it depends on: dtypes of variables differ with `x64`."""
    found: list[Node] = []
    outputs: list[str] = []

    def call(x):
        (y, k), variables = module.init_with_output(jax.random.key(0), x, record=True, method="run")
        found.extend(k.nodes.values())
        outputs.extend(k.makers(y))
        return variables

    inputs = module.example_inputs if shape is None else jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(call, inputs)
    nodes = tuple(keras_order(found, outputs))
    return Trace(nodes, variables, tuple(outputs), module.keras_graph.layers if module.keras_graph else ())


def keras_order(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    """Sort a network's layers as Keras does.

    Deepest first, the depth being the longest way to an output; among equals, the one that a walk from
    the outputs, inputs in order, meets first. `nodes` come in an order of execution. What leads to no output is left
    out, but for inputs, which come first.
    """
    by_name = {node.name: node for node in nodes}
    depth = dict.fromkeys(outputs, 0)
    for node in reversed(nodes):
        for parent in node.inputs if node.name in depth else ():
            depth[parent] = max(depth.get(parent, 0), depth[node.name] + 1)
    met: dict[str, int] = {}
    stack = [*reversed(outputs)]
    while stack:
        name = stack.pop()
        if name not in met:
            met[name] = len(met)
            stack.extend(reversed(by_name[name].inputs))
    unread = [node for node in nodes if node.kind == "InputLayer" and node.name not in met]
    return unread + [by_name[name] for name in sorted(met, key=lambda n: (-depth[n], met[n]))]


def check_classifier(module: Classifier) -> None:
    """Raise ValueError unless a network takes images alone and gives one vector for each."""
    found = trace(module)
    by_name = {node.name: node for node in found.nodes}
    takes = [node.shape for node in found.nodes if node.kind == "InputLayer"]
    gives = [by_name[name].shape for name in found.outputs]
    if len(takes) != 1 or len(gives) != 1 or len(gives[0]) != 1:
        shapes = (", ".join(map(str, shapes)) for shapes in (takes, gives))
        raise ValueError(
            "a network from {} to {} given, one from images to a vector of classes expected".format(*shapes)
        )


#: Classes that leave one number of each channel's map, and what may stand between a pooling that does and the top.
REDUCTIONS, PASSING = ("GlobalAveragePooling2D", "GlobalMaxPooling2D"), ("AveragePooling2D", "Dropout", "Model")


def last_map(found: Trace) -> str | None:
    """Name the layer with the last feature map: all that comes after it is the top.

    It is the last of the layers through which everything passes whose output is a map over the image, or, where the
    image is so small that it has become a single place, the last before the pooling. None where there is no such layer.
    """
    if len(found.outputs) != 1:
        return None
    narrow = narrow_places(found)
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


def narrow_places(found: Trace) -> list[Node]:
    """List the nodes through which everything passes, in their order."""
    narrow, reach = [], 0  # the furthest reader so far
    furthest = {parent: i for i, node in enumerate(found.nodes) for parent in node.inputs}
    for i, node in enumerate(found.nodes):
        if reach <= i:
            narrow.append(node)
        reach = max(reach, furthest.get(node.name, 0))
    return narrow


def random_variables(module: Classifier, rng: Array) -> dict[str, Any]:
    """Make variables as Keras initialises them, drawn on the host, so that nothing has to be compiled.

    Of the same distributions as `module.init(rng, images)`, but not the same numbers.
    """
    if not isinstance(rng, (jax.Array, np.ndarray)):
        raise ValueError(f"rng={rng!r} given, a key expected: jax.random.key(0)")
    found = trace(module)
    known = {node.name: node for top in found.nodes for node in (top, *top.parts)}
    data = jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
    generator = np.random.default_rng(np.asarray(data).ravel().tolist())

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [step.key for step in path]
        node = next(known[key] for key in reversed(keys) if key in known)
        if keys[-1] == "kernel":
            return node.kernel_init.draw(generator, leaf.shape)
        value = node.config["init"] if keys[-1] == "gamma" else keys[-1] in ("scale", "var")
        return np.full(leaf.shape, value, leaf.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, found.variables))


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
        height, width = (size, size) if isinstance(size, Integral) else size
        shape = int(height), int(width), module.example_shape[2]
        module.check_images((1, *shape))
    gone = dict(module.prepared.gone) if module.prepared else {}
    return {node.name: node.shape for node in trace(module, shape).layers if node.name not in gone}
