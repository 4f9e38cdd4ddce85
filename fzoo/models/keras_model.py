"""A network that is data: the graph that a Keras file describes, walked over the same layers as the families'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fzoo.files import one_line
from fzoo.layers.classifier import Classifier, check_floats
from fzoo.layers.graph import last_map, trace
from fzoo.layers.keras import Layers
from fzoo.layers.rules import RULES, turn_step
from fzoo.layers.steps import Graph
from fzoo.types import DTypeLike
from fzoo.weights.description import Description

#: How many values a layer may give for an image; what is beyond it is damage.
MAX_VALUES = 1 << 31


class KerasModel(Classifier):
    """The network of a file that Keras wrote, from `fzoo.load_model`.

    Where it has several inputs, it takes a tuple of arrays, in the order of the file, or a mapping by their names.
    Where it has several outputs, it gives a tuple.

    Attributes:
        graph: its layers, as data.
        cut: the layer with the last feature map: what comes after it is the top, which `include_top=False` is without.
            None where there is no such layer.
    """

    graph: Graph = Graph((), (), ())
    cut: str | None = None

    min_size = 1

    @nn.nowrap
    def check_options(self) -> None:
        """Check them."""
        super().check_options()
        if not self.include_top and self.cut is None:
            raise ValueError("include_top=False given, but this network has no last feature map to end with")
        if self.head is not None:
            raise ValueError("head given, which goes with fzoo.transfer(module, variables=..., head=...) here")

    @property
    def shared_layers(self) -> frozenset[str]:
        """The layers that are called more than once."""
        return self.graph.shared

    @property
    def micro_batch(self) -> int:
        """How many images a CPU computes together: as measured for networks with depthwise convolutions, or without."""
        return 2 if any(step.kind == "DepthwiseConv2D" for step in self.graph.steps) else Classifier.micro_batch

    @property
    def keras_graph(self) -> Graph:
        """Its layers."""
        return self.graph

    @property
    def stated_shape(self) -> tuple[int | None, int | None, int]:
        """(height, width, channels) of its first input of images: `input_shape`, or what the file says."""
        height, width, channels = next(shape for shape in self.graph.inputs if len(shape) == 3)
        return self.input_shape or (height, width, channels or 3)

    @property
    def example_inputs(self) -> jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]:
        """What a call takes, for one image, as `jax.ShapeDtypeStruct`s: a tuple where there are several inputs."""
        if len(self.graph.inputs) == 1:
            return super().example_inputs
        shapes = [self.example_shape[:2] + shape[2:] if len(shape) == 3 else shape for shape in self.graph.inputs]
        return tuple(jax.ShapeDtypeStruct((1, *(n or 1 for n in shape)), jnp.float32) for shape in shapes)

    @nn.nowrap
    def arrange(self, inputs: PyTree) -> PyTree:
        """Put the arrays of several inputs into their order, as a tuple; what is one array stays as it is.

        Raises:
            ValueError: they are not the inputs of this network.
        """
        names = self.graph.input_names
        if isinstance(inputs, Mapping):
            if inputs.keys() != set(names):
                raise ValueError(f"inputs {', '.join(map(str, inputs))} given, {', '.join(names)} expected")
            inputs = tuple(inputs[name] for name in names)
        if isinstance(inputs, (tuple, list)):
            if len(inputs) != len(names):
                raise ValueError(f"{len(inputs)} inputs given, {len(names)} expected: {', '.join(names)}")
            return tuple(inputs) if len(names) > 1 else inputs[0]
        if len(names) > 1:
            raise ValueError(f"one array given, a tuple or a mapping of {len(names)} expected: {', '.join(names)}")
        return inputs

    @nn.nowrap
    def prepare_inputs(self, x: PyTree) -> PyTree:
        """Check what a call takes, and give it the dtype of the computation."""
        x = self.arrange(x)
        if not isinstance(x, tuple):
            return super().prepare_inputs(x)
        for name, array, expected in zip(self.graph.input_names, x, self.graph.inputs, strict=True):
            fits = array.ndim == len(expected) + 1 and all(
                w in (None, n) for w, n in zip(expected, array.shape[1:], strict=True)
            )
            if not fits or array.shape[0] != x[0].shape[0]:
                sides = ", ".join("any" if n is None else str(n) for n in expected)
                raise ValueError(f"{name} of shape {array.shape} given, ({x[0].shape[0]}, {sides}) expected")
            check_floats(name, array)
        return tuple(jnp.asarray(array, self.dtype) for array in x)

    def forward(self, k: Layers, x: PyTree) -> PyTree:
        """Apply the steps of the graph."""
        ends = self.graph.outputs if self.include_top or self.cut is None else (self.graph.number(self.cut),)
        inputs = iter(x if isinstance(x, tuple) else (x,))
        values: list[Array] = []
        for number, step in enumerate(self.graph.steps[: max(ends) + 1]):
            if step.kind == "InputLayer":
                values.append(k.input(next(inputs), name=step.name))
                continue
            k.number_call(step.name, step.call)
            options: dict[str, Any] = dict(step.options)
            if number == self.graph.classifier:
                options["activation"] = self.probabilities
            arrays = [values[i] for i in step.inputs]
            try:
                if "turned" in options:
                    options, arrays = turn_step(k, step.kind, options, arrays, options.pop("turned"))
                y = RULES[step.kind].apply(k, *arrays, name=step.name, **options)
            except (TypeError, ValueError, LookupError, ArithmeticError) as e:  # JAX's, of shapes
                shapes = ", ".join(str(("N", *x.shape[1:])) for x in arrays)
                raise ValueError(f"{step.name} ({step.kind}) of {shapes}: {one_line(e)}") from e
            if math.prod(y.shape[1:]) > MAX_VALUES:
                raise ValueError(f"{step.name} ({step.kind}): its output {('N', *y.shape[1:])} is too large")
            values.append(y)
        if not self.include_top and self.pooling:
            return self.pooled(k, values[ends[0]], self.pooling)
        return values[ends[0]] if len(ends) == 1 else tuple(values[end] for end in ends)


def of_a_family(description: Description | None) -> Description | None:
    """Return what a file says of its network, where that is of one of fzoo's families; None for a user's own model."""
    return None if description is None or description.family == KerasModel.__name__ else description


def keras_model(graph: Graph, dtype: DTypeLike = jnp.float32) -> KerasModel:
    """Make the module of a graph.

    Raises:
        ValueError: its layers do not fit each other.
    """
    activation = None if graph.classifier is None else dict(graph.steps[graph.classifier].options)["activation"]
    module = KerasModel(graph=graph, classifier_activation=activation, dtype=dtype)
    module = module.clone(input_shape=module.image_shape)
    try:
        traced = trace(module)
    except (TypeError, ValueError, ArithmeticError) as e:  # JAX's, of shapes
        raise ValueError(f"its layers do not fit each other: {one_line(e)}") from e
    shapes = {node.name: node.shape for node in traced.nodes}
    return module.clone(classes=shapes[traced.outputs[0]][-1], cut=last_map(traced))
