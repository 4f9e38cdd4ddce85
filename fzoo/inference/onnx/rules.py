"""Which rule writes which of JAX's primitives."""

from __future__ import annotations

from collections.abc import Callable

from fzoo.inference.onnx import axes, sums, values
from fzoo.inference.onnx.graph import Tensor

#: By the name of a primitive: from (writer, parameters, shapes and types of the outputs, inputs) to the outputs.
RULES: dict[str, Callable[..., Tensor | list[Tensor]]] = {
    "add": values.add,
    "argmax": lambda writer, params, avals, x: values.argument(writer, params, avals, x, "ArgMax"),
    "argmin": lambda writer, params, avals, x: values.argument(writer, params, avals, x, "ArgMin"),
    "broadcast_in_dim": axes.broadcast,
    "clamp": values.clamp,
    "concatenate": axes.concatenate,
    "conv_general_dilated": sums.convolution,
    "convert_element_type": values.converted,
    "div": values.divide,
    "dot_general": sums.product,
    "dynamic_slice": axes.dynamic_slice,
    "dynamic_update_slice": axes.dynamic_update_slice,
    "erfc": values.complementary_error,
    "expand_dims": axes.reshape,
    "expm1": values.exp_minus_one,
    "gather": axes.gather,
    "integer_pow": values.power,
    "log1p": values.log_plus_one,
    "max": values.maximum,
    "min": values.minimum,
    "ne": values.different,
    "pad": axes.pad,
    "reduce_max": sums.reduction("ReduceMax"),
    "reduce_min": sums.reduction("ReduceMin"),
    "reduce_prod": sums.reduction("ReduceProd"),
    "reduce_sum": sums.reduction("ReduceSum"),
    "reduce_window_max": lambda writer, params, avals, x: sums.pooled(writer, "MaxPool", x, params, avals[0]),
    "reduce_window_sum": sums.window_sum,
    "reshape": axes.reshape,
    "rev": axes.reverse,
    "rsqrt": values.inverse_root,
    "select_n": values.select,
    "slice": axes.slice,
    "split": axes.split,
    "square": values.power,
    "squeeze": axes.reshape,
    "sub": values.subtract,
    "transpose": axes.transpose,
}
