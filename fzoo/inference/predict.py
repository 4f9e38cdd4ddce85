"""Networks applied to images: an array of any number of them, or a stream of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from fzoo.inference.batches import Pixels, in_batches, run, taps
from fzoo.inference.streams import apply_to_stream, is_stream
from fzoo.layers.classifier import Classifier
from fzoo.layers.stages import stages
from fzoo.types import Variables


def predict(
    module: nn.Module,
    variables: Variables,
    images: Pixels | Iterable[PyTree],
    *,
    batch_size: int | None = None,
    preprocess: str | bool | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Compute the network's output for a batch of any size.

    The network is compiled once for each (module, batch size, image shape, dtype); the last batch is padded, so a
    stream of batches of one `batch_size` compiles once. A CPU runs a batch in micro-batches of a few images, inside
    of the one program. Inside a caller's own `jax.jit` it is traced as part of that.

    A stream of batches (a generator, a loader, a list) gives an iterator over their results, one for each, in their
    order, as NumPy arrays. It takes the memory of a few batches: the next one is taken from the stream and moved to
    the device while the last one is computed. The images go through `batch_size` at a time however they come, so any
    sizes compile once; another height, width or dtype is compiled once more. An array on disk (an `h5py.Dataset`, a
    Zarr array) is such a stream, too, and is read `batch_size` images at a time.

    The result lies where the images were computed, whatever their number, and is committed to that device only if the
    images or the variables were. On a mesh it is split over the devices as the images are, or where their number is no
    multiple of the devices, whole on each.

    Args:
        module: from `fzoo.create`, `fzoo.load` or `fzoo.optimize_for_inference`.
        variables: its variables.
        images: (N, H, W, C), NumPy or JAX: floats, preprocessed (see `preprocess_input`), or pixels from 0 to 255:
            integers, or with `preprocess` floats, too. For a network of several inputs (see `load_model`), a tuple of
            arrays of floats, in their order, or a mapping by their names. Or a stream of such batches.
        batch_size: how many images go through at once. By default the power of two that holds them: 32 at most on a
            CPU, elsewhere as many as have the pixels of 256 of 224 x 224, between 32 and 1,024. Of a stream, as many
            as its first batch has, and no more than these.
        preprocess: whether `preprocess_input` is to be part of the compiled program, or the model ("ResNet50") or the
            mode ("unit") whose it is. By default that of the network's own family where the images are integers, and
            none where they are floats. Pixels of uint8 are a quarter of the bytes to move.
        mesh: devices of this process, from `fzoo.devices.mesh()`. The variables are put on each, and each computes its
            part of a batch, which is filled up to a multiple of them; the default batch is that for each at most.
            Variables that `fzoo.devices.replicate` has put there are not moved at each call. Inside of a caller's own
            `jax.jit`, the shardings are the caller's, and this is ignored.

    Returns:
        What `module.apply(variables, images)` gives: (N, classes) with the top; (0, classes) for no images. A tuple for
        a network of several outputs. For a stream, an iterator over that for each of its batches, in NumPy.

    Raises:
        ValueError: images of another rank; integers that are no pixels or that nothing preprocesses, pixels that are
            preprocessed already; an unknown model, or one with another preprocessing than the network's; a mesh with
            devices of another process; a stream inside of a `jax.jit`. What is wrong with a batch of a stream, and what
            the stream itself raises, comes out of the iterator after the results of the batches before.

    Warns:
        UserWarning: floats that are far from what the network's family takes.
    """
    if is_stream(module, images):
        return apply_to_stream(run, module, variables, images, batch_size, preprocess, mesh)
    return in_batches(run, module, variables, images, batch_size, preprocess, mesh)


def features(
    module: Classifier,
    variables: Variables,
    images: Pixels | Iterable[PyTree],
    layers: str | Sequence[str],
    *,
    batch_size: int | None = None,
    preprocess: str | bool | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Compute the outputs of Keras layers, by name; what none of them needs is not computed.

    Args:
        module, variables, images, batch_size, preprocess, mesh: as for `predict`.
        layers: names from `fzoo.layer_names(module)`, or one.

    Returns:
        {layer name: (N, ...) array}; for a stream, an iterator over such dictionaries of NumPy arrays.

    Raises:
        ValueError: an unknown layer, or one that `optimize_for_inference` folded away; images as for `predict`.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if not names:
        raise ValueError("no layers given: at least one name of fzoo.layer_names(module) expected")
    if is_stream(module, images):
        return apply_to_stream(taps, (module, names), variables, images, batch_size, preprocess, mesh)
    return in_batches(taps, (module, names), variables, images, batch_size, preprocess, mesh)


def pyramid(
    module: Classifier,
    variables: Variables,
    images: Pixels | Iterable[PyTree],
    *,
    strides: Sequence[int] = (8, 16, 32),
    batch_size: int | None = None,
    preprocess: str | bool | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Compute the feature maps at some strides, which a detector or a segmenter takes.

    Args:
        module, variables, images, batch_size, preprocess, mesh: as for `predict`.
        strides: in pixels of the image; `fzoo.stages` says which layers' these are.

    Returns:
        {stride: (N, H', W', F) array}; for a stream, an iterator over such dictionaries of NumPy arrays.

    Raises:
        ValueError: the network has no feature map of such a stride; images as for `predict`.
    """
    ends = stages(module, strides)
    options: dict[str, Any] = {"batch_size": batch_size, "preprocess": preprocess, "mesh": mesh}
    taps = features(module, variables, images, [end.layer for end in ends.values()], **options)

    def by_stride(maps: Mapping[str, Array | np.ndarray]) -> dict[int, Array | np.ndarray]:
        return {stride: maps[end.layer] for stride, end in ends.items()}

    return by_stride(taps) if isinstance(taps, dict) else map(by_stride, taps)
