"""Values one by one as ONNX has them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fzoo.inference.onnx.axes import with_sides
from fzoo.inference.onnx.graph import Tensor, constant, is_number, size_of
from fzoo.inference.onnx.sums import averaged, pooled
from fzoo.inference.onnx.writer import FLOAT, Avals, OnnxWriter, Parameters


def add(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, y: Tensor) -> Tensor:
    """Add; a term for each channel of a convolution is its bias."""
    x, y = (y, x) if x.value is not None else (x, y)
    conv = writer.graph.maker(x)
    if y.value is not None and y.shape and conv is not None and conv.op_type == "Conv" and len(conv.input) == 2:
        channel = x.order[1]
        if y.value.size == y.sides[channel] == x.shape[channel]:
            bias = writer.graph.initializer(y.value.reshape(-1), y.name)
            attributes = {a.name: writer.graph.onnx.helper.get_attribute_value(a) for a in conv.attribute}
            return writer.graph.tensor("Conv", [*conv.input, bias], x, **attributes)
    return writer.elementwise("Add", avals[0], [x, y])


def subtract(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, y: Tensor) -> Tensor:
    """Subtract; a constant is added with the other sign."""
    if y.value is not None and y.dtype == FLOAT:
        return add(writer, params, avals, x, dataclasses.replace(y, value=np.asarray(-y.value), name=""))
    return writer.elementwise("Sub", avals[0], [x, y])


def maximum(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, y: Tensor) -> Tensor:
    """Take the larger of two; of values and a number, that is Relu or Clip."""
    x, y = (y, x) if x.value is not None else (x, y)
    if y.value is None or y.value.size != 1 or x.dtype != FLOAT:
        return writer.elementwise("Max", avals[0], [x, y])
    number = y.value.reshape(())
    if number == -np.inf:
        return x
    if number == 0:
        return writer.graph.tensor("Relu", [x.name], x)
    return writer.graph.tensor("Clip", [x.name, writer.graph.initializer(number)], x)


def minimum(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, y: Tensor) -> Tensor:
    """Take the smaller of two; of values and a number, that is Clip, together with a maximum before it."""
    x, y = (y, x) if x.value is not None else (x, y)
    if y.value is None or y.value.size != 1 or x.dtype != FLOAT:
        return writer.elementwise("Min", avals[0], [x, y])
    maker, bounds = writer.graph.maker(x), ["", writer.graph.initializer(y.value.reshape(()))]
    if maker is not None and (maker.op_type == "Relu" or (maker.op_type == "Clip" and len(maker.input) == 2)):
        bounds[0] = writer.graph.initializer(np.zeros((), FLOAT)) if maker.op_type == "Relu" else maker.input[1]
        return writer.graph.tensor("Clip", [maker.input[0], *bounds], x)
    return writer.graph.tensor("Clip", [x.name, *bounds], x)


def clamp(writer: OnnxWriter, params: Parameters, avals: Avals, low: Tensor, x: Tensor, high: Tensor) -> Tensor:
    """Hold values between two bounds."""
    return minimum(writer, params, avals, maximum(writer, params, avals, x, low), high)


def divide(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, y: Tensor) -> Tensor:
    """Divide; Softmax, a mean, and an average of windows are written as such."""
    exp, total = writer.origin(x, "exp"), writer.sum_of(y)
    if exp is not None and total is not None and total[0].name == x.name and len(axes := total[1]) == 1:
        lowered = writer.origin(exp.taken[0], "sub")
        if lowered is not None and lowered.taken[1].sides[axes[0]] == 1 and lowered.taken[0].is_whole:
            source = lowered.taken[0]  # what is subtracted is one number along the axis, and falls out
            return writer.graph.tensor("Softmax", [writer.graph.stored(source, x.order)], x, axis=x.order.index(*axes))
    if y.value is not None and y.value.size == 1 and (total := writer.sum_of(x)) is not None:
        source, axes = total
        sides = [source.shape[axis] for axis in axes]
        if all(map(is_number, sides)) and size_of(sides) == y.value.item():
            return with_sides(writer, averaged(writer, source, axes), x.shape, x.sides)
    if y.value is not None and (windows := writer.origin(x, "reduce_window_sum")) is not None:
        (source,), options = windows.taken, windows.params
        ones = constant(np.ones([1, *source.shape[1:-1], 1], FLOAT)).value
        arguments = (options[key] for key in ("window_dimensions", "window_strides", "padding"))
        counts = np.asarray(jax.lax.reduce_window(ones, FLOAT.type(0), jax.lax.add, *arguments))
        if np.array_equal(np.broadcast_to(y.value, counts.shape), counts):
            return pooled(writer, "AveragePool", source, options, avals[0], count_include_pad=0)
    return writer.elementwise("Div", avals[0], [x, y])


def power(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Raise to a whole power, 2 if it is not given."""
    if (exponent := params.get("y", 2)) == 2:
        return writer.elementwise("Mul", avals[0], [x, x])
    return writer.elementwise("Pow", avals[0], [x, constant(FLOAT.type(exponent))])


def inverse_root(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Divide 1 by the square root."""
    return writer.elementwise("Reciprocal", avals[0], [writer.elementwise("Sqrt", avals[0], [x])])


def complementary_error(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Subtract the error function from 1."""
    return writer.elementwise("Sub", avals[0], [constant(FLOAT.type(1)), writer.elementwise("Erf", avals[0], [x])])


def log_plus_one(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Take the logarithm of one more."""
    return writer.elementwise("Log", avals[0], [writer.elementwise("Add", avals[0], [x, constant(FLOAT.type(1))])])


def exp_minus_one(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Take one less than the exponential."""
    return writer.elementwise("Sub", avals[0], [writer.elementwise("Exp", avals[0], [x]), constant(FLOAT.type(1))])


def different(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, y: Tensor) -> Tensor:
    """Compare for inequality."""
    return writer.elementwise("Not", avals[0], [writer.elementwise("Equal", avals[0], [x, y])])


def select(writer: OnnxWriter, params: Parameters, avals: Avals, which: Tensor, *cases: Tensor) -> Tensor:
    """Choose one of two values."""
    if which.dtype != bool or len(cases) != 2:
        raise ValueError(f"a choice of {len(cases)} values by {which.dtype}: ONNX has one of two by a condition")
    return writer.elementwise("Where", avals[0], [which, cases[1], cases[0]])


def converted(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Change the type of values."""
    if x.dtype == avals[0].dtype:
        return x
    dtype = np.dtype(avals[0].dtype)
    to = writer.graph.onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return writer.graph.tensor("Cast", [writer.graph.stored(x, x.order)], dataclasses.replace(x, dtype=dtype), to=to)


def argument(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, operator: str) -> Tensor:
    """Find the place of the largest or the smallest value."""
    (axis,), x = params["axes"], writer.graph.whole(x)
    shape = tuple(avals[0].shape)
    like = Tensor(shape, np.dtype(np.int64), shape, tuple(range(len(shape))))
    index = writer.graph.tensor(operator, [writer.graph.stored(x)], like, axis=int(axis), keepdims=0)
    return converted(writer, {}, avals, index)
