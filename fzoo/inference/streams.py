"""Streams: batches that come one after the other, and whose results go out in that order, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import PyTree

from fzoo.inference.batches import (
    Target,
    arranged,
    check_batch_size,
    check_values,
    chosen_preprocessing,
    count_of,
    cut,
    default_batch,
    for_devices,
    image_shape,
    in_flight,
    module_of,
)
from fzoo.inference.devices import parts_of
from fzoo.layers.classifier import Classifier
from fzoo.types import Variables

#: What is said of a stream where arrays are traced.
TRACED = "a stream of batches given inside of a jitted function, an array of images expected there"


def is_stream(module: nn.Module, images: object) -> bool:
    """Tell whether images are a stream of batches, and not a batch.

    Arrays are batches, and so are a mapping, and a tuple or a list for a network of several inputs.
    """
    if isinstance(images, (np.ndarray, jax.Array, Mapping, str, bytes)):
        return False
    if isinstance(images, (tuple, list)):
        return has_one_input(module)
    return is_stored(images) or (isinstance(images, Iterable) and not hasattr(images, "shape"))


def has_one_input(module: nn.Module) -> bool:
    """Tell whether a network takes one array; what a module that is none of fzoo's takes is not known."""
    return isinstance(module, Classifier) and not isinstance(module.example_inputs, tuple)


def is_stored(images: object) -> bool:
    """Tell whether this is an array on disk: with a shape, a dtype and slices, but neither NumPy's nor JAX's."""
    return (
        not isinstance(images, (np.ndarray, jax.Array))
        and isinstance(getattr(images, "dtype", None), np.dtype)
        and isinstance(getattr(images, "shape", None), tuple)
        and hasattr(images, "__getitem__")
    )


def apply_to_stream(
    function: Callable,
    target: Target,
    variables: Variables,
    batches: Any,
    batch_size: int | None,
    preprocess: str | bool | None,
    mesh: Mesh | None,
) -> Iterator[PyTree]:
    """Return an iterator over `function(target, variables, batch)` of a stream's batches, as trees of NumPy arrays.

    What is wrong with the arguments is raised here, what is wrong with a batch by the iterator.
    """
    check_batch_size(batch_size)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(variables)):
        raise ValueError(TRACED)
    stream = Stream(function, target, variables, batch_size, preprocess, mesh)
    if is_stored(batches):
        size = stream.program(*stream.arrange(batches), count=len(batches)).size
        batches = map(batches.__getitem__, [slice(start, start + size) for start in range(0, len(batches), size)])
    elif isinstance(batches, (tuple, list)):
        for number, batch in enumerate(batches):
            try:
                stream.arrange(batch)
            except ValueError as e:
                raise ValueError(f"batch {number} of the {type(batches).__name__} given: {e}") from e
    elif preprocess and has_one_input(stream.module):
        chosen_preprocessing(stream.module, jax.ShapeDtypeStruct((1, 1, 1, 3), np.uint8), preprocess)
    return stream.results(iter(batches))


class Share(NamedTuple):
    """Which images of a call are a batch's.

    Attributes:
        number: how many, behind those of the batches before.
        last: whether the batch ends with them.
    """

    number: int
    last: bool


class Program(NamedTuple):
    """What images of one shape and dtype go through.

    Attributes:
        call: the jitted function of a batch of `size` images, (images) to outputs.
        size: how many go through at once.
    """

    call: Callable[[PyTree], PyTree]
    size: int


class Filling:
    """The images of a program's next call, in memory of their own: a stream may give the same array again, refilled.

    Args:
        program: whose call it is.
        like: a batch, for shapes and dtypes.
    """

    def __init__(self, program: Program, like: PyTree):
        self.program, self.number = program, 0
        self.shares: list[Share] = []
        self.images = jax.tree.map(lambda x: np.zeros((program.size, *x.shape[1:]), x.dtype), like)

    def take(self, images: PyTree, start: int) -> tuple[int, bool]:
        """Take as many images as there is room for, from one on; returns (the next, whether none is left)."""
        count = count_of(images)
        end = min(count, start + self.program.size - self.number)
        for mine, theirs in zip(jax.tree.leaves(self.images), jax.tree.leaves(images), strict=True):
            mine[self.number : self.number + end - start] = np.asarray(theirs)[start:end]
        self.number += end - start
        self.shares.append(Share(end - start, end == count))
        return end, end == count


