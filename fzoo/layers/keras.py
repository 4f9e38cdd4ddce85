"""How Keras defines a layer, said once for every family.

A family (fzoo/models/) is a subclass of `Classifier` whose `backbone` calls the methods of a `Layers` object,
one for each Keras layer. `Layers` gives the layer its Keras name (which is its name in the parameter tree),
applies stock Flax layers with Keras's defaults, and keeps what was asked for: the outputs to tap, or the record of
the whole call graph, from which `trace` derives Keras's order of layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fzoo import ops
from fzoo.layers.activations import ACTIVATIONS, Activation, activation_function, name_of
from fzoo.layers.conventions import of_channels, pair
from fzoo.layers.forward import Training
from fzoo.layers.modules import Dropout
from fzoo.layers.record import OPERATION
from fzoo.layers.weighted import WeightedLayers
from fzoo.ops.shapes import Pads

__all__ = ["Layers", "Training"]


class Layers(WeightedLayers):
    """The Keras layers of one forward pass.

    Each method applies one Keras layer with Keras's defaults and returns its output, the fused activation included.
    A layer without a name gets the one that Keras would give it in a fresh session: the class in snake case, and a
    counter from the second on (`conv2d`, `conv2d_1`).
    """

    def input(self, x: Array, *, name: str | None = None) -> Array:
        """Note the InputLayer."""
        return self._note("InputLayer", self._name("InputLayer", name), [], x)

    def apply(self, kind: str, function: Callable[..., Array], *xs: Array, name: str | None = None) -> Array:
        """Apply a layer without weights that has no method here: `function(*xs)`."""
        return self._note(kind, self._name(kind, name), xs, function(*xs))

    def activation(self, x: Array, function: Activation, *, name: str | None = None) -> Array:
        """Apply Activation."""
        name = self._name("Activation", name)
        y = activation_function(function)(x)
        return self._note("Activation", name, [x], y, activation=name_of(function))

    def relu(self, x: Array, max_value: float | None = None, *, name: str | None = None) -> Array:
        """Apply ReLU, clipped at `max_value`."""
        name = self._name("ReLU", name)
        y = ACTIVATIONS["relu"](x) if max_value is None else jnp.clip(x, 0, max_value)
        return self._note("ReLU", name, [x], y, max_value=max_value)

    def zero_pad(
        self, x: Float[Array, "n h w c"], padding: int | Pads, *, name: str | None = None
    ) -> Float[Array, "n hp wp c"]:
        """Apply ZeroPadding2D."""
        name = self._name("ZeroPadding2D", name)
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        axes = self.axes(x)
        wide = [(axis.dilation * a, axis.dilation * b) for axis, (a, b) in zip(axes, padding, strict=True)]
        down, right = (dataclasses.replace(axis, zeros=zeros) for axis, zeros in zip(axes, padding, strict=True))
        y = jnp.pad(x, ((0, 0), *wide, (0, 0)))
        return self._note("ZeroPadding2D", name, [x], y, axes=(down, right), padding=tuple(wide))

    def crop(
        self, x: Float[Array, "n h w c"], cropping: tuple[tuple[int, int], tuple[int, int]], *, name: str | None = None
    ) -> Float[Array, "n hc wc c"]:
        """Apply Cropping2D."""
        name = self._name("Cropping2D", name)
        wide = [(axis.dilation * a, axis.dilation * b) for axis, (a, b) in zip(self.axes(x), cropping, strict=True)]
        (top, bottom), (left, right) = wide
        y = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
        return self._note("Cropping2D", name, [x], y, cropping=tuple(wide))

    def max_pool(
        self,
        x: Float[Array, "n h w c"],
        window: int | tuple[int, int],
        strides: int | tuple[int, int] | None = None,
        padding: str = "valid",
        *,
        name: str | None = None,
    ) -> Float[Array, "n ho wo c"]:
        """Apply MaxPooling2D; padding never wins. `strides` defaults to the window."""
        name = self._name("MaxPooling2D", name)
        return self._pool("MaxPooling2D", "max", x, pair(window), strides or window, padding, name)

    def avg_pool(
        self,
        x: Float[Array, "n h w c"],
        window: int | tuple[int, int],
        strides: int | tuple[int, int] | None = None,
        padding: str = "valid",
        *,
        name: str | None = None,
    ) -> Float[Array, "n ho wo c"]:
        """Apply AveragePooling2D; padding is not counted. `strides` defaults to the window."""
        name = self._name("AveragePooling2D", name)
        return self._pool("AveragePooling2D", "avg", x, pair(window), strides or window, padding, name)

    def _pool(
        self,
        kind: str,
        reduction: str,
        x: Array,
        window: tuple[int, int],
        strides: int | tuple[int, int],
        padding: str,
        name: str,
    ) -> Array:
        steps, pads, apart, axes = self._dense_windows(x, window, strides, padding)
        source = x
        if padding.upper() == "VALID" and not isinstance(pads, str):  # more zeros of a ZeroPadding2D, which count
            source, pads = jnp.pad(x, ((0, 0), *pads, (0, 0))), "VALID"
        pool = ops.Pool(reduction, window, steps, pads, apart)
        return self._note(kind, name, [x], ops.pool(pool, source), axes=axes, pool=pool)

    def global_avg_pool(
        self, x: Float[Array, "n h w c"], *, keepdims: bool = False, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """Apply GlobalAveragePooling2D."""
        name = self._name("GlobalAveragePooling2D", name)
        return self._note("GlobalAveragePooling2D", name, [x], jnp.mean(x, (1, 2), keepdims=keepdims))

    def global_max_pool(
        self, x: Float[Array, "n h w c"], *, keepdims: bool = False, name: str | None = None
    ) -> Float[Array, "n ... c"]:
        """Apply GlobalMaxPooling2D."""
        name = self._name("GlobalMaxPooling2D", name)
        return self._note("GlobalMaxPooling2D", name, [x], jnp.max(x, (1, 2), keepdims=keepdims))

    def add(self, xs: Sequence[Array], *, name: str | None = None) -> Array:
        """Apply Add."""
        name = self._name("Add", name)
        return self._note("Add", name, xs, functools.reduce(jnp.add, xs))

    def scaled_add(self, x: Array, residual: Array, scale: float, *, name: str | None = None) -> Array:
        """Compute x + scale * residual; Keras calls the layer CustomScaleLayer."""
        name = self._name("CustomScaleLayer", name)
        return self._note("CustomScaleLayer", name, [x, residual], x + residual * scale, scale=scale)

    def multiply(self, xs: Sequence[Array], *, name: str | None = None) -> Array:
        """Apply Multiply."""
        name = self._name("Multiply", name)
        return self._note("Multiply", name, xs, functools.reduce(jnp.multiply, xs))

    def operation(self, function: Callable[..., Array], *xs: Array, name: str | None = None) -> Array:
        """Compute `function(*xs)`: what a Keras file says by an operator, which is no layer of the model."""
        return self._note(OPERATION, self._name(OPERATION, name), xs, function(*xs))

    def rescaling(
        self,
        x: Array,
        scale: float | Sequence[float],
        offset: float | Sequence[float] = 0.0,
        *,
        name: str | None = None,
    ) -> Array:
        """Apply Rescaling: x * scale + offset, in float32 at least."""
        name = self._name("Rescaling", name)
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        y = (wide * of_channels(scale, x) + of_channels(offset, x)).astype(x.dtype)
        return self._note("Rescaling", name, [x], y, scale=scale, offset=offset)

    def concat(self, xs: Sequence[Array], *, axis: int = -1, room: int | None = None, name: str | None = None) -> Array:
        """Apply Concatenate, over the channels or another axis.

        Where the first of `xs` grows to `room` channels by one concatenation after the other, it isn't copied by each:
        it lies in a buffer of that size, which each adds to. In training there is none, since each of its gradients
        would be as large; nor for one that is tapped, which is copied anyway.
        """
        name = self._name("Concatenate", name)
        if room is None or self._train or name in self._taps:
            return self._note("Concatenate", name, xs, jnp.concatenate(xs, axis=axis), axis=axis)
        x, *others = xs
        if self._growing is not None and self._growing[0] is x:
            buffer = self._growing[1]
        else:  # x is a first one, or what the caller gave for the last
            buffer = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, room - x.shape[-1])))
        end = x.shape[-1]
        for other in others:
            buffer = lax.dynamic_update_slice_in_dim(buffer, other, end, axis=-1)
            end += other.shape[-1]
        joined = lax.slice_in_dim(buffer, 0, end, axis=-1)
        self._growing = joined, buffer
        return self._note("Concatenate", name, xs, joined, axis=-1)

    def flatten(self, x: Float[Array, "n ..."], *, name: str | None = None) -> Float[Array, "n c"]:
        """Apply Flatten."""
        name = self._name("Flatten", name)
        return self._note("Flatten", name, [x], x.reshape(x.shape[0], -1))

    def reshape(self, x: Array, shape: tuple[int, ...], *, name: str | None = None) -> Array:
        """Apply Reshape; the batch is left out of `shape`."""
        name = self._name("Reshape", name)
        return self._note("Reshape", name, [x], x.reshape(x.shape[0], *shape))

    def dropout(
        self,
        x: Array,
        rate: float,
        *,
        images: bool = False,
        kind: str = "Dropout",
        shared: tuple[int, ...] = (),
        name: str | None = None,
    ) -> Array:
        """Apply Dropout, to single values or to whole `images`; in training it draws from "dropout" of `rngs`.

        The values along the `shared` axes are dropped together, as SpatialDropout2D (`kind`) does along 1 and 2.
        """
        name = self._name(kind, name)
        shared = tuple(range(1, x.ndim)) if images else shared
        return self._note(kind, name, [x], self._dropped(x, rate, shared, name), rate=rate)

    def stochastic_depth(self, x: Array, rate: float, *, name: str | None = None) -> Array:
        """Apply StochasticDepth: drop whole images of a residual branch, in training."""
        name = self._name("StochasticDepth", name)
        shared = tuple(range(1, x.ndim))
        return self._note("StochasticDepth", name, [x], self._dropped(x, rate, shared, name), rate=rate)

    def _dropped(self, x: Array, rate: float, shared: tuple[int, ...], name: str) -> Array:
        options: dict[str, Any] = {"deterministic": not self.trains(name), "name": name}
        return self._module(name, functools.partial(Dropout, rate, shared, **options))(x)

    def correct_pad(self, x: Float[Array, "n h w c"], kernel: int) -> Pads:
        """Return the zero-padding before a VALID convolution of stride 2 in Keras's mobile families, by parity.

        Keras decides when it builds the network; where it does not know the size then, it pads as for an even one.
        """
        half = kernel // 2
        even = [1 - n % 2 if self.known_size else 1 for n in self.plain_size(x)]
        return (half - even[0], half), (half - even[1], half)
