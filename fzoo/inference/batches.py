"""The jit boundary: networks applied to any number of images, a batch at a time."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Num, PyTree

from fzoo.images.preprocessing import RANGES, Images, has_values_of, values_in_words
from fzoo.inference.compiler import compiler_options
from fzoo.inference.devices import along_batch, beside, committed_to, lies_otherwise, parts_of, replicate, split_of
from fzoo.inference.epilogues import with_epilogues
from fzoo.layers.classifier import Classifier
from fzoo.ops.onednn import Uncached, has_onednn
from fzoo.ops.platforms import traced_for
from fzoo.ops.processor import has_wide_vectors
from fzoo.types import DTypeLike, Variables
from fzoo.zoo import preprocess_input, preprocessing_mode, preprocessing_of

#: What a batch is cut to when the caller does not say: on a CPU, which gains nothing from more, and at the least.
BATCH_SIZE = 32


#: And elsewhere, where it takes hundreds of images to keep a device busy, as many as have about so many pixels: 32 at
#: 600 x 600 take the memory that 256 take at 224 x 224.
PIXELS, MOST = 256 * 224 * 224, 1024


#: (family, dtype, preprocessing) of the arrays on devices whose values were looked at: to look is to wait for them.
_looked_at: set[tuple[type[nn.Module], np.dtype, str | None]] = set()


#: Batches under way at once: one is computed, the next is on its way to the device.
IN_FLIGHT = 2


Result = TypeVar("Result")


#: A network, or one with what is wanted of it: what a program is compiled for.
Target = nn.Module | tuple[Any, ...]


#: Images, preprocessed or not, or an array for each of several inputs, in their order or by their names.
Pixels = Num[np.ndarray | Array, "n h w c"] | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def run(module: nn.Module, variables: Variables, images: Pixels) -> PyTree:
    """Run the forward pass for inference."""
    return module.apply(variables, images)


def taps(module_and_layers: tuple[Classifier, tuple[str, ...]], variables: Variables, images: Pixels) -> PyTree:
    """Run the forward pass up to some layers."""
    module, layers = module_and_layers
    return module.apply(variables, images, layers, method="endpoints")


@functools.lru_cache
def compiled(
    function: Callable,
    platform: str,
    dtype: DTypeLike,
    sharding: NamedSharding | None = None,
    in_parts: bool = True,
    fusions: str | None = None,
    alone: bool = False,
) -> Callable:
    """Put `function(target, variables, images)` behind preprocessing and micro-batches, jitted for a platform.

    Where the images are split along the batch (`sharding`), every device runs that program on its part of them; they
    have nothing to tell each other. `in_parts=False` leaves a batch whole, for arrays that lie on several devices in
    another way; `fusions` are what the network was tuned with; `alone` lets it call oneDNN. Called with (target, name
    of the model to preprocess for or None, variables, images).
    """
    calls_onednn = alone and has_onednn()

    @traced_for(platform, alone=calls_onednn)
    def program(target: Target, preprocess: str | None, variables: Variables, images: PyTree) -> PyTree:
        def step(images: PyTree) -> PyTree:
            return function(target, variables, images if preprocess is None else preprocess_input(images, preprocess))

        if calls_onednn:
            step = with_epilogues(step)
        if platform != "cpu" or not in_parts:
            return step(images)
        count, most = count_of(images), micro_batch(target)
        if count <= most:
            return step(images)
        micro = images_together(count, most)
        parts = -(-count // micro)
        filled = jax.tree.map(functools.partial(filled_up, size=parts * micro), images)
        out = lax.map(step, jax.tree.map(lambda x: x.reshape(parts, micro, *x.shape[1:]), filled))
        return jax.tree.map(lambda y: y.reshape(parts * micro, *y.shape[2:])[:count], out)

    def on_each_device(target: Target, preprocess: str | None, variables: Variables, images: PyTree) -> PyTree:
        assert sharding is not None
        part, specs = functools.partial(program, target, preprocess), (PartitionSpec(), sharding.spec)
        run = jax.shard_map(part, mesh=sharding.mesh, in_specs=specs, out_specs=specs[1], check_vma=False)
        return run(variables, images)

    several = sharding is not None and parts_of(sharding) > 1
    options = compiler_options(platform, dtype, fusions=fusions)
    make = Uncached if calls_onednn else jax.jit
    return make(on_each_device if several else program, static_argnums=(0, 1), compiler_options=options)


def images_together(count: int, most: int) -> int:
    """Return how many images a CPU computes together of a batch, `most` of them at best: with the fewest made up."""
    if count <= most:
        return count
    return min(range(most, most // 2, -1), key=lambda size: -count % size)


def in_batches(
    function: Callable,
    target: Target,
    variables: Variables,
    images: PyTree,
    batch_size: int | None,
    preprocess: str | bool | None,
    mesh: Mesh | None = None,
) -> PyTree:
    """Apply `function(target, variables, images)` to images, a batch at a time, and put the results together."""
    images, preprocess = arranged(module_of(target), images, preprocess)
    if not isinstance(images, tuple):
        check_values(module_of(target), images, preprocess)
    check_batch_size(batch_size)
    count, leaves = count_of(images), jax.tree.leaves((variables, images))
    # Inside of a caller's transformation, it is part of that program; in a jit, even new arrays are traced.
    if any(isinstance(leaf, Tracer) for leaf in [*leaves, jnp.zeros(())]):
        images = images if preprocess is None else preprocess_input(jnp.asarray(images), preprocess)
        if count == 0:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), images)
            return no_results(jax.eval_shape(functools.partial(function, target), variables, one))
        size = batch_size or count
        parts = [function(target, variables, cut(images, start, size)) for start in range(0, count, size)]
        return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
    call, platform, variables, sharding = for_devices(function, target, variables, images, mesh)
    devices = 1 if sharding is None else parts_of(sharding)
    place = (lambda x: x) if sharding is None else functools.partial(jax.device_put, device=sharding)
    if count == 0:
        fewest = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((devices, *x.shape[1:]), x.dtype, sharding=sharding), images
        )
        nothing = no_results(call.eval_shape(target, preprocess, variables, fewest))
        return beside(nothing, (variables, images)) if sharding is None else place(nothing)
    size = batch_size or min(default_batch(platform, image_shape(images)) * devices, 1 << (count - 1).bit_length())
    size = -(-size // devices) * devices
    if count == size:
        return call(target, preprocess, variables, place(images))
    results = in_flight(call(target, preprocess, variables, place(batch)) for batch in padded(images, size))
    return join_on_host(results, count) if platform == "cpu" else join_on_device(results, count)


def check_batch_size(batch_size: object) -> None:
    """Raise ValueError unless this is a number of images, or None."""
    if batch_size is not None and not (isinstance(batch_size, Integral) and int(batch_size) > 0):
        raise ValueError(f"batch_size={batch_size!r} given, a positive number expected")


def arranged(module: nn.Module, images: PyTree, preprocess: str | bool | None) -> tuple[PyTree, str | None]:
    """Check what a network is called with: images, or arrays for its several inputs, which are put into a tuple.

    Returns:
        (these, the model or the mode that they are preprocessed for).
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"a module from fzoo.create expected, {type(module).__name__} given; of a model from fzoo.to_nnx: "
            "*fzoo.from_nnx(model)"
        )
    images = module.arrange(images) if isinstance(module, Classifier) else images
    if not isinstance(images, tuple):
        return images, chosen_preprocessing(module, images, preprocess)
    if preprocess:
        raise ValueError(f"preprocess={preprocess!r} given, which goes with one input: preprocess_input(images, name)")
    for array in images:
        dtype = getattr(array, "dtype", type(array).__name__)
        if not hasattr(array, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"inputs of {dtype} given, arrays of floats expected")
    shapes = [array.shape for array in images]
    if len({shape[:1] for shape in shapes}) > 1:
        raise ValueError(f"inputs of shapes {', '.join(map(str, shapes))} given, as many of each expected")
    return images, None