class Stream:
    """How the batches of a stream are computed; arguments as for `apply_to_stream`."""

    def __init__(
        self,
        function: Callable,
        target: Target,
        variables: Variables,
        batch_size: int | None,
        preprocess: str | bool | None,
        mesh: Mesh | None,
    ):
        self.function, self.target, self.module, self.mesh = function, target, module_of(target), mesh
        self.batch_size, self.preprocess = batch_size, preprocess
        self.variables = jax.device_put(variables) if mesh is None else variables  # once, and not at each call
        self.programs: dict[Hashable, Program] = {}
        self.warned = False

    def results(self, batches: Iterator[PyTree]) -> Iterator[PyTree]:
        """Yield what comes of each batch."""
        parts = []
        for started in in_flight(self.started(batches)):
            if isinstance(started, Exception):
                raise started
            outputs, shares = started
            outputs, start = jax.tree.map(np.asarray, outputs), 0
            for number, last in shares:
                parts.append(cut(outputs, start, number))
                start += number
                if last:
                    yield jax.tree.map(lambda *ys: np.concatenate(ys), *parts)
                    parts.clear()

    def started(self, batches: Iterator[PyTree]) -> Iterator[tuple[PyTree, list[Share]] | Exception]:
        """Yield the outputs of each call, which are on their way, and whose they are; an error is the last of these."""
        filling, error = None, None
        while True:
            try:
                batch = next(batches)
                images, preprocess = self.checked(batch)
                program = self.program(images, preprocess)
            except StopIteration:
                break
            except Exception as e:  # of the stream's own, too
                error = e
                break
            if filling is not None and filling.program is not program:
                yield self.start(filling.program, filling.images, filling.shares)
                filling = None
            if filling is None and count_of(images) == program.size and is_on_devices(images):
                yield self.start(program, images, [Share(program.size, True)])
                continue
            whole, start = False, 0
            while not whole:
                filling = filling or Filling(program, images)
                start, whole = filling.take(images, start)
                if filling.number == program.size:
                    yield self.start(program, filling.images, filling.shares)
                    filling = None
            del batch, images  # the next is made while this one is not in memory any more
        if filling is not None:
            yield self.start(filling.program, filling.images, filling.shares)
        if error is not None:
            yield error

    def start(self, program: Program, images: PyTree, shares: list[Share]) -> tuple[PyTree, list[Share]] | Exception:
        """Start a call; returns (its outputs, `shares`), or what went wrong."""
        try:
            outputs = program.call(images)
            for y in jax.tree.leaves(outputs):
                y.copy_to_host_async()
            return outputs, shares
        except Exception as e:  # in its turn, after the results that are under way
            return e

    def checked(self, batch: PyTree) -> tuple[PyTree, str | None]:
        """Check a batch, and its values; returns (its images, the model or mode that they are preprocessed for)."""
        images, preprocess = self.arrange(batch)
        if not isinstance(images, tuple) and (preprocess is not None or not self.warned):
            check_values(self.module, images, preprocess, stacklevel=6)
            self.warned = True
        return images, preprocess

    def arrange(self, batch: PyTree) -> tuple[PyTree, str | None]:
        """Check a batch but for its values; returns as `checked`."""
        if has_one_input(self.module) and isinstance(batch, (tuple, list)):
            raise ValueError(
                f"a batch that is a {type(batch).__name__} of {len(batch)} given, an array of images expected: "
                "(images for images, labels in batches)"
            )
        if isinstance(batch, Mapping) and isinstance(self.module, Classifier) and self.module.keras_graph is None:
            raise ValueError(
                f"a batch with {', '.join(map(str, batch))} given, an array of images expected: "
                '(batch["image"] for batch in batches)'
            )
        batch = batch if is_stored(batch) else jax.tree.map(as_array, batch)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(batch)):
            raise ValueError(TRACED)
        return arranged(self.module, batch, self.preprocess)

    def program(self, images: PyTree, preprocess: str | None, count: int | None = None) -> Program:
        """Return what a batch of images goes through; `count` are there in all, where that is known."""
        kind = preprocess, tuple((x.shape[1:], np.dtype(x.dtype)) for x in jax.tree.leaves(images))
        if kind not in self.programs:
            call, platform, variables, sharding = for_devices(
                self.function, self.target, self.variables, images, self.mesh
            )
            devices = 1 if sharding is None else parts_of(sharding)
            most = default_batch(platform, image_shape(images)) * devices
            size = self.batch_size or min(most, count or count_of(images) or most)

            def call_with(images: PyTree) -> PyTree:
                images = images if sharding is None else jax.device_put(images, sharding)
                return call(self.target, preprocess, variables, images)

            self.programs[kind] = Program(call_with, -(-size // devices) * devices)
        return self.programs[kind]


def as_array(array: Any) -> Any:
    """Return NumPy's or JAX's array as it is, and another library's as NumPy's."""
    return np.asarray(array) if hasattr(array, "__array__") and not isinstance(array, jax.Array) else array


def is_on_devices(images: PyTree) -> bool:
    """Tell whether all arrays of a batch are JAX's."""
    return all(isinstance(x, jax.Array) for x in jax.tree.leaves(images))
