"""The layers whose feature maps a detector or a segmenter takes: the last of each size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import last_map, trace
from fzoo.layers.record import Node, narrow_nodes

#: What comes before a layer of the next size, and belongs to it; what is done to pixels.
NO_ENDS = ("InputLayer", "ZeroPadding2D", "Cropping2D", "Rescaling", "Normalization")


class StageEnd(NamedTuple):
    """Where a stage ends: all that is computed at one size of the feature maps.

    Attributes:
        layer: its last layer's name, which `fzoo.features` takes.
        channels: of that layer's output.
    """

    layer: str
    channels: int


def stages(module: Classifier, strides: Sequence[int] = (4, 8, 16, 32)) -> dict[int, StageEnd]:
    """Find the layer at each stride whose output a detector or a segmenter takes.

    It is the last one of that size that ends a block, and that everything after it is computed from. A stride is that
    of a network whose maps halve: a map of 35 x 35 for an image of 299 x 299 has stride 8. (A stage of ConvNeXt ends
    in what Keras's file says by an operator, which is no layer of `fzoo.layer_names`, but is tapped as one.)

    Args:
        module: from `fzoo.create`, `fzoo.load`, `fzoo.load_model`, ..., with its top or without.
        strides: in pixels of the image.

    Returns:
        {stride: (layer, channels)}, in the order of `strides`.

    Raises:
        ValueError: the network has no feature map of one of these strides.
    """
    ends = stage_ends(module)
    for stride in strides:
        if stride not in ends:
            there = ", ".join(map(str, sorted(ends))) or "none"
            raise ValueError(f"stride {stride} given, this {type(module).__name__} has feature maps of stride {there}")
    gone = dict(module.prepared.gone) if module.prepared else {}
    return {
        stride: StageEnd(gone.get(ends[stride].name, ends[stride].name), ends[stride].shape[-1]) for stride in strides
    }


def stage_ends(module: Classifier) -> dict[int, Node]:
    """Return the last node that ends a block, by stride."""
    if isinstance(module.example_inputs, tuple):
        raise ValueError("a network with several inputs given, one of images expected")
    if module.keras_graph is None and not (module.fixed_size and module.own_top):
        side = module.default_size  # a small image's last maps are no true share of it
        module = module.clone(input_shape=(side, side, module.example_shape[2]))
    traced, height = trace(module), module.example_shape[0]
    last, ends = last_map(traced), {}
    for node in traced.nodes if module.block_ends else narrow_nodes(traced.nodes):
        names = (node.name, "last_map") if node.name == last else (node.name,)
        is_end = any(re.fullmatch(module.block_ends, name) for name in names) if module.block_ends else True
        if is_end and len(node.shape) == 3 and node.kind not in NO_ENDS:
            ends[2 ** round(math.log2(height / node.shape[0]))] = node
        if node.name == last:
            break
    return ends
