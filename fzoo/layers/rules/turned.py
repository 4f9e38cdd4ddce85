"""Steps of a network whose images had the channels first, as they are where the channels are last."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from fzoo.layers.keras import Layers
from fzoo.layers.rules.options import RULES, Plain

#: Where the axes of (N, channels, height, width) are in (N, height, width, channels).
AXES = {1: 3, 2: 1, 3: 2, -1: 2, -2: 1, -3: 3}

#: Classes with an axis, or axes, that mean the same once they are counted anew.
COUNTED = ("BatchNormalization", "GroupNormalization", "Softmax", "Concatenate", "UnitNormalization", "Normalization")

#: Classes that compute each value of the values at its place.
SAME_PLACE = frozenset(
    (
        *("Model", "Activation", "ReLU", "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Identity"),
        *("CustomScaleLayer", "Dropout", "GaussianNoise", "GaussianDropout", "AlphaDropout", "ActivityRegularization"),
    )
)


def turn_step(
    k: Layers, kind: str, options: dict[str, Plain], arrays: Sequence[Array], layout: str | None
) -> tuple[dict[str, Plain], list[Array]]:
    """Return the options and inputs of a step whose file has the channels first.

    Args:
        k: the layers of this forward pass.
        kind: of the step.
        options: of the step, as the file has them.
        arrays: its inputs, whose images have the channels last.
        layout: what the layer's own data_format says; None where it has none.

    Raises:
        ValueError: the axes of images decide what it computes, and it is none of those that are turned.
    """
    arrays = list(arrays)
    if kind == "Flatten":
        if arrays[0].ndim == 4 and layout != "channels_first":  # Keras's puts the channels last if it is told of them
            arrays[0] = k.operation(lambda x: jnp.transpose(x, (0, 3, 1, 2)), arrays[0])
        if arrays[0].ndim == 3 and layout == "channels_first":
            raise ValueError("a sequence whose channels are first is not taken")
        return options, arrays
    if kind == "Reshape" and len(options["target_shape"]) == 3:
        raise ValueError("a Reshape to images whose channels are first is not taken")
    if all(x.ndim != 4 for x in arrays):
        return options, arrays
    if kind in COUNTED:
        axis = options["axis"]
        turned = tuple(AXES.get(n, 0) for n in axis) if isinstance(axis, tuple) else AXES.get(axis, 0)
        return {**options, "axis": turned}, arrays
    is_spatial = kind in RULES and "data_format" in RULES[kind].options
    if is_spatial and kind != "Dropout" and layout != "channels_first":
        raise ValueError("data_format='channels_last' given, in a network whose other layers have the channels first")
    if not is_spatial and kind not in SAME_PLACE and RULES[kind].function is None:
        raise ValueError("it is not turned to images whose channels are last")
    return options, arrays
