"""The jit boundary: networks applied to any number of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from numbers import Integral
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from fzoo.layers import Classifier

#: What a batch is cut to when the caller does not say.
BATCH_SIZE = 32


def predict(
    module: nn.Module, variables: Any, images: Float[np.ndarray | Array, "n h w c"], *, batch_size: int | None = None
) -> Array:
    """The network's output for a batch of any size.

    The network is compiled once for each (module, batch size, image shape, dtype); the last batch is padded, so a
    stream of batches of one `batch_size` compiles once. Inside a caller's own `jax.jit` it is traced as part of that.

    Args:
        module: from `fzoo.create` or `fzoo.load`.
        variables: its variables.
        images: (N, H, W, C), preprocessed (see `preprocess_input`), float, NumPy or JAX.
        batch_size: how many images go through at once. By default the power of two that holds them, 32 at most.

    Returns:
        What `module.apply(variables, images)` gives: (N, classes) with the top.

    Raises:
        ValueError: images of integers (not preprocessed yet), of another rank, or none at all.
    """
    return in_batches(run, module, variables, images, batch_size)


def features(
    module: Classifier,
    variables: Any,
    images: Float[np.ndarray | Array, "n h w c"],
    layers: str | Sequence[str],
    *,
    batch_size: int | None = None,
) -> dict[str, Float[Array, "n ..."]]:
    """The outputs of Keras layers, by name; what none of them needs is not computed.

    Args:
        module, variables, images, batch_size: as for `predict`.
        layers: names from `fzoo.layer_names(module)`, or one.

    Returns:
        {layer name: (N, ...) array}.

    Raises:
        ValueError: an unknown layer, or images as for `predict`.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if not names:
        raise ValueError("no layers given: at least one name of fzoo.layer_names(module) expected")
    return in_batches(taps, (module, names), variables, images, batch_size)


def run(module: nn.Module, variables: Any, images: Array) -> Any:
    """The forward pass for inference."""
    return module.apply(variables, images)


def taps(module_and_layers: tuple[Classifier, tuple[str, ...]], variables: Any, images: Array) -> Any:
    """The forward pass up to some layers."""
    module, layers = module_and_layers
    return module.apply(variables, images, layers, method="endpoints")


@functools.lru_cache
def compiled(function: Callable, platform: str) -> Callable:
    """`function` jitted, its first argument static, with the compiler options that are safe on the platform.

    On CPU, jaxlib 0.10.2 fuses reductions into YNNPACK calls by default, some of which give wrong sums (jax issue
    39103); with dots and convolutions alone they are right. A jaxlib that does not know the option does without.
    """
    jit = functools.partial(jax.jit, static_argnums=0)
    if platform == "cpu":
        options = {
            "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
            "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
        }
        try:
            jax.jit(lambda x: x + 1, compiler_options=options)(jax.device_put(0.0, jax.devices("cpu")[0]))
            return jit(function, compiler_options=options)
        except jax.errors.JaxRuntimeError:  # no such compile option
            pass
    return jit(function)


def in_batches(function: Callable, what: Hashable, variables: Any, images: Any, batch_size: int | None) -> Any:
    """Apply `function(what, variables, images)` to images, a batch at a time, and put the results together."""
    check_images(images)
    if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size > 0):
        raise ValueError(f"batch_size={batch_size!r} given, a positive number expected")
    count, leaves = images.shape[0], jax.tree.leaves((variables, images))
    # Inside of a caller's transformation, it is part of that program; in a jit, even new arrays are traced.
    if any(isinstance(leaf, Tracer) for leaf in [*leaves, jnp.zeros(())]):
        size = batch_size or count
        parts = [function(what, variables, images[start : start + size]) for start in range(0, count, size)]
        return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    device = next(iter(arrays[0].devices())) if arrays else jax.devices()[0]
    call = compiled(function, device.platform)
    size = batch_size or min(BATCH_SIZE, 1 << (count - 1).bit_length())
    parts = [call(what, variables, batch) for batch in padded(images, size)]
    if count == size:
        return parts[0]
    # Put together on the host: there, no count of images needs a program of its own.
    return jax.tree.map(lambda *ys: jax.device_put(np.concatenate([np.asarray(y) for y in ys])[:count], device), *parts)


def check_images(images: Any) -> None:
    """Raise ValueError unless these are one or more images, preprocessed."""
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"an array of images expected, {type(images).__name__} given")
    if len(shape) != 4:
        raise ValueError(f"images of shape {shape} given, (N, H, W, C) expected; for one image: image[None]")
    if shape[0] == 0:
        raise ValueError("no images given: an array of shape (0, ...)")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images of {dtype} given, floats expected: preprocess_input(images, name) makes them")


def padded(images: Any, size: int) -> Iterator[Any]:
    """Batches of exactly `size` images, the last one filled up with zeros."""
    for start in range(0, images.shape[0], size):
        batch = images[start : start + size]
        if batch.shape[0] < size:
            pad = jnp.pad if isinstance(batch, jax.Array) else np.pad
            batch = pad(batch, ((0, size - batch.shape[0]), (0, 0), (0, 0), (0, 0)))
        yield batch
