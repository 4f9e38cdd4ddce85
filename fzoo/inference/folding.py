"""A network's form for inference alone: what is linear is folded into kernels, and these lie as a CPU wants them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jaxtyping import PyTree

from fzoo import ops
from fzoo.inference.devices import beside
from fzoo.layers.abstract import Trace
from fzoo.layers.classifier import Classifier
from fzoo.layers.record import Node, Prepared
from fzoo.ops.onednn import has_onednn
from fzoo.types import DTypeLike, MutableVariables, Params

#: Keras classes with a kernel whose last axis is the layer's output channels, and where that kernel is below the layer.
KERNELS = {"Conv2D": (), "DepthwiseConv2D": (), "SeparableConv2D": ("pointwise",), "Dense": ()}


#: Keras classes that pass a factor and a term of each channel through (padding is not counted in an average here).
CHANNELWISE = {"AveragePooling2D", "GlobalAveragePooling2D", "Cropping2D", "Dropout", "Activation", "Model"}


def folded_for_inference(
    module: Classifier, traced: Trace, variables: PyTree, dtype: DTypeLike, tiles: Mapping[str, int]
) -> tuple[Classifier, MutableVariables]:
    """Fold what can be, and keep the kernels of some convolutions transformed; see `optimize_for_inference`.

    Args:
        module, variables: the plain network.
        traced: its record.
        dtype: of the computation.
        tiles: {convolution: tile of Winograd's algorithm}.
    """
    nodes = traced.nodes
    original, variables = variables, unfreeze(variables)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables["params"])
    stats = jax.tree.map(np.asarray, variables.get("batch_stats", {}))
    biased, folded, scaled, gone = set(), set(), set(), {}
    by_name = {node.name: node for node in nodes}
    readers = Counter(name for node in nodes for name in node.inputs) + Counter(traced.outputs)
    calls = Counter(node.variables for node in nodes)
    for node in nodes:
        if node.kind not in ("BatchNormalization", "LayerScale") or node.variables != node.name:
            continue
        scale, shift = scale_and_shift(node, params.pop(node.name, {}), stats.get(node.name))
        parts = linear_parts(node.inputs[0], by_name, readers, calls) if calls[node.name] == 1 else None
        if parts is None and node.kind == "LayerScale":
            params[node.name] = {"gamma": scale.astype(np.float32)}
            continue
        if parts is None:
            params[node.name] = {"scale": scale.astype(np.float32), "bias": shift.astype(np.float32)}
            scaled.add(node.name)
            continue
        start = 0
        for part, between in parts:
            end = start + part.shape[-1]
            fold(params, part, scale[start:end], shift[start:end])
            start = end
            biased.add(part.name)
            gone.update(dict.fromkeys([part.name, *between], node.name))
        folded.add(node.name)
    for name, tile in tiles.items():
        params[name] = {**params[name], "kernel": ops.winograd_kernel(params[name]["kernel"], tile)}
    prepared = Prepared(
        frozenset(biased), frozenset(folded), frozenset(scaled), tuple(tiles.items()), tuple(gone.items())
    )
    left = {"params": cast_kernels(params, dtype) | {name: params[name] for name in tiles}}
    if constants := {
        node.name: stats[node.name] for node in nodes if node.kind == "Normalization" and node.name in stats
    }:
        left["batch_stats"] = constants
    return module.clone(dtype=dtype, param_dtype=jnp.float32, prepared=prepared), beside(left, original)


#: Of what is computed in bfloat16, convolutions with so many bytes of float32 outputs for an image are transformed.
LARGE = 5 << 19


def winograd_tiles(nodes: Sequence[Node], dtype: DTypeLike) -> dict[str, int]:
    """Return the tile for each layer whose kernel is to be kept transformed: one for all of its calls.

    In bfloat16, products are faster than in float32, and those of the largest images, which fall out of the caches,
    are not, where oneDNN is not there for them.
    """
    convolutions: dict[str, list[ops.Convolution | None]] = {}
    for node in nodes:
        if node.kind == "Conv2D":
            convolutions.setdefault(node.variables, []).append(node.config.get("convolution"))
    tiles = {}
    for name, calls in convolutions.items():
        sizes = {conv and prepared_tile(conv, dtype) for conv in calls}
        if len(sizes) == 1 and (tile := sizes.pop()):
            tiles[name] = tile
    return tiles


def prepared_tile(conv: ops.Convolution, dtype: DTypeLike) -> int | None:
    """Return the tile for which a kernel is to be kept transformed; None for not at all.

    Args:
        conv: of one image, in float32, as a record has it.
        dtype: of the computation.
    """
    own = dataclasses.replace(conv, dtype=jnp.dtype(dtype))
    large = own.dtype == jnp.float32 or (
        4 * conv.pixels * conv.outputs >= LARGE and not (ops.is_fast_in_onednn(own) and has_onednn())
    )
    return ops.winograd_tile(conv) if large and ops.is_winograd(conv, prepared=True) else None


def cast_kernels(variables: PyTree, dtype: DTypeLike) -> PyTree:
    """Give every kernel of a tree a dtype; biases, scales and statistics keep theirs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path[-1].key == "kernel" else leaf, variables
    )


def scale_and_shift(node: Node, params: Params, stats: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return what a BN or a LayerScale does in inference, in float64: x * scale + shift."""
    if node.kind == "LayerScale":
        return params["gamma"].astype(np.float64), np.zeros(params["gamma"].shape)
    scale = 1 / np.sqrt(stats["var"].astype(np.float64) + node.config["epsilon"])
    scale = scale * params["scale"] if "scale" in params else scale
    return scale, params.get("bias", 0) - stats["mean"] * scale


def linear_parts(
    name: str, by_name: dict[str, Node], readers: Counter[str], calls: Counter[str]
) -> list[tuple[Node, list[str]]] | None:
    """Find the layers whose outputs, side by side, are this layer's channels; None if there is more to it than that.

    With each, the names of the layers on the way from it to here.

    Args:
        name: of the layer.
        by_name: all of them.
        readers: how many read each; the network's own outputs are read, too.
        calls: how often each layer with variables is called.
    """
    node = by_name[name]
    if readers[name] != 1 or node.config.get("activation", "linear") != "linear":
        return None
    if node.kind in KERNELS:
        return [(node, [])] if calls[node.variables] == 1 else None
    if node.kind not in CHANNELWISE and (node.kind, node.config.get("axis")) != ("Concatenate", -1):
        return None
    if sum(by_name[parent].shape[-1] for parent in node.inputs) != node.shape[-1]:  # not side by side as channels
        return None
    parts = []
    for parent in node.inputs:
        of_parent = linear_parts(parent, by_name, readers, calls)
        if of_parent is None:
            return None
        parts += [(part, [*between, name]) for part, between in of_parent]
    return parts


def fold(params: dict[str, Any], node: Node, scale: np.ndarray, shift: np.ndarray) -> None:
    """Multiply a layer's kernel, and give it a bias, so that its output is scaled and shifted."""
    layer = params[node.name] = dict(params[node.name])
    for key in KERNELS[node.kind]:
        layer[key] = dict(layer[key])
        layer = layer[key]
    layer["kernel"] = (layer["kernel"] * scale).astype(np.float32)
    layer["bias"] = (layer.get("bias", 0) * scale + shift).astype(np.float32)