def count_of(images: PyTree) -> int:
    """Return how many there are."""
    return jax.tree.leaves(images)[0].shape[0]


def cut(images: PyTree, start: int, size: int) -> PyTree:
    """Cut out some of the images, in their order."""
    return jax.tree.map(lambda x: rows(x, start, start + size), images)


def rows(array: Any, start: int, end: int) -> Any:
    """Cut out some rows of an array; JAX's indexing of one on the explicit axes of a mesh would be a gather."""
    if not isinstance(array, jax.Array):
        return array[start:end]
    return lax.slice_in_dim(array, start, min(end, len(array)))


def no_results(shapes: PyTree) -> PyTree:
    """Return what is given for no images, by the shapes of what is given for some."""
    return jax.tree.map(lambda y: jnp.zeros((0, *y.shape[1:]), y.dtype), shapes)


def join_on_host(results: Iterator[PyTree], count: int) -> PyTree:
    """Put batches together, but for the images that fill up the last: on a CPU, whose memory is the host's.

    There, no count of images needs a program of its own.
    """
    first, structure = jax.tree.flatten(next(results))
    wholes, at = [np.empty((count, *y.shape[1:]), y.dtype) for y in first], 0
    for leaves in itertools.chain([first], map(jax.tree.leaves, results)):
        for whole, y in zip(wholes, leaves, strict=True):
            whole[at : at + len(y)] = np.asarray(y)[: count - at]
        at += len(leaves[0])
    return jax.tree.unflatten(structure, map(placed_as, wholes, first))


