"""What moves values, and computes none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fzoo.inference.onnx.graph import Side, Tensor, constant, is_number, long_axes
from fzoo.inference.onnx.writer import Avals, OnnxWriter, Parameters


def with_sides(writer: OnnxWriter, x: Tensor, shape: Sequence[Side], sides: Sequence[Side]) -> Tensor:
    """Give a tensor axes of one element, or take such from it; `shape` is what it stands for then."""
    shape, sides, natural = tuple(shape), tuple(sides), tuple(range(len(sides)))
    if sides == x.sides:
        return dataclasses.replace(x, shape=shape)
    if x.value is not None:
        return constant(x.value.reshape(sides), x.name, shape)
    if long_axes(x.sides, x.order) != long_axes(x.sides, sorted(x.order)):
        x = writer.graph.arranged(x)
    # a vector of each image becomes a map of one pixel, which convolutions take with the channels first
    order = (0, 3, 1, 2) if len(sides) == 4 and sides[1:3] == (1, 1) else natural
    like = Tensor(shape, x.dtype, sides, order)
    return writer.graph.tensor("Reshape", [x.name, writer.graph.sizes(like.stored)], like)


def broadcast(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, *_: Tensor) -> Tensor:
    """Repeat along axes: nothing is written, since operators do it."""
    shape, places = avals[0].shape, params["broadcast_dimensions"]
    sides: list[Side] = [1] * len(shape)
    for axis, place in enumerate(places):
        sides[place] = x.sides[axis]
    return with_sides(writer, x, shape, sides)


def reshape(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, *_: Tensor) -> Tensor:
    """Put values into another shape."""
    shape = tuple(avals[0].shape)
    x = writer.graph.whole(x)
    if [side for side in x.sides if side != 1] == [side for side in shape if side != 1]:
        return with_sides(writer, x, shape, shape)
    like = Tensor(shape, x.dtype, shape, tuple(range(len(shape))))
    return writer.graph.tensor("Reshape", [writer.graph.stored(x), writer.graph.sizes(shape)], like)


def transpose(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Change the order of the axes: nothing is written, what is stored stays."""
    permutation = tuple(params["permutation"])
    if x.value is not None:
        return constant(x.value.transpose(permutation), shape=tuple(avals[0].shape))
    order = tuple(permutation.index(axis) for axis in x.order)
    return dataclasses.replace(
        x, shape=tuple(avals[0].shape), sides=tuple(x.sides[axis] for axis in permutation), order=order
    )


def concatenate(writer: OnnxWriter, params: Parameters, avals: Avals, *taken: Tensor) -> Tensor:
    """Put arrays one after the other along an axis."""
    parts, natural = [writer.graph.whole(t) for t in taken], tuple(range(len(avals[0].shape)))
    order = next((t.order for t in parts if t.value is None and t.order != natural), natural)
    like = Tensor(tuple(avals[0].shape), parts[0].dtype, tuple(avals[0].shape), order)
    names = [writer.graph.stored(t, order) for t in parts]
    return writer.graph.tensor("Concat", names, like, axis=order.index(params["dimension"]))


