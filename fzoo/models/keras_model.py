"""A network that is data: the graph that a Keras file describes, walked over the same layers as the families'."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from fzoo.files import one_line
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.keras import Layers
from fzoo.layers.rules import RULES
from fzoo.layers.steps import Graph

#: How many values a layer may give for an image; what is beyond it is damage.
MAX_VALUES = 1 << 31


class KerasModel(Classifier):
    """The network of a file that Keras wrote, from `fzoo.load_model`.

    Attributes:
        graph: its layers, as data.
    """

    graph: Graph = Graph((), (), ())

    min_size = 1

    @property
    def shared_layers(self) -> frozenset[str]:
        """The layers that are called more than once."""
        return self.graph.shared

    def forward(self, k: Layers, x: Float[Array, "n h w c"]) -> Float[Array, "n ..."]:
        """Apply the steps of the graph."""
        outputs: list[Array] = []
        classifier = self.graph.classifier
        for number, step in enumerate(self.graph.steps):
            if step.kind == "InputLayer":
                outputs.append(k.input(x, name=step.name))
                continue
            options: dict[str, Any] = dict(step.options)
            if number == classifier:
                options["activation"] = self.probabilities
            inputs = [outputs[i] for i in step.inputs]
            try:
                y = RULES[step.kind].apply(k, *inputs, name=step.name, **options)
            except (TypeError, ValueError, IndexError, ZeroDivisionError) as e:  # JAX's, of shapes
                shapes = ", ".join(str(("N", *x.shape[1:])) for x in inputs)
                raise ValueError(f"{step.name} ({step.kind}) of {shapes}: {one_line(e)}") from e
            if math.prod(y.shape[1:]) > MAX_VALUES:
                raise ValueError(f"{step.name} ({step.kind}): its output {('N', *y.shape[1:])} is too large")
            outputs.append(y)
        return outputs[self.graph.outputs[0]]


def keras_model(graph: Graph, dtype: Any = jnp.float32) -> KerasModel:
    """Make the module of a graph.

    Raises:
        ValueError: its layers do not fit each other.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ValueError(f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs, one of each expected")
    activation = None if graph.classifier is None else dict(graph.steps[graph.classifier].options)["activation"]
    module = KerasModel(graph=graph, input_shape=graph.inputs[0], classifier_activation=activation, dtype=dtype)
    try:
        classes = trace(module).nodes[-1].shape[-1]
    except (TypeError, ValueError) as e:  # JAX's, of shapes
        raise ValueError(f"its layers do not fit each other: {one_line(e)}") from e
    return module.clone(classes=classes)
