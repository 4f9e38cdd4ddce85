"""A graph of ONNX that is being written: its tensors, in whatever order their axes are stored, and its nodes."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from fzoo._version import __version__
from fzoo.types import DTypeLike

#: The version of ONNX's operators, and that of its files which came with it: what ONNX Runtime has read since 1.14.
OPSET, IR_VERSION = 18, 8

#: An element of a shape: a number, or the symbol of an open batch.
Side = Any

#: A node of onnx, which comes with an extra.
NodeProto = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """An array of the graph, or one that is known already.

    Attributes:
        shape: as JAX has it.
        dtype: NumPy's.
        sides: the shape, but 1 along the axes over which it still has to be repeated, as broadcasting does by itself.
        order: axis i of what is stored is axis `order[i]` of the array, so that convolutions, which in ONNX have the
            channels before the pixels, need no transposition between them.
        name: of what is stored; of a constant that is still without one, "".
        value: of a constant, its axes those of the array, its shape the `sides`.
    """

    shape: tuple[Side, ...]
    dtype: np.dtype
    sides: tuple[Side, ...]
    order: tuple[int, ...]
    name: str = ""
    value: np.ndarray | None = None

    @property
    def stored(self) -> tuple[Side, ...]:
        """The shape of what is stored."""
        return tuple(self.sides[axis] for axis in self.order)

    @property
    def is_whole(self) -> bool:
        """Whether nothing has to be repeated."""
        return self.sides == self.shape


def constant(value: ArrayLike, name: str = "", shape: tuple[Side, ...] | None = None) -> Tensor:
    """Make a tensor of a known array, which stands for one of `shape` if that is given."""
    array = np.asarray(value)
    shape = array.shape if shape is None else shape
    return Tensor(shape, array.dtype, array.shape, tuple(range(array.ndim)), name, array)


def is_number(side: Side) -> bool:
    """Tell a number from the symbol of an open batch."""
    return isinstance(side, (int, np.integer))


class OnnxGraph:
    """A graph that grows by a node at a time.

    Raises:
        ModuleNotFoundError: onnx is not installed.
    """

    def __init__(self):
        try:
            self.onnx: Any = importlib.import_module("onnx")
        except ModuleNotFoundError:
            raise ModuleNotFoundError("onnx is not installed: pip install 'fzoo[onnx]'") from None
        self.scope = ""
        self.nodes: list[NodeProto] = []
        self.inputs: dict[str, Tensor] = {}
        self._makers: dict[str, NodeProto] = {}  # by name of a tensor: its node
        self._initializers: dict[str, np.ndarray] = {}
        self._known: dict[Hashable, str] = {}  # by what tells constants apart: the name of the initializer
        self._taken: Counter[str] = Counter()

    def _unique(self, name: str) -> str:
        number = self._taken[name]
        self._taken[name] += 1
        return f"{name}_{number}" if number else name

    def input(self, name: str, shape: tuple[Side, ...], dtype: DTypeLike) -> Tensor:
        """Add an input."""
        self._taken[name] += 1
        tensor = Tensor(shape, np.dtype(dtype), shape, tuple(range(len(shape))), name)
        self.inputs[name] = tensor
        return tensor

    def node(self, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node; returns the names of its outputs. It is called after the layer that it comes from."""
        name = f"{len(self.nodes)}:{f'{self.scope}/{operator}' if self.scope else operator}"  # numbered at the end
        names = [name] if outputs == 1 else [f"{name}:{i}" for i in range(outputs)]
        node = self.onnx.helper.make_node(operator, inputs, names, name=name, **attributes)
        self.nodes.append(node)
        self._makers.update(dict.fromkeys(names, node))
        return names

    def tensor(self, operator: str, inputs: Sequence[str], like: Tensor, **attributes: Any) -> Tensor:
        """Add a node of one output, which is a tensor but for its name."""
        (name,) = self.node(operator, inputs, **attributes)
        return dataclasses.replace(like, name=name, value=None)

    def maker(self, tensor: Tensor) -> NodeProto | None:
        """Return the node whose output a tensor is; None of a constant or an input."""
        return None if tensor.value is not None else self._makers.get(tensor.name)

    def initializer(self, value: np.ndarray, name: str = "") -> str:
        """Return the name of an array that is part of the file, which holds equal ones once."""
        key = (name, value.shape, value.strides) if name else (value.shape, value.dtype, value.tobytes())
        if key not in self._known:
            self._known[key] = self._unique(name or (f"{self.scope}/constant" if self.scope else "constant"))
            self._initializers[self._known[key]] = value
        return self._known[key]

    def integers(self, values: Iterable[int]) -> str:
        """Return the name of a vector of int64: shapes and axes."""
        return self.initializer(np.array([int(value) for value in values], np.int64))

    def stored(self, tensor: Tensor, order: tuple[int, ...] | None = None) -> str:
        """Return the name of what is stored of a tensor, its axes in an order, or that of the array."""
        order = tuple(range(len(tensor.shape))) if order is None else order
        if tensor.value is not None:
            return self.initializer(tensor.value.transpose(order), tensor.name)
        return self.arranged(tensor, order).name

    def arranged(self, tensor: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        """Store a tensor in another order of the axes, or in that of the array."""
        order = tuple(range(len(tensor.shape))) if order is None else order
        if tensor.value is not None or order == tensor.order:
            return tensor
        moved = dataclasses.replace(tensor, order=order)
        if long_axes(tensor.sides, tensor.order) == long_axes(tensor.sides, order):  # no value moves
            return self.tensor("Reshape", [tensor.name, self.sizes(moved.stored)], moved)
        return self.tensor("Transpose", [tensor.name], moved, perm=[tensor.order.index(axis) for axis in order])

    def sizes(self, shape: Sequence[Side]) -> str:
        """Return the name of a shape for Reshape, of which ONNX finds one side out."""
        if sum(not is_number(side) for side in shape) > 1:
            raise ValueError(f"a shape {tuple(shape)} in the network: ONNX takes one open side")
        return self.integers(side if is_number(side) else -1 for side in shape)

    def whole(self, tensor: Tensor) -> Tensor:
        """Repeat a tensor over the axes along which it is only as if it were repeated."""
        if tensor.is_whole:
            return tensor
        if tensor.value is not None and all(map(is_number, tensor.shape)):
            return constant(np.broadcast_to(tensor.value, tensor.shape))
        name = self.stored(tensor, tensor.order)
        full = dataclasses.replace(tensor, sides=tensor.shape)
        if all(map(is_number, full.stored)):
            shape = self.integers(full.stored)
        else:  # the batch is that of the images
            (images, *_), zero = self.inputs.values(), self.integers([0])
            if any(not is_number(side) and side != images.shape[0] for side in full.stored):
                raise ValueError(f"a shape {full.shape} in the network: an open side other than the batch")
            sides = self.node("Shape", [images.name])
            batch = self.node("Gather", [*sides, zero])[0]
            parts = [self.integers([side]) if is_number(side) else batch for side in full.stored]
            shape = self.node("Concat", parts, axis=0)[0]
        return self.tensor("Expand", [name, shape], full)

    def model(self, outputs: dict[str, Tensor]) -> Any:
        """Make the model, of the nodes that the outputs need; the outputs are called by their keys."""
        helper, numpy_helper = self.onnx.helper, self.onnx.numpy_helper
        self.scope = ""
        last = {}
        for name, tensor in outputs.items():
            if tensor.dtype == bool or tensor.value is not None:
                raise ValueError(f"an output {name!r} that is no function of the images, or no number")
            last[name] = self.arranged(self.whole(tensor)).name
        needed, kept = set(last.values()), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        nodes = kept[::-1]
        renamed: dict[str, str] = {}
        self._taken.update([*last])
        for name, old in last.items():  # the tensor itself takes the name, unless it is an input or has one
            if old in self.inputs or old in renamed:
                nodes.append(helper.make_node("Identity", [old], [name], name=name))
            else:
                renamed[old] = name
        for node in nodes:
            if node.op_type == "Identity":
                continue
            node.name = self._unique(node.name.split(":", 1)[1])
            for i, output in enumerate(node.output):
                renamed.setdefault(output, f"{node.name}:{i}" if i else node.name)
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
        arrays = [numpy_helper.from_array(array, name) for name, array in self._initializers.items() if name in needed]
        inputs_and_outputs = [
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(t.dtype), open_shape(t.shape))
                for name, t in tensors.items()
            ]
            for tensors in (self.inputs, outputs)
        ]
        graph = helper.make_graph(nodes, "fzoo", *inputs_and_outputs, arrays)
        opset = [helper.make_operatorsetid("", OPSET)]
        return helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="fzoo", producer_version=__version__
        )


def open_shape(shape: Sequence[Side]) -> list[int | str]:
    """Write a shape as ONNX does: an open side is a name."""
    return [int(side) if is_number(side) else str(side) for side in shape]


def long_axes(sides: Sequence[Side], order: Iterable[int]) -> list[int]:
    """List the axes of more than one element, in an order."""
    return [axis for axis in order if sides[axis] != 1]


def size_of(shape: Iterable[Side]) -> int:
    """Multiply the sides of a shape, which must be numbers."""
    return math.prod(int(side) for side in shape)
