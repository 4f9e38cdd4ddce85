"""One abstract call of a network: its layers, their order and variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fzoo.layers.record import OPERATION, Node
from fzoo.types import MutableVariables


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
    variables: MutableVariables
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


def trace_call(module: Any, shape: tuple[int, int, int] | None = None) -> Trace:
    """Call a network abstractly (no arithmetic is done), on an image of a shape or its example, and read the record."""
    unbound = module.clone(parent=None, name=None)  # a bound module can't be hashed
    return _trace(unbound, shape, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=128)
def _trace(module: Any, shape: tuple[int, int, int] | None, x64: bool) -> Trace:
    """Do what `trace_call` does, by all that it depends on: dtypes of variables differ with `x64`."""
    recorded: list[Node] = []
    outputs: list[str] = []

    def call(x):
        (y, k), variables = module.init_with_output(jax.random.key(0), x, record=True, method="run")
        recorded.extend(k.nodes.values())
        outputs.extend(k.makers(y))
        return variables

    inputs = module.example_inputs if shape is None else jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(call, inputs)
    nodes = tuple(keras_order(recorded, outputs))
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
