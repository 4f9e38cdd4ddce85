"""What is known of a network's layers: the record of a call, and how a form for inference differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fzoo.layers.initializers import VarianceScaling
from fzoo.types import Options

#: `Node.kind` of what a Keras file says by an operator (`x + y`): a step of the graph, but no layer.
OPERATION = "Operation"


@dataclasses.dataclass(frozen=True)
class Node:
    """One Keras layer of a network, as one call of it saw it.

    Attributes:
        name: Keras's name, e.g. "block1_conv1".
        kind: Keras's class, e.g. "Conv2D"; `OPERATION` for a step between layers.
        inputs: names of the layers that feed it, in the order of its arguments.
        shape: of its output, without the batch.
        flops: analytic, for one image: 2 for each multiply-add of convolutions and dense layers, otherwise 0.
        kernel_init: how its kernels start.
        config: options of the layer where something asks for them: "activation" of a layer with weights,
            "convolution" (an `ops.Convolution`, one image) of a Conv2D or a DepthwiseConv2D, "depthwise" and
            "pointwise" (the same) of a SeparableConv2D, "epsilon" of a normalization, "pool" (an
            `ops.Pool`), "padding", "strides" (with the network's `output_stride`, what is applied), "max_value" of a
            ReLU; and "rate" of what drops in training (Dropout, StochasticDepth), "init" of a LayerScale.
        parts: the layers inside of a Sequential, in their order.
        variables: the name under which its variables lie: its own, but for a later call of a shared layer, "name:1".
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    flops: int
    kernel_init: VarianceScaling
    config: Options
    parts: tuple[Node, ...] = ()
    variables: str = ""


def narrow_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Find the nodes through which everything passes, of all that are in an order of execution."""
    narrow, reach = [], 0  # and the furthest reader so far
    furthest = {parent: i for i, node in enumerate(nodes) for parent in node.inputs}
    for place, node in enumerate(nodes):
        if reach <= place:
            narrow.append(node)
        reach = max(reach, furthest.get(node.name, 0))
    return narrow


#: What a program for a CPU may hand to YNNPACK.
FUSIONS = ("nothing", "products", "products and convolutions")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Where a network that `optimize_for_inference` made differs from Keras's.

    Attributes:
        biased: convolutions that got a bias, from the BN folded into them.
        folded: BNs and LayerScales that do nothing any more.
        scaled: BNs that are left: a factor and a term for each channel.
        tiles: (convolution, tile) of the kernels that are kept transformed for Winograd.
        gone: (layer, the layer that has its output now): what can't be tapped any more.
        forms: (convolution, the form of `ops.CPU_FORMS` that is the fastest), where `fzoo.tune` timed them. The name
            is the layer's, of the parts of a SeparableConv2D "layer/depthwise" and "layer/pointwise". They change the
            time that a CPU takes, and the last digits.
        fusions: with them, what a program is to hand to YNNPACK, of `FUSIONS`; None for what is usual.
    """

    biased: frozenset[str] = frozenset()
    folded: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()
    tiles: tuple[tuple[str, int], ...] = ()
    gone: tuple[tuple[str, str], ...] = ()
    forms: tuple[tuple[str, str], ...] = ()
    fusions: str | None = None
