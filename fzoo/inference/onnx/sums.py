"""Reductions, pools, convolutions and products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.core import ShapedArray

from fzoo.inference.onnx.graph import Tensor, constant, size_of
from fzoo.inference.onnx.writer import FLOAT, Avals, OnnxWriter, Parameters


def reduced(writer: OnnxWriter, operator: str, x: Tensor, axes: Sequence[int]) -> Tensor:
    """Reduce over axes, which are gone then."""
    x = writer.graph.whole(x)
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    shape = tuple(x.shape[axis] for axis in kept)
    order = tuple(kept.index(axis) for axis in x.order if axis in kept)
    places = writer.graph.integers(sorted(x.order.index(axis) for axis in axes))
    like = Tensor(shape, x.dtype, shape, order)
    return writer.graph.tensor(operator, [writer.graph.stored(x, x.order), places], like, keepdims=0)


def averaged(writer: OnnxWriter, x: Tensor, axes: Sequence[int]) -> Tensor:
    """Average over axes; over all pixels as GlobalAveragePool does, which leaves one."""
    if not x.is_whole or x.order[0] != 0 or len(x.order) < 3 or sorted(axes) != sorted(x.order[2:]):
        return reduced(writer, "ReduceMean", x, axes)
    sides = tuple(1 if axis in axes else side for axis, side in enumerate(x.shape))
    return writer.graph.tensor("GlobalAveragePool", [x.name], dataclasses.replace(x, shape=sides, sides=sides))


def pooled(
    writer: OnnxWriter, operator: str, x: Tensor, params: Parameters, aval: ShapedArray, **attributes: Any
) -> Tensor:
    """Reduce over the windows of images."""
    x, rank = writer.graph.whole(x), len(x.shape)
    window, strides, pads = params["window_dimensions"], params["window_strides"], params["padding"]
    outer = [(window[i], strides[i], tuple(pads[i])) for i in (0, rank - 1)]
    inner = range(1, rank - 1)
    if outer != [(1, 1, (0, 0))] * 2 or any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"])):
        raise ValueError(f"windows of {tuple(window)} over {x.shape}: ONNX pools over height and width alone")
    order = (0, rank - 1, *inner)
    shape = tuple(aval.shape)
    return writer.graph.tensor(
        operator,
        [writer.graph.stored(x, order)],
        Tensor(shape, x.dtype, shape, order),
        kernel_shape=[int(window[i]) for i in inner],
        strides=[int(strides[i]) for i in inner],
        pads=[int(pads[i][end]) for end in (0, 1) for i in inner],
        **attributes,
    )


def window_sum(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Sum over windows: their average, times their size."""
    average = pooled(writer, "AveragePool", x, params, avals[0], count_include_pad=1)
    size = FLOAT.type(size_of(params["window_dimensions"]))
    return writer.elementwise("Mul", avals[0], [average, constant(size)])


def convolution(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve; where the steps between pixels are filled, that is ConvTranspose."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    strides, pads, shape = params["window_strides"], params["padding"], tuple(avals[0].shape)
    filled, dilations = params["lhs_dilation"], params["rhs_dilation"]
    if params["batch_group_count"] != 1:
        raise ValueError("a convolution in groups of the batch: ONNX has none")
    x, kernel = writer.graph.whole(x), writer.graph.whole(kernel)
    if kernel.value is None:
        raise ValueError(f"layer {writer.graph.scope or '?'} convolves by what it computes: ONNX has constant kernels")
    sides = [int(kernel.shape[axis]) for axis in numbers.rhs_spec[2:]]
    like = Tensor(shape, x.dtype, shape, tuple(numbers.out_spec))
    attributes = {"kernel_shape": sides, "dilations": [*map(int, dilations)], "group": int(groups)}
    if all(by == 1 for by in filled):
        x, pads = without_padding(writer, x, tuple(numbers.lhs_spec), [tuple(map(int, pair)) for pair in pads])
        inputs = [writer.graph.stored(x, tuple(numbers.lhs_spec)), writer.graph.stored(kernel, tuple(numbers.rhs_spec))]
        attributes |= {"strides": [*map(int, strides)], "pads": [pair[end] for end in (0, 1) for pair in pads]}
        return writer.graph.tensor("Conv", inputs, like, **attributes)
    if any(step != 1 for step in strides) or groups != 1:
        raise ValueError("a transposed convolution with strides or groups: ONNX has none")
    turned = np.flip(kernel.value, tuple(numbers.rhs_spec[2:]))
    outputs, inputs, *rest = numbers.rhs_spec
    reach = [(side - 1) * int(by) for side, by in zip(sides, dilations, strict=True)]
    before = [far - int(pair[0]) for far, pair in zip(reach, pads, strict=True)]
    after = [far - int(pair[1]) for far, pair in zip(reach, pads, strict=True)]
    if min(before) < 0 or any(-end >= int(by) for end, by in zip(after, filled, strict=True)):
        raise ValueError(f"layer {writer.graph.scope or '?'}: ONNX's ConvTranspose has no such padding")
    attributes |= {"strides": [*map(int, filled)], "pads": [*before, *(max(end, 0) for end in after)]}
    attributes |= {"output_padding": [max(-end, 0) for end in after]}
    names = [
        writer.graph.stored(x, tuple(numbers.lhs_spec)),
        writer.graph.initializer(turned.transpose(inputs, outputs, *rest)),
    ]
    return writer.graph.tensor("ConvTranspose", names, like, **attributes)


def without_padding(
    writer: OnnxWriter, x: Tensor, order: Sequence[int], pads: list[tuple[int, ...]]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Let a convolution of what was padded by zeros pad itwriter."""
    origin = writer.origin(x, "pad")
    if origin is None:
        return x, pads
    source, value = origin.taken
    batch, channels, *sides = (origin.params["padding_config"][axis] for axis in order)
    if value.value is None or value.value.item() != 0 or any((*batch, *channels)) or min(map(min, sides)) < 0:
        return x, pads
    return source, [(a + int(c), b + int(d)) for (a, b), (c, d, _) in zip(pads, sides, strict=True)]


def product(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, y: Tensor) -> Tensor:
    """Multiply matrices."""
    ((left, right), (batch_left, batch_right)), shape = params["dimension_numbers"], tuple(avals[0].shape)
    x, y = writer.graph.whole(x), writer.graph.whole(y)
    like = Tensor(shape, np.dtype(avals[0].dtype), shape, tuple(range(len(shape))))
    if not batch_left and tuple(left) == (len(x.shape) - 1,) and len(y.shape) == 2:
        order = (right[0], 1 - right[0])
        return writer.graph.tensor("MatMul", [writer.graph.stored(x), writer.graph.stored(y, order)], like)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in x.shape]
    second = [next(letters) for _ in y.shape]
    for i, j in zip((*batch_left, *left), (*batch_right, *right), strict=True):
        second[j] = first[i]
    out = [first[i] for i in batch_left]
    out += [letter for i, letter in enumerate(first) if i not in (*batch_left, *left)]
    out += [letter for i, letter in enumerate(second) if i not in (*batch_right, *right)]
    equation = f"{''.join(first)},{''.join(second)}->{''.join(out)}"
    return writer.graph.tensor("Einsum", [writer.graph.stored(x), writer.graph.stored(y)], like, equation=equation)


def reduction(operator: str) -> Callable[..., Tensor]:
    """Make the rule of a reduction."""
    return lambda writer, params, avals, x: reduced(writer, operator, x, params["axes"])
