"""A network as a model of ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, PyTree

from fzoo.inference.onnx.graph import OnnxGraph, constant
from fzoo.inference.onnx.rules import RULES
from fzoo.inference.onnx.writer import OnnxWriter
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.types import Variables
from fzoo.zoo import preprocess_input


def onnx_model(
    module: nn.Module,
    variables: Variables,
    images: jax.ShapeDtypeStruct,
    preprocess: str | None = None,
    layers: Sequence[str] = (),
) -> Any:
    """Write a network and its weights as a model of ONNX: an `onnx.ModelProto`.

    Args:
        module: the network.
        variables: its variables, as NumPy arrays.
        images: shape and dtype of what it takes; the batch may be open.
        preprocess: the model or the mode whose `preprocess_input` comes first, if any.
        layers: whose outputs the model gives, if not its own.

    Raises:
        ValueError: what ONNX, or this way to it, has no form for.
        ModuleNotFoundError: onnx is not installed.
    """
    graph = OnnxGraph()
    if isinstance(module, Classifier) and module.prepared and module.prepared.tiles:
        raise ValueError(
            "a network with kernels prepared for this package's CPU form given: "
            'optimize_for_inference(..., platform="cuda") prepares for others'
        )

    def network(variables: Variables, images: Array) -> PyTree:
        images = images if preprocess is None else preprocess_input(images, preprocess)
        return results(module, variables, images, layers)

    jaxpr, shapes = jax.make_jaxpr(network, return_shape=True)(variables, images)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    arrays = [constant(leaf, "/".join(str(step.key) for step in path[1:])) for path, leaf in leaves]
    taken = graph.input("images", tuple(images.shape), images.dtype)
    outputs = OnnxWriter(graph, RULES, type(module).__name__).jaxpr(jaxpr.jaxpr, jaxpr.consts, [*arrays, taken])
    return graph.model(dict(zip(layers or output_names(module, shapes), outputs, strict=True)))


def results(module: nn.Module, variables: Variables, images: Array, layers: Sequence[str]) -> PyTree:
    """Call a network, each concatenation on its own: what is tapped does not grow in a buffer."""
    if not isinstance(module, Classifier):
        return module.apply(variables, images)
    joined = [node.name for node in trace(module).nodes if node.kind == "Concatenate"]
    if layers:
        outputs: Any = module.apply(variables, images, (*layers, *joined), method="endpoints")
        return [outputs[name] for name in layers]
    run: Any = module.apply(variables, images, taps=joined, method="run")
    return run[0]


def output_names(module: nn.Module, shapes: PyTree) -> list[str]:
    """Name the outputs of a network: what they are, the layers that made them, or the keys of what a module gives."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    if isinstance(shapes, dict) or not isinstance(module, Classifier):
        return [jax.tree_util.keystr(path, simple=True, separator="/") or "output" for path in paths]
    if len(paths) > 1 or module.keras_graph is not None:
        return list(trace(module).outputs)
    if not module.include_top:
        return ["features"]
    return ["probabilities" if module.classifier_activation is not None else "logits"]