def join_on_device(results: Iterator[PyTree], count: int) -> PyTree:
    """Put batches together, but for the images that fill up the last, where they were computed."""
    parts = []
    for part in results:
        parts.append(part)
        if len(parts) > IN_FLIGHT:
            jax.block_until_ready(parts[-IN_FLIGHT - 1])
    return jax.tree.map(lambda *ys: placed_as(first_of(jnp.concatenate(ys), count), ys[0]), *parts)


def first_of(array: Array, count: int) -> Array:
    """Cut off what comes after the first rows; where they are no multiple of the parts, they are put together first."""
    if len(array) == count:
        return array
    if count % parts_of(array.sharding):
        array = jax.device_put(array, even_sharding(array.sharding, count))
    return rows(array, 0, count)


def placed_as(array: Array | np.ndarray, y: Array) -> Array:
    """Put an array where one lies that differs in the number of images, committed to its devices if that is."""
    if not y.committed:
        return jax.device_put(array)
    return jax.device_put(array, even_sharding(y.sharding, len(array)))


def even_sharding(sharding: Sharding, count: int) -> Sharding:
    """Return a sharding that so many rows can have: this one, or where they are no multiple of its parts, none."""
    if isinstance(sharding, NamedSharding) and count % parts_of(sharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def image_shape(images: PyTree) -> tuple[int, ...]:
    """Return the shape of the images, or of the first of several inputs that has images; (1, 1, 1, 1) for none."""
    return next((x.shape for x in jax.tree.leaves(images) if len(x.shape) == 4), (1, 1, 1, 1))


def default_batch(platform: str, shape: Sequence[int]) -> int:
    """Return how many images a device takes at once when the caller does not say, of their shape (..., H, W, C)."""
    if platform == "cpu":
        return BATCH_SIZE
    *_, height, width, _ = shape
    return min(MOST, max(BATCH_SIZE, 1 << (PIXELS // (height * width)).bit_length() - 1))


def for_devices(
    function: Callable, target: Target, variables: Variables, images: PyTree, mesh: Mesh | None
) -> tuple[Any, str, Variables, NamedSharding | None]:
    """Arrange where a network is computed.

    Returns:
        (the jitted function, the platform that it is for, the variables where they are wanted, how the images are to
        be split along the batch: over a mesh, as they are, or None for not at all).
    """
    if mesh is not None and mesh.is_multi_process:
        raise ValueError("a mesh with devices of other processes given, this process's expected: fzoo.devices.mesh()")
    sharding = split_of(images) if mesh is None else along_batch(mesh)
    if mesh is None and sharding is not None and lies_otherwise(variables, sharding.mesh):
        sharding = None
    if sharding is None:
        devices = (committed_to((variables, images)) or jnp.zeros(()).sharding).device_set
    else:
        devices, variables = sharding.device_set, replicate(variables, sharding.mesh)
    platform = next(iter(devices)).platform
    dtype = jnp.dtype(getattr(module_of(target), "dtype", None) or jnp.float32)
    prepared = getattr(module_of(target), "prepared", None)
    whole = sharding is not None or len(devices) == 1
    fusions, alone = (prepared.fusions, whole and platform == "cpu") if prepared else (None, False)
    call = compiled(function, platform, dtype, sharding, whole, fusions, alone)
    return call, platform, variables, sharding


def output_shapes(
    module: Classifier,
    variables: Variables,
    images: jax.ShapeDtypeStruct,
    layers: tuple[str, ...] | None,
    *,
    preprocess: str | None = None,
    mesh: Mesh | None = None,
) -> PyTree:
    """Return the shapes of what `predict`, or with `layers` `features`, gives for a whole batch.

    Nothing is computed or compiled, and the call that comes then does not trace the network again.
    """
    function, target = (run, module) if layers is None else (taps, (module, layers))
    images, preprocess = arranged(module_of(target), images, preprocess)
    call, _, variables, sharding = for_devices(function, target, variables, images, mesh)
    images = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=sharding)
    return call.eval_shape(target, preprocess, variables, images)


def module_of(target: Target) -> nn.Module:
    """Return the network of `run`'s or `taps`' first argument."""
    return target[0] if isinstance(target, tuple) else target


def micro_batch(target: Target) -> int:
    """Return how many images a CPU computes together: more fall out of its cache.

    Of bfloat16, which takes half of it, twice as many where oneDNN computes the network.
    """
    module = module_of(target)
    images = getattr(module, "micro_batch", Classifier.micro_batch)
    if not isinstance(module, Classifier) or module.dtype != jnp.bfloat16:
        return images
    if module.prepared is not None and has_wide_vectors() and has_onednn():
        return 2 * images
    return module.narrow_micro_batch or images


def in_flight(started: Iterable[Result]) -> Iterator[Result]:
    """Yield results that are under way, in their order, `IN_FLIGHT` of them at a time."""
    pending: deque[Result] = deque()
    for result in started:
        pending.append(result)
        if len(pending) == IN_FLIGHT:
            yield pending.popleft()
    yield from pending


def chosen_preprocessing(module: nn.Module, images: PyTree, preprocess: str | bool | None) -> str | None:
    """Return the model or the mode that images are preprocessed for, None for none.

    Args:
        module: the network.
        images: anything with a shape and a dtype.
        preprocess: what the caller asked for.

    Raises:
        ValueError: these are no images, or none that can be preprocessed so for this network.
    """
    own, name = preprocessing_of(module), type(module).__name__
    if preprocess is None and jnp.issubdtype(getattr(images, "dtype", jnp.float32), jnp.integer):
        preprocess = own
    if preprocess is True and own is None:
        raise ValueError(f"preprocess=True given, but how {name} wants its images is not known: preprocess=NAME")
    preprocess = own if preprocess is True else preprocess or None
    check_images(images, pixels=preprocess is not None)
    if preprocess is None or own is None or preprocess == own:
        return preprocess
    given = preprocessing_mode(preprocess)
    if given != own:
        raise ValueError(
            f"preprocess={preprocess!r} given, which is {given!r}; {name} takes {own!r}: leave it out, or do it before "
            "by preprocess_input"
        )
    return own


def check_values(module: nn.Module, images: Images, preprocess: str | None, stacklevel: int = 4) -> None:
    """Look whether values of images can be what they are said to be; of JAX's arrays, once for each kind.

    A warning is about the line of the caller that is `stacklevel` calls up.

    Raises:
        ValueError: they are no pixels, or were preprocessed already.

    Warns:
        UserWarning: they are far from what the network's family takes.
    """
    own, name = preprocessing_of(module), type(module).__name__
    if not images.size or images.dtype == np.uint8:
        return
    if isinstance(images, jax.Array):
        kind = (type(module), images.dtype, preprocess)
        if isinstance(images, Tracer) or not images.is_fully_addressable or kind in _looked_at:
            return
        _looked_at.add(kind)
    if preprocess is not None:
        if not has_values_of(images, "none"):
            low, high = float(images.min()), float(images.max())
            already = ", as if they were preprocessed already" if low < 0 or high < 4 else ""
            raise ValueError(
                f"{values_in_words(images)} given{already}: pixels from 0 to 255 expected, which are preprocessed for "
                f"{name}"
            )
    elif own is not None and not has_values_of(images, own, noise=True):
        least, most = RANGES[own]
        warnings.warn(
            f"{values_in_words(images)} given, which {name} takes from {least:g} to {most:g}: integers from 0 to 255 "
            "are preprocessed, but floats only with preprocess=True",
            stacklevel=stacklevel,
        )


def check_images(images: object, pixels: bool) -> None:
    """Raise ValueError unless these are images: preprocessed, or pixels that will be."""
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"an array of images expected, {type(images).__name__} given")
    if len(shape) != 4:
        raise ValueError(f"images of shape {shape} given, (N, H, W, C) expected; for one image: image[None]")
    if not (jnp.issubdtype(dtype, jnp.floating) or (pixels and jnp.issubdtype(dtype, jnp.integer))):
        raise ValueError(
            f"images of {dtype} given, floats expected: preprocess_input(images, name) makes them, "
            "or preprocess=name here"
        )


def padded(images: PyTree, size: int) -> Iterator[PyTree]:
    """Yield batches of exactly `size` images, the last one filled up with zeros."""
    for start in range(0, count_of(images), size):
        yield jax.tree.map(functools.partial(filled_up, size=size), cut(images, start, size))


def filled_up(x: Any, size: int) -> Any:
    """Fill an array up with as many rows of zeros at its end as make it `size` long."""
    if x.shape[0] == size:
        return x
    pad = jnp.pad if isinstance(x, jax.Array) else np.pad
    return pad(x, ((0, size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
