"""A network's layers, their order and variables, read from one abstract call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
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
        nodes: its Keras layers, in Keras's order of `model.layers`, and the operations between them.
        variables: its variables as `jax.ShapeDtypeStruct`s.
    """

    nodes: tuple[Node, ...]
    variables: dict[str, Any]

    @property
    def layers(self) -> list[Node]:
        """The Keras layers alone: `model.layers`."""
        return [node for node in self.nodes if node.kind != OPERATION]

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """How many each node has, by its name; BN statistics count, as in Keras."""
        trees = self.variables.values()
        return {
            node.name: sum(leaf.size for tree in trees for leaf in jax.tree.leaves(tree.get(node.name)))
            for node in self.nodes
        }


def trace(module: Classifier) -> Trace:
    """Call the network abstractly (no arithmetic is done) and read the record.

    Raises:
        ValueError: this is no network of this package.
    """
    if not isinstance(module, Classifier):
        raise ValueError(f"a module from fzoo.create expected, {type(module).__name__} given")
    unbound: Any = module.clone(parent=None, name=None)  # a bound module can't be hashed
    return _trace(unbound, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=128)
def _trace(module: Classifier, x64: bool) -> Trace:
    """Do what `trace` does, by all that it depends on: dtypes of variables differ with `x64`."""
    found: list[Node] = []

    def call(x):
        (_, k), variables = module.init_with_output(jax.random.key(0), x, record=True, method="run")
        found.extend(k.nodes.values())
        return variables

    variables = jax.eval_shape(call, jax.ShapeDtypeStruct((1, *module.example_shape), jnp.float32))
    return Trace(tuple(keras_order(found)), variables)


def keras_order(nodes: Sequence[Node]) -> list[Node]:
    """Sort a network's layers as Keras does.

    Deepest first, the depth being the longest way to the output; among equals, the one that a walk from
    the output, inputs in order, meets first. `nodes` come in an order of execution, the output last.
    """
    by_name = {node.name: node for node in nodes}
    depth = {nodes[-1].name: 0}
    for node in reversed(nodes):
        for parent in node.inputs:
            depth[parent] = max(depth.get(parent, 0), depth.get(node.name, 0) + 1)
    met: dict[str, int] = {}
    stack = [nodes[-1].name]
    while stack:
        name = stack.pop()
        if name not in met:
            met[name] = len(met)
            stack.extend(reversed(by_name[name].inputs))
    return [by_name[name] for name in sorted(met, key=lambda n: (-depth[n], met[n]))]


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
