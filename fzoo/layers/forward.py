"""One forward pass of a network: what its layers are called, and what is kept of them."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from fzoo import ops
from fzoo.layers.conventions import Padding, lax_padding, pair, snake_case
from fzoo.layers.dilation import Axis, dense_window
from fzoo.layers.initializers import VarianceScaling, glorot_uniform
from fzoo.layers.modules import Conv, Layer
from fzoo.layers.record import OPERATION, Node, Prepared
from fzoo.layers.remat import mark
from fzoo.ops.shapes import Side
from fzoo.types import DTypeLike

#: What behaves as in training (batch statistics, dropout): all or nothing, or the layers of these names.
Training = bool | frozenset[str]

#: The most layers of a network: nearly twice those of the deepest published one, ResNetRS420.
MOST_LAYERS = 4096

Module = TypeVar("Module", bound=nn.Module)


class DenseWindows(NamedTuple):
    """How windows go over a map.

    Attributes:
        strides: for height and width.
        padding: lax's.
        dilation: of the taps.
        axes: how the output lies.
    """

    strides: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    axes: tuple[Axis, Axis] | None


class ForwardPass:
    """What the layers of one forward pass share; `Layers` adds a method for each Keras layer.

    Args:
        train: batch statistics and dropout as in training: everywhere, or in the layers of these names alone.
        dtype: of the computation.
        param_dtype: of the parameters.
        plain_convolutions: whether a CPU, too, runs XLA's own convolutions.
        axis_name: of the devices whose batches a BN takes together in training.
        known_size: False where Keras would not know the height and width of the input when it builds the
            network, which decides `correct_pad`.
        taps: names of the layers whose output is kept in `self.tapped`.
        given: outputs of layers, by name, that are taken for what the layers compute, which XLA then drops.
        record: keep the call graph in `self.nodes`. Holds on to every intermediate array, so it is for
            abstract evaluation.
        prepared: where the network differs from Keras's, if `optimize_for_inference` made it.
        shared: names of the layers that are called more than once, each time with the same variables. The second call
            of a layer is recorded, and tapped, as "name:1".
        kept: names of the layers whose outputs are marked as what is kept for a backward pass.
        output_stride: pixels of the image between two values of a map, at the most, by dilation; None for the network
            as it is. Holds on to every intermediate array, as a record does.
    """

    def __init__(
        self,
        *,
        train: Training = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        plain_convolutions: bool = False,
        axis_name: str | None = None,
        known_size: bool = True,
        taps: Iterable[str] = (),
        given: Mapping[str, Array] | None = None,
        record: bool = False,
        prepared: Prepared | None = None,
        shared: Iterable[str] = (),
        kept: Iterable[str] = (),
        output_stride: int | None = None,
    ):
        self._train = train
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.plain_convolutions = plain_convolutions
        self.axis_name = axis_name
        self.known_size = known_size
        self.output_stride = output_stride
        self.tapped: dict[str, Array] = {}
        self.nodes: dict[str, Node] = {}
        self.names: list[str] = []
        self._taps = frozenset(taps)
        self._given = dict(given or {})
        self._record = record
        self._shared = frozenset(shared)
        self._kept = frozenset(kept)
        self._modules: dict[str, nn.Module] = {}
        self._prepared = prepared or Prepared()
        self._tiles = dict(self._prepared.tiles)
        self._forms = dict(self._prepared.forms)
        self._numbers: Counter[str] = Counter()
        self._growing: tuple[Array, Array] | None = None  # a concatenation, and the buffer that it is the beginning of
        self._producer: dict[int, tuple[str, Array]] = {}  # by id; the array is kept so that the id stays its own
        self._axes: dict[int, tuple[tuple[Axis, Axis], Array]] = {}  # the same, of how each array lies
        self._conv = functools.partial(
            Conv,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            padding="VALID",
            kernel_init=self._start(glorot_uniform),
            conv_general_dilated=lax.conv_general_dilated if plain_convolutions else ops.conv_general_dilated,
        )

    def _conv_of(self, layer: str) -> Callable[..., nn.Module]:
        """Return what makes a layer's convolution, in the form that was found to be its fastest."""
        if layer not in self._forms or self.plain_convolutions:
            return self._conv
        chosen = functools.partial(ops.conv_general_dilated, form=self._forms[layer])
        return functools.partial(self._conv, conv_general_dilated=chosen)

    def trains(self, name: str) -> bool:
        """Tell whether a layer behaves as in training."""
        return self._train if isinstance(self._train, bool) else name in self._train

    def _start(self, kernel_init: VarianceScaling) -> Callable[..., Array]:
        """Choose how kernels start; a record has no use for their values."""
        return nn.initializers.zeros if self._record else kernel_init

    def _flops(self, *terms: Side) -> int:
        """Count 2 for each multiply-add, of which there are `terms` multiplied; only a record keeps them."""
        return 2 * math.prod(terms) if self._record else 0

    # -- output_stride ----------------------------------------------------------------------------------------------

    def axes(self, x: Array) -> tuple[Axis, Axis]:
        """Tell how a map lies along its height and its width."""
        return (Axis(), Axis()) if self.output_stride is None else self._axes[id(x)][0]

    def plain_size(self, x: Array) -> tuple[Side, Side]:
        """Return the height and the width that a map (N, H, W, C) has without `output_stride`."""
        height, width = (axis.plain_side(side) for axis, side in zip(self.axes(x), x.shape[1:3], strict=True))
        return height, width

    def _dense_windows(
        self,
        x: Array,
        kernel: tuple[int, int],
        strides: int | tuple[int, int],
        padding: Padding,
        dilation: int | tuple[int, int] = 1,
    ) -> DenseWindows:
        """Say how the windows of a layer go over a map, which is other than the layer says with `output_stride`."""
        strides, dilation, padding = pair(strides), pair(dilation), lax_padding(padding)
        if self.output_stride is None:
            return DenseWindows(strides, padding, dilation, None)
        own = (padding, padding) if isinstance(padding, str) else padding
        windows = [
            dense_window(side, axis, self.output_stride, (taps - 1) * by + 1, stride, pads)
            for side, axis, taps, by, stride, pads in zip(
                x.shape[1:3], self.axes(x), kernel, dilation, strides, own, strict=True
            )
        ]
        down, right = windows
        axes = down.axis, right.axis
        if all(window.axis.dilation == 1 for window in windows):
            return DenseWindows(strides, padding, dilation, axes)
        apart = down.dilation * dilation[0], right.dilation * dilation[1]
        return DenseWindows((down.stride, right.stride), (down.pads, right.pads), apart, axes)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def _name(self, kind: str, name: str | None) -> str:
        if name is not None:
            return name
        base = snake_case(kind)
        number = self._numbers[base]
        self._numbers[base] += 1
        return f"{base}_{number}" if number else base

    def _module(self, name: str, make: functools.partial[Module]) -> Module:
        """Make the Flax module of a layer, or take the one that the layer's first call made."""
        if isinstance(make.func, type) and issubclass(make.func, Layer):
            make = functools.partial(make, param_dtype=self.param_dtype)
        if name not in self._shared:
            return make()
        if name not in self._modules:
            self._modules[name] = make()
        return self._modules[name]  # pyright: ignore[reportReturnType]

    def number_call(self, name: str, number: int) -> None:
        """Say which call of a layer that is called more than once comes next, where they come in another order."""
        self._numbers[f"{name}:"] = number

    def _note(
        self,
        kind: str,
        name: str,
        inputs: Sequence[Array],
        y: Array,
        flops: int = 0,
        kernel_init: VarianceScaling = glorot_uniform,
        parts: tuple[Node, ...] = (),
        axes: tuple[Axis, Axis] | None = None,
        **config: Any,
    ) -> Array:
        """File the output of a layer; every layer's last step.

        Without `axes`, its output lies as the densest of the inputs do.
        """
        variables = name
        if name in self._shared:
            number = self._numbers[f"{name}:"]
            self._numbers[f"{name}:"] += 1
            name = f"{name}:{number}" if number else name
        if kind != OPERATION:
            self.names.append(name)
        if len(self.names) > MOST_LAYERS:  # a file from a stranger may ask for any
            raise ValueError(f"a network has {MOST_LAYERS:,} layers at the most")
        dense = self.output_stride is not None
        if (self._record or dense) and any(y is x for x in inputs):  # an identity (dropout outside training), too
            y = jnp.copy(y)  # is a layer of its own
        if self._record:
            if not all(id(x) in self._producer for x in inputs):
                raise ValueError(f"{name}: its input was made by no layer; `operation` makes a step of the graph of it")
            parents = tuple(self._producer[id(x)][0] for x in inputs)
            self.nodes[name] = Node(name, kind, parents, y.shape[1:], flops, kernel_init, config, parts, variables)
            self._producer[id(y)] = (name, y)
        if name in self._given:
            y = self.given(name, y)
        if name in self._kept:
            y = mark(name, y)
        if dense:
            self._axes[id(y)] = (axes or self._joined_axes(inputs)), y
        if name in self._taps:
            self.tapped[name] = y
        return y

    def release(self) -> dict[str, Array]:
        """Return the tapped arrays, and let go of all: those of a transformation must not outlive it."""
        tapped, self.tapped, self._growing = self.tapped, {}, None
        for arrays in (self._modules, self._producer, self._axes):
            arrays.clear()
        return tapped

    def _joined_axes(self, inputs: Sequence[Array]) -> tuple[Axis, Axis]:
        """Return how the output of a layer lies whose inputs lie so."""
        if not inputs:
            return Axis(), Axis()
        rows, columns = zip(*(self.axes(x) for x in inputs), strict=True)
        down, right = (
            Axis(max(axis.stride for axis in axes), max(axis.dilation for axis in axes)) for axes in (rows, columns)
        )
        return down, right

    def makers(self, outputs: PyTree) -> tuple[str, ...]:
        """Name the calls that made the outputs of a network, of a record."""
        return tuple(self._producer[id(y)][0] for y in jax.tree.leaves(outputs))

    def not_given(self) -> list[str]:
        """List the names of what the caller gave that no layer has."""
        return list(self._given)

    def given(self, name: str, y: Array) -> Array:
        """Take what the caller gave for the output of a layer; once, so that the unknown names are left."""
        given = self._given.pop(name)
        if given.shape[1:] != y.shape[1:]:
            raise ValueError(f"{name} of shape {given.shape} given, (N, {', '.join(map(str, y.shape[1:]))}) expected")
        return jnp.asarray(given, y.dtype)