def split(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> list[Tensor]:
    """Cut an array into parts along an axis."""
    x = writer.graph.whole(x)
    inputs = [writer.graph.stored(x, x.order), writer.graph.integers(params["sizes"])]
    names = writer.graph.node("Split", inputs, len(avals), axis=x.order.index(params["axis"]))
    shapes = [tuple(aval.shape) for aval in avals]
    return [Tensor(s, x.dtype, s, x.order, name) for s, name in zip(shapes, names, strict=True)]


def pad(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, value: Tensor) -> Tensor:
    """Add values around an array; or take some away, where their number is below zero."""
    pads, x = params["padding_config"], writer.graph.whole(x)
    if any(inside for *_, inside in pads):
        raise ValueError("padding between values: ONNX has none")
    axes = [axis for axis in x.order if pads[axis] != (0, 0, 0)]
    sides = [int(pads[axis][end]) for end in (0, 1) for axis in axes]
    places = writer.graph.integers(x.order.index(axis) for axis in axes)
    inputs = [writer.graph.stored(x, x.order), writer.graph.integers(sides), writer.graph.stored(value), places]
    shape = tuple(avals[0].shape)
    return writer.graph.tensor("Pad", inputs, dataclasses.replace(x, shape=shape, sides=shape))


def part(
    writer: OnnxWriter,
    x: Tensor,
    shape: Sequence[Side],
    starts: Sequence[int],
    ends: Sequence[int],
    steps: Sequence[int],
) -> Tensor:
    """Take a part of an array along those axes that are not taken as a whole."""
    x, shape = writer.graph.whole(x), tuple(shape)
    cut = [axis for axis in x.order if steps[axis] != 1 or shape[axis] != x.shape[axis]]
    if not cut:
        return x
    places = [x.order.index(axis) for axis in cut]
    columns = ([values[axis] for axis in cut] for values in (starts, ends))
    inputs = [*map(writer.graph.integers, (*columns, places, [steps[axis] for axis in cut]))]
    like = dataclasses.replace(x, shape=shape, sides=shape)
    return writer.graph.tensor("Slice", [writer.graph.stored(x, x.order), *inputs], like)


def slice(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Take a part of an array."""
    steps = params["strides"] or (1,) * len(x.shape)
    return part(writer, x, avals[0].shape, params["start_indices"], params["limit_indices"], steps)


def reverse(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor) -> Tensor:
    """Turn axes around."""
    steps = [-1 if axis in params["dimensions"] else 1 for axis in range(len(x.shape))]
    return part(writer, x, x.shape, [-1] * len(steps), [np.iinfo(np.int64).min] * len(steps), steps)


def dynamic_slice(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, *starts: Tensor) -> Tensor:
    """Take a part that begins at known places."""
    begins = known_places(starts, x.shape, avals[0].shape)
    ends = [b + side if is_number(side) else 0 for b, side in zip(begins, avals[0].shape, strict=True)]
    return part(writer, x, avals[0].shape, begins, ends, [1] * len(begins))


def dynamic_update_slice(
    writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, new: Tensor, *starts: Tensor
) -> Tensor:
    """Put an array in the place of a part of another, along one axis: what is before it, the part, the rest."""
    begins = known_places(starts, x.shape, new.shape)
    axes = [axis for axis, (a, b) in enumerate(zip(x.shape, new.shape, strict=True)) if a != b]
    if not axes:
        return new
    if len(axes) > 1:
        raise ValueError("a part that is replaced along more than one axis: ONNX has no such operator")
    (axis,), begin, steps = axes, begins[axes[0]], [1] * len(begins)
    end, size = begin + new.shape[axis], x.shape[axis]
    parts = []
    for start, stop in ((0, begin), (end, size)):
        if stop > start:
            shape = [stop - start if i == axis else side for i, side in enumerate(x.shape)]
            parts.append(part(writer, x, shape, [start] * len(steps), [stop] * len(steps), steps))
    parts.insert(1 if begin else 0, new)
    return concatenate(writer, {"dimension": axis}, avals, *parts)


def gather(writer: OnnxWriter, params: Parameters, avals: Avals, x: Tensor, places: Tensor) -> Tensor:
    """Take known places along one axis, all of the others; or a single part of the array."""
    numbers, x = params["dimension_numbers"], writer.graph.whole(x)
    axes, sizes = tuple(numbers.start_index_map), params["slice_sizes"]
    if places.value is not None and places.value.ndim == 1:
        starts = dict(zip(axes, map(int, places.value), strict=True))
        begins = known_places([constant(starts.get(axis, 0)) for axis in range(len(sizes))], x.shape, sizes)
        ends = [b + size if is_number(size) else 0 for b, size in zip(begins, sizes, strict=True)]
        window = part(writer, x, sizes, begins, ends, [1] * len(begins))
        return window if not numbers.collapsed_slice_dims else reshape(writer, {}, avals, window)
    rest = tuple(i for i in range(len(x.shape)) if i not in axes)
    first = axes[0] if axes else 0
    offset = (*range(first), *range(first + len(places.shape) - 1, len(avals[0].shape)))
    if (
        places.value is None
        or len(axes) != 1
        or tuple(numbers.collapsed_slice_dims) != axes
        or tuple(numbers.offset_dims) != offset
        or any(sizes[axis] != x.shape[axis] for axis in rest)
    ):
        raise ValueError(f"layer {writer.graph.scope or '?'} takes places that ONNX's Gather can't: .stablehlo can")
    indices = np.clip(places.value[..., 0].astype(np.int64), 0, int(x.shape[first]) - 1)
    like = Tensor(tuple(avals[0].shape), x.dtype, tuple(avals[0].shape), tuple(range(len(avals[0].shape))))
    return writer.graph.tensor("Gather", [writer.graph.stored(x), writer.graph.initializer(indices)], like, axis=first)


def known_places(starts: Sequence[Tensor], shape: Sequence[Side], part: Sequence[Side]) -> list[int]:
    """Return where a part of an array begins, as JAX moves it inside; ValueError unless that is known."""
    if any(start.value is None for start in starts):
        raise ValueError("a part of an array at a place that the network computes: ONNX takes known ones here")
    places = []
    for start, side, length in zip(starts, shape, part, strict=True):
        place = int(start.value.item())  # pyright: ignore[reportOptionalMemberAccess]
        place += int(side) if place < 0 and is_number(side) else 0
        places.append(min(max(place, 0), int(side - length)) if is_number(side) else 0)
    return places
